"""The sacred test: loss and gradient norm of every step do not depend on the layout beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import SCHEDULES, Layout
from planner.plan import Plan
from profiles.model import ModelSpec
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import require_the_layout_changes_nothing, run_plain, run_plan
from tests.distributed.pairwise import legal_settings, pairwise_settings
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.thinned import every

JOB = TrainingJob(global_batch=12, sequence=16, precision="fp32")
LLAMA = tiny_llama()
LLAMA_ONE_KV = tiny_llama(name="tiny-llama-kv1", kv_heads=1)
GPT2 = tiny_gpt2()


@dataclass(frozen=True)
class Case:
    """A layout of a model, its stage boundaries and recomputing blocks per stage."""

    model: ModelSpec
    layout: dict[str, Any]
    cuts: tuple[int, ...] | None = None
    recompute: tuple[int, ...] | None = None
    selective: tuple[int, ...] | None = None

    def plan(self) -> Plan:
        layout = Layout(**self.layout)
        if layout.zero and "dp_shard" not in self.layout:
            layout = Layout(**self.layout, dp_shard=layout.dp)
        return make_plan(self.model, layout, JOB, self.cuts, self.recompute, self.selective)


Counts = tuple[int, ...] | None


def llama(cuts: Counts = None, recompute: Counts = None, selective: Counts = None, **layout: Any) -> Case:
    return Case(LLAMA, {"micro_batch": 2} | layout, cuts, recompute, selective)


def gpt2(cuts: Counts = None, recompute: Counts = None, selective: Counts = None, **layout: Any) -> Case:
    return Case(GPT2, {"micro_batch": 2} | layout, cuts, recompute, selective)


# What the generated layouts do not reach: more of an axis, shards that do not divide, stages without blocks.
CASES = {
    "one rank, micro_batch 1": llama(micro_batch=1),
    "tp2 of 1 kv head": Case(LLAMA_ONE_KV, {"tp": 2, "micro_batch": 6}),
    "tp4 of 2 kv heads": llama(tp=4, micro_batch=12),
    "tp4 sp of 2 kv heads": llama(tp=4, sequence_parallel=True, micro_batch=12),
    "pp2 1f1b, 12 microbatches": llama(pp=2, micro_batch=1),
    "pp2 gpipe, one microbatch": llama(pp=2, schedule="gpipe", micro_batch=12),
    "pp4 uneven": llama(pp=4, cuts=(1, 2, 4), recompute=(0, 1, 1, 0)),
    "pp3, embedding alone": llama(pp=3, cuts=(0, 2)),
    "pp2 zbv, head alone": llama(pp=2, schedule="zbv", virtual_stages=2, cuts=(1, 3, 4)),
    "dp3 zero1, uneven shards": llama(dp=3, zero=1),
    "dp4 zero2": llama(dp=4, zero=2, micro_batch=1),
    "cp4 ring zero3": llama(cp=4, cp_style="ring", zero=3, micro_batch=6),
    "gpt2 cp4 all-to-all zero2": gpt2(cp=4, cp_style="all-to-all", zero=2, micro_batch=6),
    "gpt2 tp2 sp pp2": gpt2(tp=2, pp=2, sequence_parallel=True, micro_batch=6),
}
GENERATED = {str(setting): setting for setting in pairwise_settings()}
PLANS = {name: case.plan() for name, case in CASES.items()} | {name: case.plan() for name, case in GENERATED.items()}


def test_every_pair_of_settings_that_is_trained_is_tried() -> None:
    tried = {pair for setting in GENERATED.values() for pair in setting.pairs}
    assert tried == {pair for setting in legal_settings() for pair in setting.pairs}
    assert len(GENERATED) >= 30
    schedules = {plan.layout.schedule for plan in PLANS.values() if plan.layout.pp > 1}
    assert schedules == set(SCHEDULES)


@pytest.mark.parametrize("name", [*CASES, *every(7, GENERATED)])
def test_loss_and_norm_do_not_depend_on_the_layout(name: str) -> None:
    require_the_layout_changes_nothing(PLANS[name])


@pytest.mark.parametrize(
    "case",
    [
        llama(pp=2, dp=2, zero=1),
        llama(tp=2, dp=2, sequence_parallel=True, zero=3, micro_batch=3),
        gpt2(pp=2, tp=2, micro_batch=6),
    ],
    ids=["pp2 dp2 zero1", "tp2 sp dp2 zero3", "gpt2 tp2 pp2"],
)
def test_clipping_follows_the_norm_of_the_whole_model(case: Case) -> None:
    plan, limit = case.plan(), 0.05
    expected = run_plain(Case(plan.model, {"micro_batch": 2}).plan(), 4, torch.float64, limit)
    clipped = run_ranks(run_plan, plan.layout.world_size, plan, 4, torch.float64, limit)[0]
    assert min(expected.norms) > limit
    assert clipped.norms == pytest.approx(expected.norms, rel=1e-6)  # torch adds 1e-6 to the norm it divides by
    assert clipped.losses == pytest.approx(expected.losses, rel=1e-6)
    # AdamW hardly sees a factor on all gradients, so they are looked at themselves.
    assert clipped.clipped_norms == pytest.approx([limit] * 4, rel=1e-6)
    assert expected.clipped_norms == pytest.approx([limit] * 4, rel=1e-4)
