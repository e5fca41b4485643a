"""An evaluation gives the loss that training sees, under every schedule, and training goes on after it."""

from __future__ import annotations

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import SCHEDULES, Layout
from planner.plan import Plan
from runtime.step import build_state, sum_over_ranks, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of
from tests.plans import make_plan, tiny_llama

JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
ONE_CHUNK = ("gpipe", "1f1b")


def losses_of(plans: dict[str, Plan], first: int) -> dict[str, list[float]]:
    """Of each plan, with weights that do not move: the loss of so many evaluations `first`, of a step, of two more
    evaluations, and of one more step."""
    found = {}
    for name, plan in plans.items():
        state = build_state(plan, torch.device("cpu"), dtype=torch.float64, seed=0, weight_decay=0.0)
        tokens = own_samples(plan, tokens_of(plan, 0), state.mesh.coordinate.dp)
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        unmoved = [sum_over_ranks(state.runner.evaluate(*batch)) for _ in range(first)]
        before = training_step(state, *batch, learning_rate=0.0, clip_norm=None).loss
        evaluated = [sum_over_ranks(state.runner.evaluate(*batch)) for _ in range(2)]
        after = training_step(state, *batch, learning_rate=0.0, clip_norm=None).loss
        found[name] = [*unmoved, before, *evaluated, after]
    return found


@pytest.mark.parametrize("first", [0, 1])
def test_an_evaluation_gives_the_loss_of_training(first: int) -> None:
    plans = {
        name: make_plan(
            tiny_llama(),
            Layout(pp=2, schedule=name, virtual_stages=1 if name in ONE_CHUNK else 2, micro_batch=2),
            JOB,
        )
        for name in SCHEDULES
    }
    for found in run_ranks(losses_of, 2, plans, first):
        for name, losses in found.items():
            assert losses == pytest.approx([losses[0]] * (4 + first), rel=1e-12), name
            assert losses[0] > 1.0
