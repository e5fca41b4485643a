"""Modules of other packages: a Llama of transformers and a vision transformer, in parallel as on one rank."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.traced_model import TracedModel
from runtime.data.token_source import own_rows
from runtime.foreign.foreign_loop import run_module_plain
from runtime.foreign.module_contract import Samples, contract_of
from runtime.foreign.module_factory import make_on_meta
from runtime.foreign.trace_module import trace
from runtime.step import build_state, training_step
from tests.distributed.harness import run_ranks
from tests.plans import make_plan

STEPS = {torch.float64: 10, torch.float32: 10}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative
IN_BF16 = 0.02
BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 8, 1e-3, 0.1, 7
LLAMA, VIT, TIED = (f"tests.module_factories:{name}" for name in ("tiny_hf_llama", "tiny_vit", "tied_hf_llama"))
SEQUENCE = {LLAMA: 16, VIT: 17, TIED: 16}
Figures = tuple[list[float], list[float]]


@cache
def traced(factory: str) -> TracedModel:
    return trace(factory, SEQUENCE[factory])


def plan_of(
    factory: str,
    cuts: tuple[int, ...] | None = None,
    recompute: tuple[int, ...] | None = None,
    precision: str = "fp32",
    **layout: Any,
) -> Plan:
    settings = {"micro_batch": 2} | layout
    if settings.get("zero"):
        settings.setdefault("dp_shard", settings.get("dp", 1))
    job = TrainingJob(global_batch=BATCH, sequence=SEQUENCE[factory], precision=precision)
    return make_plan(traced(factory), Layout(**settings), job, cuts, recompute)


def samples_of(factory: str, step: int) -> Samples:
    """(inputs, target) of a whole step, the same whatever the layout."""
    made = contract_of(make_on_meta(factory), factory).example_batch
    if made is not None:
        return made(BATCH, 0, step)
    ids = torch.randint(0, 61, (BATCH, SEQUENCE[factory] + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train(plan: Plan, factory: str, steps: int, dtype: torch.dtype) -> Figures:
    """Losses and gradient norms of a rank."""
    state = build_state(plan, torch.device("cpu"), dtype=dtype, seed=SEED, weight_decay=WEIGHT_DECAY)
    rows = own_rows(BATCH, plan.layout, state.mesh.coordinate.dp)
    losses, norms = [], []
    for step in range(1, steps + 1):
        inputs, target = (tensor[rows] for tensor in samples_of(factory, step))
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        result = training_step(state, inputs, target, learning_rate=LEARNING_RATE, clip_norm=None)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


def train_all(plans: dict[str, tuple[str, Plan]], dtypes: dict[torch.dtype, int]) -> dict[str, Any]:
    return {
        name: {dtype: train(plan, factory, steps, dtype) for dtype, steps in dtypes.items()}
        for name, (factory, plan) in plans.items()
    }


@cache
def plain(factory: str, steps: int, dtype: torch.dtype) -> Figures:
    found = run_module_plain(
        traced(factory),
        (samples_of(factory, step) for step in range(1, steps + 1)),
        dtype=dtype,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        seed=SEED,
    )
    return found.losses, found.norms


def check(plans: dict[str, tuple[str, Plan]], dtypes: dict[torch.dtype, int]) -> None:
    """Every rank has the plain loop's losses and norms, which are not all alike."""
    world = next(iter(plans.values()))[1].layout.world_size
    wrong = []
    for rank, found in enumerate(run_ranks(train_all, world, plans, dtypes, timeout_seconds=300.0)):
        for name, (factory, plan) in plans.items():
            for dtype, steps in dtypes.items():
                for quantity, got, expected in zip(
                    ("loss", "norm"), found[name][dtype], plain(factory, steps, dtype), strict=True
                ):
                    assert len(set(expected)) == steps
                    worst = max(abs(a - b) / b for a, b in zip(got, expected, strict=True))
                    if worst > (TOLERANCE[dtype] if plan.job.precision == "fp32" else IN_BF16):
                        wrong.append(f"rank {rank}, {name}: {quantity} in {dtype} differs by {worst:.2e}")
    assert not wrong, "\n".join(wrong)


