"""Masked language models: loss and gradient norm of every step do not depend on the layout beyond rounding."""

from __future__ import annotations

from typing import Any

import pytest

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.model import ModelSpec
from tests.distributed.layout_runs import require_the_layout_changes_nothing
from tests.distributed.pairwise import MASKED, legal_settings, pairwise_settings
from tests.plans import make_plan, tiny_bert, tiny_megatron_bert
from tests.thinned import every

JOB = TrainingJob(global_batch=12, sequence=24, precision="fp32")  # 4 targets a row
BERT, MEGATRON = tiny_bert(), tiny_megatron_bert()


def planned(
    model: ModelSpec, recompute: list[int] | None = None, selective: list[int] | None = None, **axes: Any
) -> Plan:
    if axes.get("zero"):
        axes["dp_shard"] = axes.get("dp", 1)
    axes.setdefault("micro_batch", 2)
    layout = Layout(**axes)
    return make_plan(model, layout, JOB, recompute=recompute, selective=selective)


CASES = {
    "bert, one rank": planned(BERT),
    "bert tp2 sp cp2 ring": planned(BERT, tp=2, sequence_parallel=True, cp=2, cp_style="ring", micro_batch=6),
    "megatron pp2·v2 interleaved, recomputing": planned(
        *(MEGATRON, [0, 1, 0, 0], [1, 0, 0, 1]), pp=2, virtual_stages=2, schedule="interleaved-1f1b"
    ),
    "bert pp2·v2 zbv": planned(BERT, pp=2, schedule="zbv", virtual_stages=2),
}
MORE_CASES = {
    "bert tp2 sp cp2 ring pp2": planned(BERT, tp=2, sequence_parallel=True, cp=2, cp_style="ring", pp=2, micro_batch=6),
    "bert pp2 gpipe tp2": planned(BERT, pp=2, schedule="gpipe", tp=2, micro_batch=3),
    "bert cp2 all-to-all dp2 zero3": planned(BERT, cp=2, cp_style="all-to-all", dp=2, zero=3),
    "megatron cp4 ring zero1": planned(MEGATRON, cp=4, cp_style="ring", zero=1, micro_batch=6),
}
GENERATED = {str(setting): setting for setting in pairwise_settings(MASKED)}
PLANS = CASES | MORE_CASES | {name: setting.plan() for name, setting in GENERATED.items()}


def test_every_pair_of_settings_that_is_trained_is_tried() -> None:
    tried = {pair for setting in GENERATED.values() for pair in setting.pairs}
    assert tried == {pair for setting in legal_settings(MASKED) for pair in setting.pairs}
    assert len(GENERATED) >= 30


@pytest.mark.parametrize(
    "name",
    [*CASES, *(pytest.param(name, marks=pytest.mark.full) for name in MORE_CASES), *every(60, GENERATED, first=2)],
)
def test_loss_and_norm_do_not_depend_on_the_layout(name: str) -> None:
    require_the_layout_changes_nothing(PLANS[name])
