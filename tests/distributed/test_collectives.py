"""How many collectives a block and a step take, which the cost model counts on, and where their seconds are booked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.model import ModelSpec
from runtime.clock import Clock
from runtime.gradients import complete_gradients
from runtime.measure import OperationTimer
from runtime.mesh import build_mesh
from runtime.parallelize import build_chunks
from runtime.pipeline import build_runner
from runtime.step import mesh_of
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of
from tests.plans import make_plan, tiny_experts, tiny_gpt2, tiny_llama

JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
Counts = dict[str, int]


def plan_of(
    model: ModelSpec, recompute: tuple[int, ...] | None = None, reshard: bool | None = None, **layout: Any
) -> Plan:
    sharded = {"dp_shard": layout["dp"]} if layout.get("zero") else {}
    plan = make_plan(model, Layout(**layout, **sharded), JOB, recompute=recompute)
    return replace(plan, stages=tuple(replace(stage, reshard=reshard) for stage in plan.stages))


def block_counts(plan: Plan) -> tuple[Counts, Counts]:
    """Collectives of the forward and of the backward pass of one block."""
    device = torch.device("cpu")
    mesh = build_mesh(plan.layout, "cpu", tied_embeddings=False)
    (chunk,) = build_chunks(plan, mesh, device, dtype=torch.float32, seed=0)
    layout = plan.layout
    sequence = JOB.sequence // layout.tp if layout.sequence_parallel else JOB.sequence
    x = torch.randn(layout.micro_batch, sequence, plan.model.hidden_size, requires_grad=True)
    with OperationTimer(mesh, Clock(device)) as forward:
        y = chunk.blocks["1"](x)
    with OperationTimer(mesh, Clock(device)) as backward:
        y.sum().backward()
    return forward.counts, backward.counts


AR, AG, RS = "tp:all_reduce", "tp:all_gather_into_tensor", "tp:reduce_scatter_tensor"


@pytest.mark.parametrize(
    ("plan", "forward", "backward"),
    [
        (plan_of(tiny_llama(), tp=2), {AR: 2}, {AR: 2}),
        (plan_of(tiny_llama(), tp=2, sequence_parallel=True), {AG: 2, RS: 2}, {AG: 2, RS: 2}),
        (plan_of(tiny_llama(kv_heads=1), tp=2), {AR: 2}, {AR: 2}),
        (plan_of(tiny_gpt2(), tp=2), {AR: 2}, {AR: 2}),
        (plan_of(tiny_gpt2(), tp=2, sequence_parallel=True), {AG: 2, RS: 2}, {AG: 2, RS: 2}),
        # A second forward ends before the last sum: what feeds it is the last thing the backward pass needs.
        (plan_of(tiny_llama(), recompute=(4,), tp=2), {AR: 2}, {AR: 3}),
        (plan_of(tiny_llama(), recompute=(4,), tp=2, sequence_parallel=True), {AG: 2, RS: 2}, {AG: 4, RS: 3}),
    ],
    ids=["llama", "llama sp", "llama 1 kv head", "gpt2", "gpt2 sp", "recompute", "recompute sp"],
)
def test_tensor_parallel_collectives_of_a_block(plan: Plan, forward: Counts, backward: Counts) -> None:
    for counts in run_ranks(block_counts, plan.layout.world_size, plan):
        assert counts == (forward, backward)


def step_counts(plan: Plan) -> tuple[Counts, dict[str, float]]:
    """Collectives of the second step, and the seconds booked."""
    device = torch.device("cpu")
    mesh = mesh_of(plan, device)
    chunks = build_chunks(plan, mesh, device, dtype=torch.float32, seed=0)
    runner = build_runner(plan, chunks, mesh, device, torch.float32)
    tokens = own_samples(plan, tokens_of(plan, 0), mesh.coordinate.dp)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    runner.step(inputs, targets)
    runner.clock.read()
    with OperationTimer(mesh, runner.clock) as timer:
        runner.step(inputs, targets)
        complete_gradients(chunks, mesh)
    return timer.counts, runner.clock.read()


GATHER, SCATTER, REDUCE = "dp:_allgather_base_", "dp:_reduce_scatter_base_", "dp:allreduce_"
GROUPS = 5  # four blocks and the root


M = 4  # microbatches
BLOCKS = GROUPS - 1


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"dp": 2, "zero": 0}, {REDUCE: 1}),
        ({"dp": 2, "zero": 1}, {GATHER: GROUPS, SCATTER: GROUPS}),
        ({"dp": 2, "zero": 2}, {GATHER: GROUPS, SCATTER: M * GROUPS}),
        # The blocks for forward and again for backward, the root once for both.
        ({"dp": 2, "zero": 3}, {GATHER: M * (2 * BLOCKS + 1), SCATTER: M * GROUPS}),
        # Half of the blocks on each stage.
        ({"dp": 2, "pp": 2, "zero": 0}, {REDUCE: 1}),
        ({"dp": 2, "pp": 2, "zero": 1}, {GATHER: BLOCKS // 2 + 1, SCATTER: BLOCKS // 2 + 1}),
        # Stages that keep theirs, and those that free them after forward and backward.
        ({"dp": 2, "pp": 2, "zero": 3, "reshard": False}, {GATHER: BLOCKS // 2 + 1, SCATTER: BLOCKS // 2 + 1}),
        ({"dp": 2, "pp": 2, "zero": 3, "reshard": True}, {GATHER: 2 * M * BLOCKS // 2 + 1, SCATTER: BLOCKS // 2 + 1}),
        # After the first backward torch's pipeline keeps parameters until the next forward frees them.
        ({"dp": 2, "pp": 2, "zero": 3}, {GATHER: (M + 1) * BLOCKS // 2 + 1, SCATTER: BLOCKS // 2 + 1}),
        ({"dp": 2, "pp": 2, "zero": 3, "schedule": "gpipe"}, {GATHER: (M + 1) * BLOCKS // 2 + 1, SCATTER: 3}),
    ],
    ids=str,
)
def test_data_parallel_collectives_of_a_step(layout: dict[str, Any], expected: Counts) -> None:
    plan = plan_of(tiny_llama(), micro_batch=1, **layout)
    for counts, seconds in run_ranks(step_counts, plan.layout.world_size, plan):
        assert counts == expected
        assert 0 < seconds["communication_dp"] < seconds["schedule"]
        assert "communication_tp" not in seconds


def test_tp_seconds_are_booked_on_tp() -> None:
    plan = plan_of(tiny_llama(), tp=2, sequence_parallel=True, micro_batch=4)
    for counts, seconds in run_ranks(step_counts, 2, plan):
        # Two microbatches of 4 blocks, embedding and head; for the loss a sum of exponentials a token is gathered.
        assert counts[AG] == 2 * (4 * 4 + 1 + 1 + 1)
        assert counts[RS] == 2 * (4 * 4 + 1 + 1)
        assert AR not in counts
        assert counts["tp:allreduce_"] == 1  # all norm gradients in one message
        assert 0 < seconds["communication_tp"] < seconds["schedule"] + 1.0
        assert "communication_dp" not in seconds


@pytest.mark.parametrize("ep", [1, 2])
def test_seconds_of_experts_are_booked_on_ep(ep: int) -> None:
    """One group of both ranks may be that of tp, of ep and of the experts' dp."""
    plan = plan_of(tiny_experts(), tp=2, ep=ep, sequence_parallel=True, micro_batch=4)
    for counts, seconds in run_ranks(step_counts, 2, plan):
        # Two microbatches of 4 blocks: counts, rows there and back, and backward rows there and back.
        assert counts.get("ep:all_to_all_single", 0) == (ep - 1) * 2 * 4 * 5
        assert counts[AG] > 0
        assert ("communication_ep" in seconds) == (ep > 1)
        assert ("communication_dp" in seconds) == (ep == 1)  # then both ranks hold all experts, and sum their gradients
