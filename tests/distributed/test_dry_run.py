"""A rank run dry: every schedule, worlds of any size, what a GPU's kernels keep, and the verb."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cli
from planner import plan as plan_file
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.planning import make
from planner.question import ask
from profiles.input_error import InputError
from runtime.dry_run import check_plan
from tests.distributed.memory_cases import in_child, parts_of
from tests.plans import make_plan, tiny_experts, tiny_llama
from tests.thinned import FULL

ROOT = Path(__file__).parents[2]
SMALL = TrainingJob(global_batch=8, sequence=32, precision="fp32")
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {},
    "1f1b": {},
    "interleaved-1f1b": {"virtual_stages": 2},
    "looped-bfs": {"virtual_stages": 2},
    "zb1p": {"virtual_stages": 2},
    "zbv": {"virtual_stages": 2},
    "dualpipev": {"virtual_stages": 2},
}


def piped(schedule: str) -> Plan:
    layout = Layout(pp=2, dp=2, dp_shard=2, zero=1, schedule=schedule, **SCHEDULES[schedule])
    return make_plan(tiny_llama(hidden_size=64, head_dim=16), layout, SMALL)


def test_every_schedule_runs_with_all_chunks_of_a_rank() -> None:
    # Each rank takes a process of its own; the others are among the cases of test_memory.py.
    plans = {schedule: piped(schedule) for schedule in (SCHEDULES if FULL else ("gpipe", "1f1b", "zbv"))}
    found = iter(in_child(parts_of, [(plan, rank) for plan in plans.values() for rank in (0, 2)]))
    ranks = {schedule: (next(found), next(found)) for schedule in plans}
    for schedule, (first, second) in ranks.items():
        plan = plans[schedule]
        # Each rank holds its half of its stages' weights in fp32, of 61 rows of embedding and head the larger half, and
        # twice as much of moments beside counts of steps.
        model = plan.model
        odd_rows = model.vocab_size % 2 * model.hidden_size
        assert first["weights"] + second["weights"] == 4 * (model.parameters + 2 * odd_rows) / 2, schedule
        for rank in (first, second):
            assert rank["optimizer"] == pytest.approx(2 * rank["weights"], rel=0.01), schedule
            assert rank["forwards"] == plan.microbatches * plan.layout.virtual_stages, schedule
            assert rank["pipeline_buffers"] > 0, schedule
    # Of the last rank four microbatches are in flight, or one.
    assert ranks["gpipe"][1]["activations"] > 2 * ranks["1f1b"][1]["activations"]


def test_a_rank_keeps_what_a_gpus_norm_keeps() -> None:
    job = replace(SMALL, precision="bf16", global_batch=16)  # both peaks are at the forward's end
    plan = make_plan(tiny_llama(), Layout(micro_batch=16), job)
    (composed,) = in_child(parts_of, [(plan, 0)])
    (fused,) = in_child(partial(parts_of, gpu_kernels=True), [(plan, 0)])
    # On a CPU a norm keeps its input in fp32 and the normed rows in bf16 besides; fused, a number a row.
    rows, width, norms = job.tokens, plan.model.hidden_size, 2 * plan.model.layers + 1
    saved = composed["activations"] - fused["activations"]
    assert saved == pytest.approx(norms * rows * width * (4 + 2), rel=0.05)
    assert fused["weights"] == composed["weights"]


def test_a_model_with_experts_is_refused() -> None:
    plan = make_plan(tiny_experts(), Layout(dp=2), SMALL)
    with pytest.raises(InputError, match=r"cannot run dry.*4 experts.*verify"):
        check_plan(plan)


# ---- the verb --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for 256 GPUs, of a small model: a pipeline with several chunks a rank."""
    path = tmp_path_factory.mktemp("plans") / "plan.yaml"
    pins = (
        "tp=2",
        "pp=4",
        "schedule=interleaved-1f1b",
        "virtual_stages=2",
        "micro_batch=4",
        "zero=1",
        "recompute=none",
    )
    question = ask("gpt2", "dgx-a100:32", 1024, 512, pins=pins)
    make(question, output=path)
    return path


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: torch remembers process groups."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


def test_one_document_says_what_the_rank_held(large: Path) -> None:
    plan = plan_file.load(large)
    done = run_cli("train", str(large), "--dry-run", "--rank", "192", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["rank"], found["pipeline_rank"], found["gpu_kernels"], found["gpu"]) == (192, 3, True, None)
    predicted, live = found["predicted"], found["live"]
    assert predicted == {
        part: size
        for part, size in plan.prediction.memory_bytes[3].items()
        if part not in ("context", "communicators", "allocator_slack")
    }
    assert list(found["left_out"]) == ["communicators", "context", "allocator_slack"]
    for part in ("weights", "optimizer", "pipeline_buffers"):
        assert predicted[part] == pytest.approx(live[part], rel=0.001), part
    assert found["live_bytes"] == sum(live.values())


def test_the_heaviest_rank_is_the_default_and_nothing_is_written(large: Path, tmp_path: Path) -> None:
    plan = plan_file.load(large)
    totals = [sum(items.values()) for items in plan.prediction.memory_bytes]
    done = run_cli("train", str(large), "--dry-run", "--run-dir", str(tmp_path / "run"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"dry run of rank {totals.index(max(totals)) * 64} of 256: gpt2, tp2")
    assert "all tensors" in done.stdout
    assert not (tmp_path / "run").exists()


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["cli.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert captured.out == ""
    return int(ended.value.code or 0), " ".join(captured.err.split())


def test_what_cannot_run_dry_is_refused(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_file.load(large)
    assert command(capsys, monkeypatch, "train", str(large), "--dry-run", "--rank", "256") == (
        2,
        f"error the plan has no rank 256 where --rank expected 0 to 255, a rank of {plan.layout.short()} got 256 "
        "try cli.py train --help",
    )
    other = tmp_path / "megatron.yaml"
    plan_file.save(replace(plan, job=replace(plan.job, target="megatron")), other)
    for arguments in (("train", str(other), "--dry-run"), ("verify", str(other))):
        code, said = command(capsys, monkeypatch, *arguments)
        assert code == 2
        assert "the plan is for megatron, and this is another trainer" in said
        assert "plan again with --target meshwright" in said
    code, said = command(capsys, monkeypatch, "train", str(other), "--run-dir", str(tmp_path / "run"))
    assert (code, "the plan is for megatron" in said) == (2, True)
    assert not (tmp_path / "run").exists()
