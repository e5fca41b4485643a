"""bfloat16 training stays near float32, under every way of sharding that runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime.mesh import build_mesh
from runtime.parallelize import build_chunks
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import run_plain, run_plan
from tests.plans import make_plan, tiny_llama

JOB = TrainingJob(global_batch=8, sequence=16, precision="bf16")
STEPS = 6


def bf16_plan(**layout: Any) -> Plan:
    sharded = {"dp_shard": layout["dp"]} if layout.get("zero") else {}
    return make_plan(tiny_llama(), Layout(**{"micro_batch": 2}, **layout, **sharded), JOB)


def dtypes(plan: Plan) -> tuple[set[torch.dtype], torch.dtype]:
    """Of the parameters between steps, and of what the embedding gives."""
    mesh = build_mesh(plan.layout, "cpu", tied_embeddings=False)
    (chunk,) = build_chunks(plan, mesh, torch.device("cpu"), dtype=torch.float32, seed=0)
    seen: list[torch.dtype] = []
    chunk.blocks["0"].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
    chunk(torch.zeros(1, 16, dtype=torch.int64))
    for module in chunk.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
    return {parameter.dtype for parameter in chunk.parameters()}, seen[0]


@pytest.mark.parametrize(
    "layout",
    [{}, {"dp": 2}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}, {"pp": 2, "dp": 2, "zero": 1}],
    ids=str,
)
def test_bf16_trains_near_fp32(layout: dict[str, Any]) -> None:
    plan = bf16_plan(**layout)
    single = bf16_plan()
    exact = run_plain(single, STEPS, torch.float32)
    rounded = run_ranks(run_plan, plan.layout.world_size, plan, STEPS, torch.float32)[0]
    assert rounded.losses == pytest.approx(exact.losses, rel=2e-3)
    assert rounded.norms == pytest.approx(exact.norms, rel=2e-2)
    assert rounded.losses != pytest.approx(exact.losses, rel=1e-6)  # it did run in bfloat16


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "zero": 3}], ids=str)
def test_parameters_rest_in_fp32_and_compute_in_bf16(layout: dict[str, Any]) -> None:
    plan = bf16_plan(**layout)
    assert run_ranks(dtypes, plan.layout.world_size, plan)[0] == ({torch.float32}, torch.bfloat16)