PP_DP = {"pp": 2, "dp": 2}
FOUR_RANKS = {
    "llama pp2·dp2 1f1b": (LLAMA, PP_DP),
    "llama pp2·dp2 gpipe zero1 recompute": (LLAMA, PP_DP | {"schedule": "gpipe", "zero": 1, "recompute": (1, 2)}),
    "vit pp2·v2·dp2 zero3": (VIT, PP_DP | {"schedule": "interleaved-1f1b", "virtual_stages": 2, "zero": 3}),
    "llama bf16 pp2·dp2": (LLAMA, PP_DP | {"precision": "bf16"}),
    "vit bf16 pp2·dp2 zero1": (VIT, PP_DP | {"precision": "bf16", "zero": 1}),
    "llama tp2·dp2 zero2": (LLAMA, {"tp": 2, "dp": 2, "zero": 2}),
    "vit tp2·pp2": (VIT, {"tp": 2, "pp": 2}),
    "tied llama pp2·dp2 zero1": (TIED, PP_DP | {"zero": 1}),
}


def test_loss_and_norm_are_those_of_one_rank() -> None:
    plans = {name: (factory, plan_of(factory, **layout)) for name, (factory, layout) in FOUR_RANKS.items()}
    check(plans, {torch.float64: 3, torch.float32: 3})


def test_from_a_factory_to_steps_of_a_pipeline_that_equal_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cli.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    file = str(tmp_path / "plan.yaml")
    job = ("--cluster", "dgx-h100:1", "--devices", "4", "--precision", "fp32", "--global-batch", "8", "--seq", "17")
    run("plan", "--model", VIT, *job, "--pin", "pp=2", "--pin", "dp=2", "--pin", "schedule=1f1b", "-o", file)
    found = json.loads(run("verify", file, "--json"))
    assert found["holds"]
    assert found["model"]["factory"] == VIT
    assert (found["layout"]["pp"], found["layout"]["dp"], found["layout"]["schedule"]) == (2, 2, "1f1b")
    assert {check["precision"]: check["tolerance"] for check in found["checks"]} == {"fp32": 1e-5, "float64": 1e-9}


MORE = {
    "tied llama pp4": (TIED, {"pp": 4, "cuts": (0, 2, 4)}),
    "tied llama dp4 zero2": (TIED, {"dp": 4, "zero": 2}),
    "vit pp2·dp2 1f1b zero1": (VIT, PP_DP | {"zero": 1}),
    "vit ends alone": (VIT, {"pp": 4, "cuts": (0, 2, 4)}),
    "llama ends alone": (LLAMA, {"pp": 4, "cuts": (0, 2, 4), "recompute": (0, 1, 1, 0)}),
    "llama looped-bfs": (LLAMA, PP_DP | {"schedule": "looped-bfs", "virtual_stages": 2, "zero": 1}),
    "llama interleaved": (
        LLAMA,
        PP_DP | {"schedule": "interleaved-1f1b", "virtual_stages": 3, "cuts": (0, 1, 2, 3, 4)},
    ),
    "llama pp2·dp2 zero3": (LLAMA, PP_DP | {"zero": 3, "recompute": (2, 0)}),
    "llama tp2·pp2": (LLAMA, {"tp": 2, "pp": 2}),
    "llama tp2·dp2": (LLAMA, {"tp": 2, "dp": 2}),
    "llama dp4 zero0": (LLAMA, {"dp": 4}),
    "llama dp4 zero1": (LLAMA, {"dp": 4, "zero": 1}),
    "llama dp4 zero2": (LLAMA, {"dp": 4, "zero": 2, "micro_batch": 1}),
    "llama dp4 zero3 recompute": (LLAMA, {"dp": 4, "zero": 3, "recompute": (4,)}),
    "vit dp4 hsdp": (VIT, {"dp": 4, "zero": 2, "dp_shard": 2, "micro_batch": 1}),
}


@pytest.mark.full
def test_ten_steps_of_many_layouts() -> None:
    cases = FOUR_RANKS | MORE
    check({name: (factory, plan_of(factory, **layout)) for name, (factory, layout) in cases.items()}, STEPS)
