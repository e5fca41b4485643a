"""The loss scale: Megatron-LM's rules, the same numbers, and a step that overflows on one rank, left out on all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from planner.job import TrainingJob
from planner.layout import SCHEDULES, Layout
from planner.plan import Plan
from profiles.input_error import InputError
from profiles.model import ModelSpec
from runtime import checkpoint
from runtime.checkpoint import moments_of
from runtime.checkpoint_folder import FOLDER
from runtime.failure import RunFailed
from runtime.launch import train
from runtime.learning_rate import RateSchedule
from runtime.local_parameters import local_part
from runtime.loss_scale import LossScaler, LossScaling
from runtime.parameters import named_buffers, parameters_of
from runtime.step import StepResult, TrainState, build_state, training_step
from runtime.trainer import TrainOptions
from tests import megatron_core
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import BALANCE, Trajectory, own_tokens, run_plain, run_plan, tokens_of
from tests.plans import make_plan, tiny_experts, tiny_gpt2, tiny_llama, tiny_shared_experts
from tests.thinned import FULL

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative
STEPS = 4
SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
CHUNKS = {"interleaved-1f1b": 2, "looped-bfs": 2, "zbv": 2, "dualpipev": 2}


def plan_of(model: ModelSpec, precision: str, **layout: Any) -> Plan:
    if layout.get("zero"):
        layout.setdefault("dp_shard", layout["dp"])
    job = TrainingJob(global_batch=8, sequence=16, precision=precision)
    return make_plan(model, Layout(**layout), job)


# ---- the rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling", [LossScaling(window=5), LossScaling(initial=64, minimum=0.5, window=3, hysteresis=3)]
)
def test_the_scale_is_megatrons(scaling: LossScaling) -> None:
    chance = random.Random(5)
    # Often enough to reach the minimum, and then seldom enough to come back.
    overflows = [chance.random() < often for often in (0.9, 0.05, 0.5, 0.2) for _ in range(60)]
    scaler, found = LossScaler(scaling, [], CPU), []
    for overflow in overflows:
        scaler.note(finite_loss=True, finite_gradients=not overflow)
        found.append(scaler.scale)
        assert scaler.factor.item() == scaler.scale
    asked = {name: getattr(scaling, name) for name in ("initial", "minimum", "window", "hysteresis")}
    assert found == megatron_core.loss_scales(overflows, **asked)
    assert len(set(found)) > 6


def test_an_overflow_is_no_failure_while_the_scale_can_fall() -> None:
    scaler = LossScaler(LossScaling(initial=2, hysteresis=1), [], CPU)
    assert not scaler.note(finite_loss=False, finite_gradients=True)
    assert scaler.note(finite_loss=True, finite_gradients=False)
    assert (scaler.scale, scaler.left_out) == (1, 1)
    assert not scaler.note(finite_loss=True, finite_gradients=False)
    constant = LossScaler(LossScaling(constant=8), [], CPU)
    assert not constant.note(finite_loss=True, finite_gradients=False)
    # The loss is not what is scaled.
    forward = LossScaler(LossScaling(initial=4, hysteresis=1), [], CPU)
    assert not forward.note(finite_loss=False, finite_gradients=False)
    assert (constant.scale, forward.scale) == (8, 2)
    assert (scaler.left_out, constant.left_out, forward.left_out) == (1, 0, 0)


def test_a_scaler_goes_on_where_another_was() -> None:
    how = LossScaling(initial=64, window=3, hysteresis=2)
    first, second = LossScaler(how, [], CPU), LossScaler(how, [], CPU)
    for sound in (False, False, True, True):
        first.note(finite_loss=True, finite_gradients=sound)
    second.load(first.state())
    for scaler in (first, second):
        scaler.note(finite_loss=True, finite_gradients=True)
        scaler.note(finite_loss=True, finite_gradients=False)
        assert (scaler.scale, scaler.factor.item(), scaler.left_out) == (64, 64, 3)
    constant = LossScaler(LossScaling(constant=16), [], CPU)
    constant.load(first.state())
    assert (constant.scale, constant.left_out) == (16, 3)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        (LossScaling(constant=0), "--loss-scale cannot be 0"),
        (LossScaling(minimum=-1), "--min-loss-scale cannot be -1"),
        (LossScaling(window=0), "--loss-scale-window cannot be 0"),
        (LossScaling(hysteresis=0), "--hysteresis cannot be 0"),
        (LossScaling(initial=4, minimum=8), "expected: at least --min-loss-scale 8"),
    ],
)
def test_scales_that_cannot_be_are_refused(scaling: LossScaling, said: str) -> None:
    with pytest.raises(InputError, match=said):
        scaling.check()


# ---- the same numbers ------------------------------------------------------------------------------------------

# By how many ranks: the loss of a model with experts has two beginnings, and schedules take a loss in several ways.
SCALED: dict[int, list[Plan]] = {
    2: [
        plan_of(tiny_shared_experts(), "fp32", **SP),
        plan_of(tiny_llama(), "fp32", pp=2, schedule="zb1p"),
        plan_of(tiny_gpt2(), "fp32", pp=2, schedule="gpipe"),  # the logits of many microbatches a second time
    ],
}
MORE: dict[int, list[Plan]] = {
    2: [
        *(plan_of(tiny_llama(), "fp32", pp=2, schedule=s, virtual_stages=CHUNKS.get(s, 1)) for s in SCHEDULES),
        plan_of(tiny_gpt2(), "fp32", tp=2),
        plan_of(tiny_llama(), "fp32", dp=2, zero=3),
        plan_of(tiny_llama(), "fp32", cp=2, cp_style="ring"),
        plan_of(tiny_experts(), "fp32", dp=2, ep=2),
    ],
    4: [
        plan_of(tiny_shared_experts(), "fp32", **SP, etp=2, dp=2, zero=1),
        plan_of(tiny_shared_experts(), "fp32", dp=2, ep=2, pp=2, schedule="zbv", virtual_stages=2),
        plan_of(tiny_llama(), "fp32", **SP, pp=2),
        plan_of(tiny_llama(), "fp32", dp=2, cp=2, cp_style="all-to-all", zero=2),
    ],
}


CLIPPED = {torch.float64: None, torch.float32: 0.5}  # torch adds 1e-6 to the norm that it divides by


def scaled(plans: list[Plan]) -> list[dict[torch.dtype, Trajectory]]:
    return [
        {dtype: run_plan(plan, STEPS, dtype, limit, scaling=LossScaling()) for dtype, limit in CLIPPED.items()}
        for plan in plans
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_a_scaled_loss_gives_the_same_steps_under_every_layout(ranks: int) -> None:
    plans = SCALED.get(ranks, []) + (MORE[ranks] if FULL else [])
    for plan, found in zip(plans, run_ranks(scaled, ranks, plans, timeout_seconds=300.0)[0], strict=True):
        where = f"{plan.model.name} {plan.layout.short()}"
        for dtype, tolerance in TOLERANCE.items():
            expected = run_plain(make_plan(plan.model, Layout(), plan.job), STEPS, dtype, CLIPPED[dtype])
            assert found[dtype].losses == pytest.approx(expected.losses, rel=tolerance), where
            assert found[dtype].norms == pytest.approx(expected.norms, rel=tolerance), where
        assert found[torch.float32].clipped_norms == pytest.approx([0.5] * STEPS, rel=1e-5), where


# ---- an overflow -----------------------------------------------------------------------------------------------

MOE = tiny_shared_experts()
OVERFLOWING: dict[int, list[tuple[Plan, int]]] = {  # and the rank on which it happens
    2: [
        (plan_of(tiny_llama(), "fp16", **SP), 1),
        (plan_of(tiny_llama(), "fp16", pp=2, schedule="zb1p"), 1),
        (plan_of(MOE, "fp16", dp=2, ep=2), 1),
    ],
    4: [
        (plan_of(MOE, "fp16", dp=2, ep=2, pp=2, zero=1), 3),
        (plan_of(MOE, "fp16", **SP, dp=2, etp=2, zero=3), 2),
        (plan_of(tiny_gpt2(), "fp16", pp=2, dp=2, schedule="dualpipev", virtual_stages=2), 1),
    ],
}
if FULL:
    OVERFLOWING[2] += [
        (plan_of(tiny_llama(), "fp16", dp=2, zero=1), 0),
        (plan_of(tiny_llama(), "fp16", pp=2), 0),
        (plan_of(tiny_llama(), "fp16", cp=2, cp_style="ring"), 0),
    ]
OVERFLOWS = 3  # counted from 1: the step


def snapshot(state: TrainState) -> list[torch.Tensor]:
    """Copies of all that this rank trains and of what its optimizer knows."""
    tensors = [*parameters_of(state.chunks), *(buffer for _, buffer in named_buffers(state.chunks))]
    tensors += [value for p in parameters_of(state.chunks) for value in moments_of(state.optimizer, p).values()]
    return [local_part(tensor).detach().clone() for tensor in tensors]


def overflow(cases: list[tuple[Plan, int]]) -> list[tuple[list[StepResult], bool, bool]]:
    """Steps of which one overflows on one rank alone: (results, whether that left all as it was, the next not)."""
    found = []
    for plan, rank in cases:
        scaling = LossScaling(initial=256.0, hysteresis=1)
        state = build_state(plan, CPU, dtype=torch.float32, seed=7, weight_decay=0.1, balance=BALANCE, scaling=scaling)
        results, kept, moved = [], False, False
        for step in range(1, OVERFLOWS + 2):
            here = state.mesh.coordinate
            inputs, targets = own_tokens(plan, tokens_of(plan, step), here.dp, here.cp)
            hook = None
            if step == OVERFLOWS and dist.get_rank() == rank:
                block = list(state.chunks[0].blocks.values())[-1]
                # Of a finite gradient what fp16 cannot hold; under pp the stages before are sent it.
                hook = block.register_full_backward_hook(lambda _, before, __: (before[0] * 60000 * 60000,))
            before = snapshot(state)
            results.append(training_step(state, inputs, targets, learning_rate=1e-2, clip_norm=1.0))
            same = [torch.equal(old, new) for old, new in zip(before, snapshot(state), strict=True)]
            if step == OVERFLOWS:
                kept = all(same)
            elif step > OVERFLOWS:
                moved = not any(same[: len(parameters_of(state.chunks))])
            if hook is not None:
                hook.remove()
        found.append((results, kept, moved))
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(ranks: int) -> None:
    cases = OVERFLOWING[ranks]
    for of_rank in run_ranks(overflow, ranks, cases, timeout_seconds=300.0):
        for (plan, _), (results, kept, moved) in zip(cases, of_rank, strict=True):
            where = f"{plan.model.name} {plan.layout.short()}"
            assert [result.updated for result in results] == [True, True, False, True], where
            assert [result.overflowed for result in results] == [False, False, True, False], where
            assert [result.loss_scale for result in results] == [256, 256, 128, 128], where
            assert kept, where
            assert moved, where


# ---- a run -----------------------------------------------------------------------------------------------------


def run_of(precision: str = "fp16", **layout: Any) -> Plan:
    job = TrainingJob(global_batch=8, sequence=16, precision=precision)
    return make_plan(tiny_llama(vocab_size=256, layers=2), Layout(**{"micro_batch": 2, **layout}), job)


def test_a_run_finds_its_scale_and_goes_on_under_another_layout(tmp_path: Path) -> None:
    plan, seen = run_of(dp=2), []
    how: dict[str, Any] = {
        "run_dir": tmp_path,
        "warmup_steps": 8,
        "schedule": RateSchedule(shape="constant"),
        "scaling": LossScaling(initial=2.0**28, window=6),
    }
    train(plan, TrainOptions(steps=17, **how), seen.append)
    skipped = [record["skipped"] for record in seen]
    lost = skipped.index(False)
    assert lost > 3  # more than may be skipped in a row
    # The first overflow leaves the scale as it is.
    assert [record["loss_scale"] for record in seen[:lost]] == [2.0 ** (28 - n) for n in range(lost)]
    line = (tmp_path / "train.log").read_text().splitlines()[0]
    assert (
        "| loss scale: 268435456.0 | grad norm: nan | number of skipped iterations:   1 | number of nan iterations:   0"
        in line
    )
    record = yaml.safe_load((tmp_path / "record.yaml").read_text())
    assert record["overflowed_steps"] == record["skipped_steps"] == sum(skipped)

    again: list[dict[str, Any]] = []
    train(run_of(tp=2, sequence_parallel=True), TrainOptions(steps=21, resume=True, **how), again.append)
    assert again[0]["step"] == 18
    # The steps in a row that double the scale are counted from before the checkpoint on, and those of the warm-up are
    # the ones that were made.
    scaler, left_out = LossScaler(how["scaling"], [], CPU), 0
    for record in (*seen, *again):
        scaler.note(finite_loss=True, finite_gradients=not record["skipped"])
        assert record["loss_scale"] == scaler.scale
        assert record["lr"] == pytest.approx(min(3e-3, (record["step"] - left_out) * 3e-3 / 8))
        left_out = scaler.left_out
    assert again[-1]["loss_scale"] != again[0]["loss_scale"]


def checkpoints_of_two(plans: tuple[Plan, Plan], run_dir: Path) -> tuple[float, float]:
    """A run without a loss scale and one with it, each from the other's checkpoint: the scale before and after."""
    how: dict[str, Any] = {"dtype": torch.float32, "seed": 0, "weight_decay": 0.1}
    bare = build_state(plans[0], CPU, **how)
    scaled = build_state(plans[1], CPU, **how, scaling=LossScaling(initial=64.0, hysteresis=1))
    assert scaled.scaler is not None
    scaled.scaler.note(finite_loss=True, finite_gradients=False)
    before = scaled.scaler.scale
    checkpoint.save(run_dir, 1, bare.chunks, bare.optimizer, "")
    checkpoint.load(run_dir / FOLDER / "step_1", scaled.chunks, scaled.optimizer, scaled.scaler)
    checkpoint.save(run_dir, 2, scaled.chunks, scaled.optimizer, "", scaled.scaler)
    assert checkpoint.load(run_dir / FOLDER / "step_2", bare.chunks, bare.optimizer) == 2
    return before, scaled.scaler.scale


def test_a_run_may_go_on_in_another_precision(tmp_path: Path) -> None:
    plans = (run_of("fp32"), run_of("fp16"))
    assert run_ranks(checkpoints_of_two, 1, plans, tmp_path) == [(32.0, 32.0)]


def test_a_constant_scale_that_overflows_ends_the_run(tmp_path: Path) -> None:
    options = TrainOptions(run_dir=tmp_path, steps=9, scaling=LossScaling(constant=2.0**31))
    with pytest.raises(RunFailed, match=r"its gradients are not under a loss scale of 2\.14748e\+09"):
        train(run_of(), options, lambda _: None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["skipped"], line["loss_scale"]) for line in lines] == [(True, 2.0**31)] * 3
