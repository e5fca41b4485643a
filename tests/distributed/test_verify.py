"""`verify`: a plan on few ranks is the same as one process, and what a mutated runtime does is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from planner import plan as plan_file
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.reduced_plan import MOST_RANKS, ReducedPlan, reduce_plan
from runtime import verify as verifying
from runtime.failure import RunFailed
from runtime.plain_loop import PlainRun
from runtime.verify import TOLERANCES, Verdict, judge, verify
from tests.command_line import run as run_command
from tests.distributed import faults
from tests.plans import make_plan, tiny_gpt2, tiny_latent, tiny_llama, tiny_shared_experts
from tests.thinned import every

GPT2 = tiny_gpt2(layers=12, vocab_size=509, max_positions=2048)
LLAMA = tiny_llama(layers=12, vocab_size=512)


def big(
    model: Any, batch: int = 64, recompute: Any = None, selective: Any = None, documents: Any = None, **layout: Any
) -> Plan:
    job = TrainingJob(global_batch=batch, sequence=2048, precision="bf16", document_length=documents)
    return make_plan(model, Layout(**layout), job, recompute=recompute, selective=selective)


# Small worlds for the two cores of a small machine, each with something of its own.
PLANS = {
    "tied pipeline": big(GPT2, pp=2, micro_batch=2),
    "tp sp, zero 3, recompute": big(
        LLAMA, tp=2, sequence_parallel=True, dp=2, dp_shard=2, zero=3, recompute=[5], selective=[3]
    ),
    "experts": big(tiny_shared_experts(layers=6), dp=2, dp_shard=2, zero=1, ep=2),
    "zbv, zero 1": big(GPT2, pp=2, schedule="zbv", virtual_stages=2, dp=2, dp_shard=2, zero=1),
    "cp, zero 3": big(GPT2, cp=2, cp_style="ring", zero=3, recompute=[6]),
    "packed documents": big(tiny_latent(layers=6), documents=300.0, pp=2, micro_batch=2),
}


def run(found: ReducedPlan, steps: int = 2, timeout_seconds: float = 60.0) -> Verdict:
    assert found.plan.layout.world_size <= MOST_RANKS
    return verify(found.plan, found.loss_tokens, steps=steps, timeout_seconds=timeout_seconds)


@pytest.mark.parametrize("name", every(3, PLANS))
def test_what_the_runtime_does_is_what_one_process_does(name: str) -> None:
    verdict = run(reduce_plan(PLANS[name]))
    assert [(check.quantity, check.precision) for check in verdict.checks] == [
        ("loss", "fp32"),
        ("gradient norm", "fp32"),
        ("loss", "float64"),
        ("gradient norm", "float64"),
        ("parameters", "float64"),
    ]
    assert verdict.holds, verdict
    # Rounding is seen, so something was compared, and is far from the tolerance.
    assert any(check.difference > 0 for check in verdict.checks), verdict
    assert all(check.difference < check.tolerance / 5 for check in verdict.checks), verdict


# The fault, where it is seen first, and in which step in float64 and in fp32, which does not see the third in two.
FAULTS = {
    "loss of one rank scaled": (faults.loss_wrong_on_rank_one, "loss", 1, 1),
    "tied copies drift": (faults.tied_copies_drift, "gradient norm", 1, 1),
    "one rank decays more": (faults.decay_wrong_on_rank_one, "loss", 2, None),
    "one rank is lost in nan": (faults.not_a_number_on_rank_one, "loss", 2, 2),
}


@pytest.mark.parametrize("name", every(3, FAULTS))
def test_a_runtime_that_is_wrong_is_found_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, first, step, fp32_step = FAULTS[name]
    monkeypatch.setattr(verifying, "run_rank", fault)
    verdict = run(reduce_plan(PLANS["tied pipeline"]))
    assert not verdict.holds
    checks = {(check.quantity, check.precision): check for check in verdict.checks}
    assert checks[first, "float64"].first_step == step
    assert checks[first, "fp32"].first_step == fp32_step
    parameters = checks["parameters", "float64"]
    assert not parameters.holds
    assert len(parameters.names) == 5
    assert all(difference > TOLERANCES["float64"] for difference in parameters.names.values())
    assert list(parameters.names.values()) == sorted(parameters.names.values(), reverse=True)
    if name == "tied copies drift":
        assert checks["loss", "float64"].first_step == 2  # the first loss is before any gradient
        assert next(iter(parameters.names)) == "embedding.tokens.weight"
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_a_rank_that_raises_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "run_rank", faults.verify_raises_on_rank_one)
    with pytest.raises(RunFailed, match=r"rank 1 .*ended with exit code 1") as error:
        run(reduce_plan(PLANS["tied pipeline"]))
    assert error.value.log_lines[-1] == "ArithmeticError: the seventh bit fell off"


@pytest.mark.full
def test_a_rank_that_hangs_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "run_rank", faults.verify_hangs_on_rank_one)
    with pytest.raises(RunFailed, match="rank 0 ") as error:
        run(reduce_plan(PLANS["tied pipeline"]), timeout_seconds=5.0)
    assert len(str(error.value).splitlines()) <= 24


# ---- the verdict ---------------------------------------------------------------------------------------------


def plain(losses: list[float]) -> dict[str, PlainRun]:
    return {name: PlainRun(losses, [2.0] * len(losses), [], {}) for name in TOLERANCES}


def rank(losses: list[float], off: float = 0.0) -> dict[str, Any]:
    steps = {"loss": losses, "gradient norm": [2.0] * len(losses)}
    return {"fp32": steps, "float64": steps, "parameters": {"a": off, "b": off / 2}}


def test_the_largest_difference_of_any_rank_and_step_counts() -> None:
    verdict = judge(plain([4.0, 2.0]), [rank([4.0, 2.0]), rank([4.0, 2.0 + 1e-7], off=1e-3)])
    fp32, _, float64, _, parameters = verdict.checks
    assert fp32.difference == pytest.approx(5e-8)
    assert (fp32.step, fp32.rank, fp32.first_step, fp32.holds) == (2, 1, None, True)
    assert (float64.first_step, float64.holds) == (2, False)
    assert (parameters.rank, parameters.step, dict(parameters.names)) == (1, 2, {"a": 1e-3, "b": 5e-4})
    assert not verdict.holds


def test_no_number_is_a_difference() -> None:
    verdict = judge(plain([4.0]), [rank([math.nan])])
    assert not verdict.checks[0].holds
    assert verdict.to_dict()["checks"][0]["difference"] is None
    assert judge(plain([4.0]), [rank([4.0])]).holds


# ---- the verb --------------------------------------------------------------------------------------------------


def saved(plan: Plan, folder: Path) -> str:
    plan_file.save(plan, folder / "plan.yaml")
    return str(folder / "plan.yaml")


def test_the_verb_says_what_it_ran_and_that_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(PLANS["tied pipeline"], tmp_path)
    code, out, err = run_command(capsys, monkeypatch, "verify", path, "--steps", "2")
    assert (code, err) == (0, "")
    assert out.startswith("pp2 mb2 1f1b, 4 microbatches, on 2 ranks beside one process: tiny-gpt2 reduced, 2 steps of")
    assert "the same as a single process, step by step" in out
    assert "DIFFERS" not in out
    assert len(out.splitlines()) < 40


@pytest.mark.full
def test_the_verb_fails_where_something_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(PLANS["tied pipeline"], tmp_path)
    monkeypatch.setattr(verifying, "run_rank", faults.loss_wrong_on_rank_one)
    code, out, _ = run_command(capsys, monkeypatch, "verify", path, "--steps", "2")
    flat = " ".join(out.split())
    assert code == 1
    assert "not the same as a single process" in flat
    assert "loss in fp32: beyond the tolerance from step 1 on" in flat
    assert "parameters after step 2, the largest differences: " in flat
    code, out, _ = run_command(capsys, monkeypatch, "verify", path, "--steps", "1", "--json")
    document = json.loads(out)
    assert (code, document["holds"], document["steps"]) == (1, False, 1)
    assert document["checks"][0]["first_step"] == 1
    assert document["layout"]["pp"] == 2


def test_a_rank_that_dies_is_one_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "run_rank", faults.verify_raises_on_rank_one)
    code, out, err = run_command(capsys, monkeypatch, "verify", saved(PLANS["tied pipeline"], tmp_path), "--json")
    assert code == 1
    assert json.loads(out)["error"]["error"].startswith("rank 1 (pipeline stage 1) ended with exit code 1")
    assert err.splitlines()[-1].strip() == "ArithmeticError: the seventh bit fell off"
    assert len(err.splitlines()) <= 24


def test_the_plain_loop_is_what_torch_does() -> None:
    """Two steps by hand: the mean loss, and AdamW with decay on matrices alone."""
    model = tiny_gpt2(layers=1)
    batches = [torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    options = {"dtype": torch.float64, "learning_rate": 1e-2, "weight_decay": 0.5, "seed": 3}
    before = verifying.run_plain(model, batches[:1], **options | {"learning_rate": 0.0}).parameters
    one = verifying.run_plain(model, batches[:1], **options).parameters
    for name, value in one.items():
        moved = (value - before[name]).abs()
        # AdamW's first update is the learning rate in each element with a gradient, beside the decay.
        decay = 1e-2 * 0.5 * before[name].abs() if value.ndim > 1 else torch.zeros_like(value)
        assert (moved <= 1e-2 * (1 + 1e-6) + decay).all(), name
    losses = verifying.run_plain(model, batches, **options).losses
    assert losses[0] == pytest.approx(math.log(61), rel=0.02)
    assert len(losses) == 2
