"""Starting ranks: a whole run, a dead rank, Ctrl-C, torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.plan import load
from profiles.input_error import InputError
from runtime.checkpoint_folder import latest
from runtime.data.data_options import DataOptions
from runtime.failure import RunFailed
from runtime.launch import start_ranks, train
from runtime.measure import PARTS
from runtime.run_folder import prepare
from runtime.trainer import TrainOptions
from tests.distributed.faults import raise_on_rank_one, small_plan

ROOT = Path(__file__).parents[2]
QUICK_SECONDS = 20.0  # to end after a failure; idle it is under 2
SENT = {
    "launcher": [signal.SIGINT],
    "launcher killed": [signal.SIGKILL],
    "launcher terminated twice": [signal.SIGTERM, signal.SIGTERM],
}


def process_of(run_dir: Path, rank: int) -> int:
    log = (run_dir / "logs" / f"rank_{rank}.log").read_text()
    match = re.search(r"process (\d+)", log)
    assert match is not None, log
    return int(match.group(1))


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def steps_in(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_whole_folder_and_resumes(tmp_path: Path) -> None:
    plan, seen = small_plan(pp=2), []
    train(plan, TrainOptions(run_dir=tmp_path, steps=9, peak_flops_per_second=1e10), seen.append)
    assert [record["step"] for record in seen] == list(range(1, 10))
    assert seen == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert seen[0]["mfu"] == pytest.approx(seen[0]["model_tflops_per_device"] * 1e12 / 1e10)
    assert load(tmp_path / "plan.yaml") == plan
    assert list(tmp_path.glob("events.out.tfevents.*"))

    record = yaml.safe_load((tmp_path / "record.yaml").read_text())
    measured = record["measured"]
    assert record["schema"] == "meshwright.record/v1"
    assert record["predicted"]["step_seconds"] == plan.prediction.step_seconds
    assert record["train_loss"] == seen[-1]["loss"]
    assert record["validation_loss"] == seen[-1]["validation_loss"]
    assert 2.0 < record["bigram_loss"] < 3.0
    assert [rank["rank"] for rank in measured["per_rank"]] == [0, 1]
    assert list(measured["parts"]) == list(PARTS)
    assert measured["parts"]["pp_bubble"] > 0
    assert measured["parts"]["tp"] == 0
    for rank in measured["per_rank"]:
        assert sum(rank["parts"].values()) == pytest.approx(rank["step_seconds"])
        assert min(rank["parts"].values()) >= 0

    # On another layout from step 10 on: the losses go on as if nothing had happened.
    resumed: list[dict[str, Any]] = []
    options = TrainOptions(run_dir=tmp_path, steps=12, resume=True)
    train(small_plan(dp=2, zero=3, dp_shard=2), options, resumed.append)
    assert [entry["step"] for entry in resumed] == [10, 11, 12]
    assert steps_in(tmp_path) == list(range(1, 13))
    assert resumed[0]["loss"] < seen[0]["loss"] - 0.5
    assert latest(tmp_path).name == "step_12"


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    killed: list[float] = []

    def kill(record: dict[str, Any]) -> None:
        if record["step"] >= 3 and not killed:
            killed.append(time.monotonic())
            os.kill(process_of(tmp_path, 1), signal.SIGKILL)

    with pytest.raises(RunFailed, match=r"rank 1 \(pipeline stage 1\) was killed by signal 9") as error:
        train(small_plan(pp=2), TrainOptions(run_dir=tmp_path, steps=1_000_000), kill)
    assert time.monotonic() - killed[0] < QUICK_SECONDS
    assert (error.value.rank, error.value.stage, error.value.exit_code) == (1, 1, -9)
    assert error.value.log_lines[0].startswith("rank 1 of 2")
    assert not alive(process_of(tmp_path, 0))
    assert steps_in(tmp_path)[:3] == [1, 2, 3]


def test_a_rank_that_raises_ends_the_run(tmp_path: Path) -> None:
    plan, options = small_plan(dp=2), TrainOptions(run_dir=tmp_path)
    prepare(tmp_path, plan, steps=1, resume=False)
    start = time.monotonic()
    with pytest.raises(RunFailed, match=r"rank 1 \(pipeline stage 0\) ended with exit code 1") as error:
        start_ranks(plan, options, raise_on_rank_one)
    assert time.monotonic() - start < QUICK_SECONDS
    assert error.value.log_lines[-1] == "ArithmeticError: the seventh bit fell off"
    assert not alive(process_of(tmp_path, 0))


@pytest.mark.parametrize(
    "target",
    [
        "launcher",
        "launcher killed",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("everyone", "launcher terminated twice")),
    ],
)
def test_ctrl_c_leaves_no_process_and_a_readable_folder(target: str, tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.faults", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.strip() == "3":
            break
    ranks = [process_of(tmp_path, rank) for rank in (0, 1)]
    assert all(map(alive, ranks))
    start = time.monotonic()
    if target == "everyone":
        os.killpg(run.pid, signal.SIGINT)
    else:
        for number in SENT[target]:
            run.send_signal(number)
            time.sleep(0.01)  # so that it is handled before the next
    _, errors = run.communicate(timeout=60)
    while any(map(alive, ranks)) and time.monotonic() - start < QUICK_SECONDS:
        time.sleep(0.05)
    assert not any(map(alive, ranks))
    assert time.monotonic() - start < QUICK_SECONDS
    if target != "launcher killed":
        name = "SIGTERM" if target == "launcher terminated twice" else "SIGINT"
        assert errors.strip().splitlines()[-1] == f"runtime.failure.Interrupted: interrupted by {name}"
    assert load(tmp_path / "plan.yaml") == small_plan(pp=2)
    assert steps_in(tmp_path)[:3] == [1, 2, 3]


def test_torchrun_joins_and_a_wrong_number_of_ranks_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from runtime.launch import train; from runtime.trainer import TrainOptions\n"
        "from tests.distributed.faults import small_plan\n"
        "from profiles.input_error import InputError\n"
        "for dp in (2, 1):\n"
        "    try:\n"
        "        train(small_plan(dp=dp), TrainOptions(run_dir=Path(sys.argv[1]) / str(dp), steps=2), print)\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    said = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stdout
    refused, _, joined = said.partition("expected: 2 ranks, as in the plan; got: 1 ranks")
    assert joined
    assert "'step'" not in refused
    assert "'step': 2" in joined


def test_nothing_starts_when_the_data_is_missing(tmp_path: Path) -> None:
    options = TrainOptions(run_dir=tmp_path / "run", data=DataOptions(paths=(str(tmp_path / "nowhere"),)))
    with pytest.raises(InputError, match="cannot be read"):
        train(small_plan(pp=2), options, print)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    with pytest.raises(InputError, match=r"nothing left to train.*more than the 5 steps"):
        train(small_plan(pp=2), TrainOptions(run_dir=tmp_path, steps=5, resume=True), print)
    assert not (tmp_path / "plan.yaml").exists()


def test_resume_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        train(small_plan(pp=2), TrainOptions(run_dir=tmp_path, resume=True), print)
