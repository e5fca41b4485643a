"""What a run says of itself: Megatron's line, slow ranks, spikes, trackers, and the variables of srun."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from planner.layout import Layout
from planner.report import record_report
from profiles.input_error import InputError
from runtime import slurm
from runtime.failure import RunFailed
from runtime.log_line import TrainLog
from runtime.spike_guard import SpikeGuard
from runtime.stragglers import stragglers
from runtime.trackers import Trackers, check_installed
from runtime.watching import parse_steps


def record(step: int, **changes: Any) -> dict[str, Any]:
    fields = {"loss": 7.0 + step, "grad_norm": 1.2345, "skipped": False, "lr": 1.5e-4, "step_seconds": 0.5 * step}
    return {"step": step, "model_tflops_per_device": 412.34} | fields | changes


# ---- train.log -------------------------------------------------------------------------------------------------


def test_the_line_is_megatrons(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, every=2, steps=5, global_batch=16)
    log.write(record(1))
    log.write(record(2))
    log.write(record(3, skipped=True, loss=None, grad_norm=None))
    log.write(record(4, skipped=True, loss=9.0))
    log.write(record(5, validation_loss=2.0))
    log.close()
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert re.fullmatch(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]", lines[0][:22])
    assert [line[22:] for line in lines[:3]] == [
        " iteration        2/       5 | consumed samples:           32 | elapsed time per iteration (ms): 750.0 | "
        "throughput per GPU (TFLOP/s/GPU): 412.3 | learning rate: 1.500000E-04 | global batch size:    16 | "
        "lm loss: 8.500000E+00 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |",
        " iteration        4/       5 | consumed samples:           64 | elapsed time per iteration (ms): 1750.0 | "
        "throughput per GPU (TFLOP/s/GPU): 412.3 | learning rate: 1.500000E-04 | global batch size:    16 | "
        "loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   2 | number of nan iterations:   1 |",
        " iteration        5/       5 | consumed samples:           80 | elapsed time per iteration (ms): 2500.0 | "
        "throughput per GPU (TFLOP/s/GPU): 412.3 | learning rate: 1.500000E-04 | global batch size:    16 | "
        "lm loss: 1.200000E+01 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |",
    ]
    assert lines[3] == " validation loss at iteration 5 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 |"


# ---- slow ranks and spikes -------------------------------------------------------------------------------------


def test_a_rank_is_slow_beside_its_own_stage() -> None:
    layout = Layout(pp=2, dp=2)
    even = [[1.0, 1.0, 1.0], [1.02, 0.97, 1.0], [3.0, 3.0, 3.0], [3.1, 2.9, 3.0]]  # stage 1 has three times the work
    assert stragglers(even, layout) == []
    slow = [*even[:3], [3.9, 3.6, 3.9]]
    assert stragglers(slow, layout) == [{"rank": 3, "stage": 1, "slower": pytest.approx(1.3), "steps": 3}]
    assert stragglers([*even[:3], [9.0, 3.0, 3.0]], layout) == []  # once is no habit
    assert stragglers([[1.0] * 2, [9.0] * 2], Layout(dp=2)) == []  # nor is twice
    assert stragglers([[9.0] * 5], Layout()) == []  # beside nobody


def test_the_report_names_slow_ranks_and_steps_left_out() -> None:
    parts = dict.fromkeys(("compute", "tp", "cp", "pp_bubble", "dp_exposed", "optimizer", "other"), 0.1)
    planned = dict.fromkeys(("compute", "recompute", "tp", "cp", "ep", "pp", "bubble", "dp_exposed", "optimizer"), 0.1)
    slow = {"rank": 3, "stage": 1, "slower": 1.314, "steps": 4}
    console = Console(width=200)
    with console.capture() as told:
        console.print(
            record_report(
                {
                    "predicted": {"breakdown_seconds": planned, "step_seconds": 1.0, "peak_memory_bytes": 1.0},
                    "measured": {
                        "parts": parts,
                        "step_seconds": 0.6,
                        "peak_memory_bytes": 1.0,
                        "stragglers": [slow],
                    },
                    "steps": 9,
                    "train_loss": 1.0,
                    "skipped_steps": 3,
                    "spiked_steps": 2,
                }
            )
        )
    assert told.get().splitlines()[-3:] == [
        "2 steps made no update: the gradient norm was above --spike-guard",
        "1 steps made no update: loss or gradient norm was not finite",
        "rank 3 (pipeline rank 1) is slow: its kernels take 1.31 times as long as those of its stage's other ranks, in "
        "4 steps",
    ]


def test_a_spike_is_so_many_medians(tmp_path: Path) -> None:
    guard = SpikeGuard(3.0)
    for norm in [1.0, 2.0] * 8:
        assert guard.limit == float("inf")  # before enough is known
        guard.note(norm)
    assert guard.limit == 4.5
    with pytest.raises(RunFailed, match=r"gradient norm of 9 is 6 times the usual 1.5, and --spike-guard 3 was asked"):
        raise guard.failure(9.0, tmp_path, step=20, in_a_row=3)
    assert SpikeGuard(None).limit == float("inf")


# ---- trackers --------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"try: pip install 'meshwright\[wandb\]'"):
        check_installed("project", None)
    with pytest.raises(InputError, match=r"--mlflow needs a package that is not installed"):
        check_installed(None, "http://localhost:5000")
    check_installed(None, None)


def test_mlflow_gets_every_number_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/store"
    for step, resume in ((1, False), (2, True)):
        trackers = Trackers(tmp_path, {"model": "tiny"}, wandb=None, mlflow=uri, resume=resume)
        trackers.write(record(step))
        trackers.end(failed=False)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    client = tracking.MlflowClient(tracking_uri=uri)
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 8.0), (2, 9.0)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"model": "tiny"})


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = Trackers(tmp_path, {}, wandb="project", mlflow=None, resume=False)
    trackers.write(record(1))
    trackers.end(failed=False)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    (kept,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    deadline = time.monotonic() + 30  # its own process writes, and on a busy machine late
    while b"grad_norm" not in kept.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tracker_out_of_reach_is_told_at_the_start_and_left_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(InputError, match=r"mlflow cannot be reached; where: --mlflow nowhere://x"):
        Trackers(tmp_path, {}, wandb=None, mlflow="nowhere://x", resume=False)

    class Broken:
        def log(self, figures: dict[str, float], step: int) -> None:
            raise ConnectionError("the cable was pulled")

    trackers = Trackers(tmp_path, {}, wandb=None, mlflow=None, resume=False)
    trackers._trackers["mlflow"] = Broken()  # type: ignore[assignment]
    trackers.write(record(1))
    trackers.write(record(2))
    trackers.end(failed=False)
    assert capsys.readouterr().err == "mlflow failed, and is left: ConnectionError: the cable was pulled\n"


def test_a_window_of_steps_is_two_numbers() -> None:
    assert parse_steps("5:8", "--profile-steps") == (5, 8)
    for text in ("8:5", "0:3", "5", "a:b"):
        with pytest.raises(InputError, match="is no window of steps"):
            parse_steps(text, "--profile-steps")


# ---- srun ------------------------------------------------------------------------------------------------------

TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711"}


def test_slurms_variables_become_torchs() -> None:
    environment = TASK | {"SLURM_NODELIST": "gpu[003-004,9]-ib,login1"}
    assert slurm.joins(environment)
    slurm.join(environment)
    found = {name: value for name, value in environment.items() if not name.startswith("SLURM")}
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003-ib",
        "MASTER_PORT": "19711",
    }
    other = TASK | {
        "SLURM_NODELIST": "a",
        "MASTER_PORT": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "b,c",
    }
    slurm.join(other)
    assert (other["WORLD_SIZE"], other["MASTER_ADDR"], other["MASTER_PORT"]) == ("8", "b", "1")


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_NTASKS": "16"}, TASK | {"SLURM_STEP_NUM_TASKS": "1"}],
    ids=["no Slurm", "outside of a step", "srun --pty bash"],
)
def test_a_process_alone_joins_nobody(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert not slurm.joins(environment)
    slurm.join(environment)
    assert environment == before


def test_torchrun_under_slurm_stays_torchruns() -> None:
    environment = TASK | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    before = dict(environment)
    slurm.join(environment)
    assert environment == before


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(InputError, match=r"expected: SLURM_NODELIST; got: SLURM_JOB_ID, SLURM_LOCALID"):
        slurm.join(dict(TASK))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[7,9]", "n7"), ("r[1-2]c[03-04],x", "r1c03"), ("a-b[010-020]", "a-b010")],
)
def test_the_first_of_many_hosts(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first
