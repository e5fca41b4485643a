"""Training in 16 bits stays near float32, under every way of sharding that runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime.loss_scale import LossScaling
from runtime.mesh import build_mesh
from runtime.mixed_precision import HALVES
from runtime.parallelize import build_chunks
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import Trajectory, run_plain, run_plan
from tests.plans import make_plan, tiny_llama
from tests.thinned import every

STEPS = 6
# Of loss and norm, relative: fp16 has three bits more of each number.
TOLERANCES = {"bf16": (2e-3, 2e-2), "fp16": (2.5e-4, 2.5e-3)}


def plan_in(precision: str, **layout: Any) -> Plan:
    job = TrainingJob(global_batch=8, sequence=16, precision=precision)
    sharded = {"dp_shard": layout["dp"]} if layout.get("zero") else {}
    return make_plan(tiny_llama(), Layout(**{"micro_batch": 2}, **layout, **sharded), job)


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


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp": 2},
    {"dp": 2, "zero": 1},
    {"dp": 2, "zero": 3},
    {"tp": 2},
    {"pp": 2},
    {"pp": 2, "dp": 2, "zero": 1},
]


def scaled_run(plan: Plan) -> Trajectory:
    scaling = LossScaling(initial=2.0**16) if plan.job.precision == "fp16" else None
    return run_plan(plan, STEPS, torch.float32, scaling=scaling)


@pytest.mark.parametrize(
    ("precision", "layout"),
    [*(("bf16", layout) for layout in LAYOUTS), *every(4, (("fp16", layout) for layout in LAYOUTS), first=2)],
    ids=str,
)
def test_16_bits_train_near_fp32(precision: str, layout: dict[str, Any]) -> None:
    plan = plan_in(precision, **layout)
    of_loss, of_norm = TOLERANCES[precision]
    exact = run_plain(plan_in(precision), STEPS, torch.float32)
    rounded = run_ranks(scaled_run, plan.layout.world_size, plan)[0]
    assert rounded.losses == pytest.approx(exact.losses, rel=of_loss)
    assert rounded.norms == pytest.approx(exact.norms, rel=of_norm)
    assert rounded.losses != pytest.approx(exact.losses, rel=1e-6)  # it did run in 16 bits


@pytest.mark.parametrize(("precision", "layout"), [("bf16", {}), ("bf16", {"dp": 2, "zero": 3}), ("fp16", {"dp": 2})])
def test_parameters_rest_in_fp32_and_compute_in_16_bits(precision: str, layout: dict[str, Any]) -> None:
    plan = plan_in(precision, **layout)
    assert run_ranks(dtypes, plan.layout.world_size, plan)[0] == ({torch.float32}, HALVES[precision])
