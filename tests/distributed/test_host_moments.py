"""Moments that lie apart from their device, of sharded parameters: the same steps, and checkpoints that hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime import checkpoint
from runtime.host_moments import OffloadedAdamW
from runtime.step import build_state, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of
from tests.plans import make_plan, tiny_llama

JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")


def losses(plan: Plan, folder: Path | None, resume: bool) -> list[float]:
    """Three steps; `folder` gets a checkpoint after the first, or with `resume` is where they go on from."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float64, seed=0, weight_decay=0.1)
    assert isinstance(state.optimizer, OffloadedAdamW) == (plan.job.offload == "optimizer")
    first = 0
    if resume:
        assert folder is not None
        first = checkpoint.load(folder / "checkpoints" / "step_1", state.chunks, state.optimizer)
    found = []
    for step in range(first, 3):
        tokens = own_samples(plan, tokens_of(plan, step), state.mesh.coordinate.dp)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        found.append(training_step(state, inputs, targets, learning_rate=1e-3, clip_norm=1.0).loss)
        if step == 0 and folder is not None and not resume:
            checkpoint.save(folder, 1, state.chunks, state.optimizer, "")
    return found


def test_offloaded_moments_train_alike_and_outlive_a_checkpoint(tmp_path: Path) -> None:
    plan = make_plan(tiny_llama(), Layout(dp=2, dp_shard=2, zero=1, micro_batch=2), JOB)
    away = replace(plan, job=replace(JOB, offload="optimizer"))
    expected = run_ranks(losses, 2, plan, None, False)[0]
    assert run_ranks(losses, 2, away, tmp_path, False)[0] == expected
    # Read by a run whose moments lie where they do, and by one whose moments do not.
    for reader in (away, plan):
        assert run_ranks(losses, 2, reader, tmp_path, True)[0] == expected[1:]
