"""The planner's table of capabilities and the runtime agree: legal layouts train, forbidden ones are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from planner import plan as plan_file
from planner.layout import Layout
from planner.rules import RuleContext, violations
from profiles.input_error import InputError
from tests.distributed import pairwise
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import run_plain, run_plan
from tests.plans import make_plan
from tests.thinned import FULL, examples

RANKS = pairwise.MOST_RANKS if FULL else 4
TRAINED = [setting for setting in pairwise.legal_settings() if setting.layout().world_size <= RANKS]
ALL = list(pairwise.settings())
PLAIN_LOSS = {
    name: run_plain(make_plan(model, Layout(), pairwise.JOB), 1, torch.float32).losses[0]
    for name, model in pairwise.MODELS.items()
}


@examples(8, 12)
@given(st.sampled_from(TRAINED))
def test_every_layout_that_is_legal_trains_a_step(setting: pairwise.Setting) -> None:
    plan = setting.plan()
    ranks = run_ranks(run_plan, plan.layout.world_size, plan, 1, torch.float32)
    for trajectory in ranks:
        assert trajectory.losses[0] == pytest.approx(PLAIN_LOSS[str(setting["model"])], rel=1e-5)


@examples(6, 20)
@given(st.sampled_from(TRAINED), st.sampled_from(("bf16", "fp16")), st.sampled_from((1, 2, 4)))
def test_so_does_every_one_in_16_bits_whatever_its_microbatches(
    setting: pairwise.Setting, precision: str, microbatches: int
) -> None:
    plan, dp = setting.plan(), setting.layout().dp
    layout = replace(plan.layout, micro_batch=max(1, pairwise.JOB.global_batch // dp // microbatches))
    job = replace(pairwise.JOB, precision=precision)
    assume(not violations(layout, RuleContext(plan.model, job, layout.world_size)))
    plan = replace(plan, layout=layout, job=job)
    for trajectory in run_ranks(run_plan, layout.world_size, plan, 1, torch.float32):
        assert trajectory.losses[0] == pytest.approx(PLAIN_LOSS[str(setting["model"])], rel=1e-2)


@examples(100, 10)
@given(st.sampled_from(ALL).filter(pairwise.refusals))
def test_every_layout_that_is_forbidden_is_refused_when_its_plan_is_read(
    tmp_path: Path, setting: pairwise.Setting
) -> None:
    path, plan = tmp_path / "plan.yaml", setting.plan()
    assume(all(stage.first <= stage.end for stage in plan.stages))  # more stages than layers have no plan at all
    plan_file.save(plan, path)
    with pytest.raises(InputError) as caught:
        plan_file.load(path)
    reason = pairwise.refusals(setting)[0]
    assert reason in caught.value.got or reason in caught.value.expected


@pytest.mark.parametrize(
    "reason",
    ["zero=2 with pp > 1", "zero=3 with zbv", "recompute=full with zb1p", "recompute=selective with dualpipev"],
)
def test_what_torch_runs_wrongly_is_among_the_forbidden(reason: str) -> None:
    assert any(refusal.startswith(reason) for setting in ALL for refusal in pairwise.refusals(setting))
