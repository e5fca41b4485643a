"""Losses and gradients that are not finite: no rank updates, and a run that has only those ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime import not_finite
from runtime.checkpoint_folder import complete_steps
from runtime.metrics import only_finite
from runtime.packed_rows import NO_DOCUMENTS
from runtime.parameters import parameters_of
from runtime.step import build_state, training_step
from runtime.trainer import TrainOptions
from tests.distributed.faults import (
    small_plan,
    spoil_weights_of_rank_one,
)
from tests.distributed.harness import run_ranks
from tests.distributed.test_faults import PATIENCE_SECONDS, fail, records
from tests.plans import make_plan, tiny_llama


def poison_a_step(plan: Plan, poisoned_rank: int) -> tuple[list[bool], bool, float, float]:
    """Five steps, the third with a spoilt activation on one rank: (which were finite, whether the third left
    everything as it was, the count of updates, the last loss)."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.1)
    samples = torch.arange(plan.job.global_batch // plan.layout.dp * 17).reshape(-1, 17) % plan.model.vocab_size
    finite, kept, loss = [], False, math.nan
    for step in range(1, 6):
        if step == 3 and dist.get_rank() == poisoned_rank:
            block = next(iter(state.chunks[0].blocks.values()))
            block.register_forward_hook(lambda *_: _[2] * math.nan)
            before_hook = list(block._forward_hooks)[-1]
        before = snapshot(state) if step == 3 else []
        result = training_step(
            state, samples[:, :-1].contiguous(), samples[:, 1:].contiguous(), learning_rate=1e-2, clip_norm=1.0
        )
        finite.append(result.finite)
        loss = result.loss
        if step == 3:
            kept = all(torch.equal(old, new) for old, new in zip(before, snapshot(state), strict=True))
            if dist.get_rank() == poisoned_rank:
                del block._forward_hooks[before_hook]
    updates = max(float(moments["step"]) for moments in state.optimizer.state.values())
    return finite, kept, updates, loss


def snapshot(state: Any) -> list[torch.Tensor]:
    """Copies of this rank's weights, moments and counts of updates."""
    parameters = parameters_of(state.chunks)
    tensors = [*parameters, *(value for p in parameters for value in state.optimizer.state[p].values())]
    return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in tensors]


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        ({}, 0),
        ({"dp": 2}, 1),
        ({"dp": 2, "zero": 3, "dp_shard": 2}, 0),
        ({"tp": 2, "sequence_parallel": True}, 1),
        ({"pp": 2, "micro_batch": 2}, 0),
        ({"pp": 2, "micro_batch": 2}, 1),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(layout: dict[str, Any], rank: int) -> None:
    job = TrainingJob(global_batch=8, sequence=16, precision="fp32")
    plan = make_plan(tiny_llama(), Layout(**{"micro_batch": 1, **layout}), job)
    results = run_ranks(poison_a_step, plan.layout.world_size, plan, rank, timeout_seconds=PATIENCE_SECONDS)
    for finite, kept, updates, loss in results:
        assert finite == [True, True, False, True, True]
        assert kept
        assert updates == 4
        assert loss < 4.2  # ln 61 is 4.11: training goes on from where it was


def test_spoilt_weights_end_the_run_and_are_not_saved(tmp_path: Path) -> None:
    options = TrainOptions(run_dir=tmp_path, checkpoint_every=1)
    error = fail(small_plan(pp=2), options, spoil_weights_of_rank_one)
    assert str(error) == (
        "rank 1 (pipeline stage 1) made 3 steps in a row not finite, up to step 5: the first values that are not "
        "finite come out of block 1, whose weights are not finite either. None of them changed the weights; the last "
        "complete checkpoint is step_2"
    )
    seen = records(tmp_path)
    assert [record["skipped"] for record in seen] == [False, False, True, True, True]
    assert [record["loss"] is None for record in seen] == [False, False, True, True, True]
    assert sorted(complete_steps(tmp_path)) == [1, 2]


def spoil(plan: Plan, rank: int, where: str) -> tuple[int, int, str]:
    """(rank, stage, how) of the error after a step that is spoilt on one rank in the backward pass alone (of its own
    weights, or from the last stage on), or in a forward pass that goes well the second time."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.1)
    samples = torch.arange(plan.job.global_batch * 17).reshape(-1, 17) % plan.model.vocab_size
    inputs, targets = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
    spoilt: list[Any] = []
    if dist.get_rank() == rank:
        block, *_, last = state.chunks[0].blocks.values()
        if where == "weights":
            spoilt.append(next(block.parameters()).register_hook(lambda gradient: gradient * math.inf))
        elif where == "backward":
            spoilt.append(last.register_full_backward_hook(lambda _, before, __: (before[0] * math.nan,)))
        else:
            spoilt.append(block.register_forward_hook(lambda *call: call[2] * math.nan))
    result = training_step(state, inputs, targets, learning_rate=1e-2, clip_norm=1.0)
    if where == "forward":
        for hook in spoilt:
            hook.remove()
    error = not_finite.failure(
        state, inputs, targets, NO_DOCUMENTS, result, plan.layout, Path("none"), step=9, in_a_row=2
    )
    return error.rank, error.stage, error.how


@pytest.mark.parametrize(
    ("rank", "where", "blamed", "what"),
    [
        (0, "weights", 0, "losses are finite, its gradients are not"),
        (1, "backward", 1, "losses are finite, its gradients are not"),
        (0, "forward", 1, "its loss was not finite, but is when the same samples run once more"),
    ],
)
def test_where_it_began_is_named_beside_what_it_spoilt(rank: int, where: str, blamed: int, what: str) -> None:
    job = TrainingJob(global_batch=8, sequence=16, precision="fp32")
    plan = make_plan(tiny_llama(), Layout(pp=2, micro_batch=2), job)
    expected = f"made 2 steps in a row not finite, up to step 9: {what}. None of them changed the weights; there is no"
    for found in run_ranks(spoil, 2, plan, rank, where, timeout_seconds=PATIENCE_SECONDS):
        assert found == (blamed, blamed, f"{expected} complete checkpoint")


def test_of_ranks_that_hold_one_layer_the_one_with_spoilt_weights_is_named() -> None:
    findings = [not_finite.Finding(3, True, 0), not_finite.Finding(3, False, 1), not_finite.Finding(4, False, 2)]
    assert min(findings).rank == 1


def test_a_record_has_no_number_that_json_lacks() -> None:
    assert only_finite({"loss": math.nan, "grad_norm": math.inf, "step": 3, "skipped": True, "mfu": None}) == {
        "loss": None,
        "grad_norm": None,
        "step": 3,
        "skipped": True,
        "mfu": None,
    }
