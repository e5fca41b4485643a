"""What a plan says of single stages runs so, and changes no loss: which layers recompute, which free their weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime.mesh import build_mesh
from runtime.parallelize import shape_chunks
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import Trajectory, run_plain, run_plan
from tests.plans import DEEPSEEK_EXPERTS, make_plan, tiny_llama, tiny_shared_experts

STEPS = 3
JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")


def recomputing_blocks(plan: Plan) -> list[int]:
    """Those of this rank that are wrapped."""
    mesh = build_mesh(plan.layout, "cpu", tied_embeddings=False, experts=plan.model.experts is not None)
    chunks = shape_chunks(plan, mesh, dtype=torch.float32)
    return [int(n) for chunk in chunks for n, b in chunk.blocks.items() if isinstance(b, CheckpointWrapper)]


def run_and_look(plan: Plan) -> tuple[Trajectory, list[int]]:
    return run_plan(plan, STEPS, torch.float64), recomputing_blocks(plan)


def test_the_kind_of_layers_that_was_priced_recomputes() -> None:
    model = tiny_shared_experts(layers=5, experts=replace(DEEPSEEK_EXPERTS, dense_layers=2))
    plan = make_plan(model, Layout(pp=2, micro_batch=2), JOB, [4], [1, 0])
    first = replace(plan.stages[0], recompute_spans=(("full", 2, 3),))
    plan = replace(plan, stages=(first, plan.stages[1]))
    expected = run_plain(plan, STEPS, torch.float64)
    (trajectory, wrapped), (_, none) = run_ranks(run_and_look, 2, plan)
    assert (wrapped, none) == ([2], [])
    assert trajectory.losses == pytest.approx(expected.losses, rel=1e-9)
    assert trajectory.norms == pytest.approx(expected.norms, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "choices", "recompute"), [("1f1b", (True, None), [1, 0]), ("gpipe", (False, True), [0, 2])]
)
def test_no_loss_depends_on_what_stages_do_with_weights(
    schedule: str, choices: tuple[bool | None, ...], recompute: list[int]
) -> None:
    layout = Layout(pp=2, dp=2, dp_shard=2, zero=3, schedule=schedule, micro_batch=1)
    plan = make_plan(tiny_llama(), layout, JOB, None, recompute)
    stages = tuple(replace(stage, reshard=choice) for stage, choice in zip(plan.stages, choices, strict=True))
    expected = run_plain(plan, STEPS, torch.float64)
    for trajectory in run_ranks(run_plan, 4, replace(plan, stages=stages), STEPS, torch.float64)[::3]:
        assert trajectory.losses == pytest.approx(expected.losses, rel=1e-9)
        assert trajectory.norms == pytest.approx(expected.norms, rel=1e-9)
