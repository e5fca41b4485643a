"""Ranks that hang or are stopped, full disks and taken ports: who is named, and what is left."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from planner.layout import Layout
from planner.plan import Plan
from profiles.input_error import InputError
from runtime import flight_recorder, launch, run_folder, whereabouts
from runtime.checkpoint_folder import latest
from runtime.disk import check_room, checkpoint_bytes, free_bytes
from runtime.failure import Interrupted, RunFailed, is_timeout, retold, told
from runtime.launch import start_ranks, train
from runtime.mesh import RankMesh, build_mesh
from runtime.post_mortem import waited, why
from runtime.process_group import process_group
from runtime.rank_watch import RankWatch
from runtime.run_folder import LOGS_FOLDER, prepare
from runtime.stacks import main_stack, waits_for_others
from runtime.trainer import TrainOptions
from tests.distributed.faults import (
    FAULT_STEP,
    fill_disk_of_rank_one,
    sleep_on_last_rank,
    small_plan,
    stop_rank_one,
    wait_for_each_other,
)
from tests.distributed.test_launch import QUICK_SECONDS, ROOT, alive, process_of, steps_in
from tests.plans import tiny_llama

PATIENCE_SECONDS = 300.0  # with ranks that compute; idle they take under 3

Body = Callable[[Plan, TrainOptions], None]


def fail(plan: Plan, options: TrainOptions, body: Body) -> RunFailed:
    """The error of a run whose ranks run `body`; no rank is left."""
    prepare(options.run_dir, plan, steps=options.steps, resume=False)
    with pytest.raises(RunFailed) as error:
        start_ranks(plan, options, body)
    assert not any(alive(process_of(options.run_dir, rank)) for rank in range(plan.layout.world_size))
    return error.value


def seconds_since(path: Path) -> float:
    """Since the file was last written: a rank's note of where it is, just before it goes wrong."""
    return time.time() - path.stat().st_mtime


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- hangs ---------------------------------------------------------------------------------------------------


def test_a_rank_that_sleeps_is_named_with_what_it_did(tmp_path: Path) -> None:
    options = TrainOptions(run_dir=tmp_path, timeout_seconds=8.0)
    error = fail(small_plan(pp=2, tp=2), options, sleep_on_last_rank)
    assert seconds_since(tmp_path / LOGS_FOLDER / "rank_3.at") < options.timeout_seconds + QUICK_SECONDS
    assert (error.rank, error.stage) == (3, 1)
    assert error.how == (
        "did not come to a collective in which ranks 0, 1, 2 waited for it for 8 s (--timeout); it was at step 3, "
        "forward, backward and update, in these calls, innermost first"
    )
    assert error.log_lines[0].endswith(" sleep_for_ever")
    assert any(" forward_one_chunk" in line for line in error.log_lines)
    assert f"all its threads: {tmp_path / LOGS_FOLDER / 'rank_3.log'}" in error.log_lines
    # As NCCL would write it: one rank's file at the place that its environment names.
    dumps = tmp_path / LOGS_FOLDER / "nccl_flight_recorder_rank_"
    assert error.log_lines[-1].startswith(f"flight recorder of 1 ranks: {dumps}*; read with: torchfrtrace ")
    assert [record["step"] for record in records(tmp_path)] == list(range(1, FAULT_STEP))


def test_a_stopped_rank_is_killed_and_named(tmp_path: Path) -> None:
    options = TrainOptions(run_dir=tmp_path, timeout_seconds=5.0)
    error = fail(small_plan(dp=2), options, stop_rank_one)
    assert seconds_since(tmp_path / LOGS_FOLDER / "rank_1.at") < options.timeout_seconds + QUICK_SECONDS
    assert str(error).startswith(
        "rank 1 (pipeline stage 0) did not come to a collective in which rank 0 waited for it for 5 s (--timeout); it "
        "was at step 3, data, and its process obeyed no signal: stopped"
    )


def test_ranks_that_wait_for_each_other_are_not_blamed_on_one(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    error = fail(small_plan(dp=2), TrainOptions(run_dir=tmp_path, timeout_seconds=2.0), wait_for_each_other)
    assert signal.getsignal(signal.SIGTERM) == before  # torch's handler goes with its ranks
    assert "waited 2 s (--timeout) for others in a collective, and so did every other rank" in error.how
    assert len(error.log_lines) == 2
    assert error.log_lines[0].startswith("rank 0 at the start: ")
    assert any(line.endswith(" wait_for_each_other") for line in error.log_lines)


def log_with_stacks(*calls: str, before: str = "") -> str:
    frames = "".join(f'  File "{call.split(":")[0]}", line 7 in {call.split(":")[1]}\n' for call in calls)
    return (
        f"rank 0 of 2, process 5\n{before}Thread 0x00007f00 (most recent call first):\n"
        f'  File "threading.py", line 1 in run\n\nCurrent thread 0x00007f01 (most recent call first):\n{frames}'
    )


WAITS = log_with_stacks("runtime/step.py:training_step", "runtime/trainer.py:run")
SITS = log_with_stacks("runtime/data.py:load", "torch/distributed/distributed_c10d.py:x", "runtime/trainer.py:run")


def test_stacks_tell_who_waits() -> None:
    assert [frame.function for frame in main_stack(SITS)] == ["load", "x", "run"]
    assert main_stack("no stacks") == ()
    assert waits_for_others(main_stack(WAITS))
    assert not waits_for_others(main_stack(SITS))
    operation = log_with_stacks("torch/_ops.py:__call__", "torch/distributed/_functional_collectives.py:wait_tensor")
    assert waits_for_others(main_stack(operation))
    assert not waits_for_others(main_stack(log_with_stacks("torch/_ops.py:__call__", "runtime/loss.py:forward")))


def test_a_timeout_of_nccl_is_a_hang_too(tmp_path: Path) -> None:
    """NCCL's watchdog aborts the process: no exception, only its log. (From made-up logs: there is no GPU here.)"""
    watchdog = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)\n"
    (tmp_path / "rank_0.log").write_text(log_with_stacks("runtime/step.py:training_step", before=watchdog))
    (tmp_path / "rank_1.log").write_text(SITS)
    (tmp_path / f"{flight_recorder.PREFIX}0").write_bytes(b"")
    for rank in (0, 1):
        with whereabouts.Whereabouts(tmp_path, rank) as here:
            here.note(12, "checkpoint")
            here.note(7, "data")
    error = why(0, -6, Layout(pp=2), tmp_path, RankWatch(), 30.0)
    assert str(error).startswith("rank 1 (pipeline stage 1) did not come to a collective in which rank 0 waited")
    assert "for 30 s (--timeout); it was at step 7, data, in these calls" in str(error)
    assert "runtime/data.py:7 load" in str(error)
    assert "flight recorder of 1 ranks" in str(error)
    (tmp_path / "rank_0.log").write_text(WAITS)
    assert "was killed by signal 6" in str(why(0, -6, Layout(pp=2), tmp_path, RankWatch(), 30.0))


def test_a_rank_that_only_lost_a_peer_is_not_the_one_to_blame(tmp_path: Path) -> None:
    """Whoever says so first: gloo closes its pair before the rank that gave up waiting, or raised, can say a word."""

    def said(*errors: BaseException) -> RunFailed:
        watch = RankWatch()
        watch.failures.extend((rank, told(error)) for rank, error in enumerate(errors))
        error = why(0, 1, Layout(dp=2), tmp_path, watch, 30.0)
        assert isinstance(error, RunFailed)
        return error

    lost = RuntimeError("Connection closed by peer [127.0.0.1]:65162")
    late = said(lost, RuntimeError("Timed out waiting 30000ms for recv operation to complete"))
    assert late.how.startswith("waited 30 s (--timeout) for others in a collective, and so did every other rank")
    assert said(lost, ValueError("shapes")).log_lines[-1] == "ValueError: shapes"
    assert said(lost, lost).rank == 0  # nobody said more


def test_under_torchrun_a_timeout_names_the_rank_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*_: object) -> None:
        for rank, step in enumerate((9, 8)):
            with whereabouts.Whereabouts(tmp_path / LOGS_FOLDER, rank) as here:
                here.note(step, "data")
        raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")

    monkeypatch.setattr(launch, "run", time_out)
    monkeypatch.setattr(launch.stacks, "write_when_stopped", lambda: None)
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = TrainOptions(run_dir=tmp_path, timeout_seconds=5.0)
    with pytest.raises(RunFailed) as error:
        train(small_plan(pp=2), options, print)
    assert str(error.value) == (
        "rank 0 (pipeline stage 0) waited 5 s (--timeout) in a collective; furthest behind is rank 1 (pipeline stage "
        "1), at step 8, data"
    )
    level = waited(1, Layout(dp=2), tmp_path / "none", 5.0)
    assert level.how.endswith("each rank's calls are in its own output, where torchrun has stopped it")


def test_what_a_person_has_set_for_the_flight_recorder_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in flight_recorder.environment(tmp_path):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "5")
    flight_recorder.turn_on(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "5"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    for name in flight_recorder.environment(tmp_path):
        monkeypatch.delenv(name)


# ---- no orphans ------------------------------------------------------------------------------------------------


def test_ranks_that_hear_nothing_end_with_the_launcher(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.faults", str(tmp_path), "deaf"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    logs = [tmp_path / LOGS_FOLDER / f"rank_{rank}.log" for rank in range(4)]
    while not all(log.exists() and "in place" in log.read_text() for log in logs):
        assert run.poll() is None
        time.sleep(0.1)
    ranks = [process_of(tmp_path, rank) for rank in range(4)]
    assert all(map(alive, ranks))
    run.kill()
    run.wait()
    start = time.monotonic()
    while any(map(alive, ranks)):
        assert time.monotonic() - start < QUICK_SECONDS
        time.sleep(0.05)


# ---- full disks ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB; skipped where a test may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=10**10)
    with pytest.raises(InputError) as error:
        check_room(tmp_path / "not" / "there", model, torch.float32)
    needed, free = 12 * model.parameters, free_bytes(tmp_path)
    assert error.value.expected.startswith(f"{needed / 2**30:.2f} GiB free")
    assert float(error.value.got.split()[0]) == pytest.approx(free / 2**30, abs=1.0)
    check_room(tmp_path, tiny_llama(), torch.float32)


def test_a_full_disk_is_bad_input_before_the_start(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan()
    (small_disk / "other").write_bytes(bytes(free_bytes(small_disk)))
    with pytest.raises(InputError) as error:
        prepare(small_disk / "run", plan, steps=1, resume=False)
    assert error.value.got == "0.00 MiB free"
    monkeypatch.setattr(run_folder, "check_room", lambda *_: None)  # as if it had filled up just after
    with pytest.raises(InputError) as error:
        prepare(small_disk / "run", plan, steps=1, resume=False)
    assert error.value.what == f"{small_disk / 'run'} cannot be written"
    assert "No space left on device" in error.value.got
    assert error.value.got.endswith("; 0.00 MiB free")


def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint_whole(small_disk: Path) -> None:
    plan = small_plan(pp=2)
    options = TrainOptions(run_dir=small_disk / "run", steps=50, checkpoint_every=1)
    error = fail(plan, options, launch.run)
    assert "could not write a checkpoint: " in error.how
    assert f"MiB free in {options.run_dir}, the last complete checkpoint is step_1" in error.how
    folder = latest(options.run_dir)
    assert [path.name for path in folder.parent.iterdir()] == ["step_1"]  # and nothing half
    size = sum(path.stat().st_size for path in folder.iterdir())
    needed = checkpoint_bytes(plan.model, torch.float32)
    assert needed < size < needed + 200_000  # what torch writes about it
    assert steps_in(options.run_dir) == [1, 2]


def test_a_checkpoint_that_one_rank_cannot_write_names_it(tmp_path: Path) -> None:
    options = TrainOptions(run_dir=tmp_path, steps=6, checkpoint_every=2)
    error = fail(small_plan(pp=2), options, fill_disk_of_rank_one)
    assert (error.rank, error.stage, error.exit_code) == (1, 1, 1)
    assert "could not write a checkpoint: [Errno 28] No space left on device; " in error.how
    assert error.how.endswith(f" free in {tmp_path}, the last complete checkpoint is step_2")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def test_metrics_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    plan, metrics = small_plan(), tmp_path / "metrics.jsonl"
    prepare(tmp_path, plan, steps=5, resume=False)
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"rank 0 \(pipeline stage 0\) could not write") as error:
        start_ranks(plan, TrainOptions(run_dir=tmp_path, steps=5), launch.run)
    assert f"{metrics}: No space left on device; " in error.value.how
    assert error.value.how.endswith("there is no complete checkpoint")


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path: Path) -> None:
    for name in (".step_7.unfinished", ".step_5.discarded", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    prepare(tmp_path, small_plan(), steps=9, resume=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["notes"]


# ---- ports ---------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """This process is the only rank; gives a socket that listens where the ranks are to meet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        setting = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in setting.items():
            monkeypatch.setenv(name, str(value))
        yield server


def test_a_port_in_use_is_named(alone: socket.socket) -> None:
    with pytest.raises(InputError) as error, process_group(1, 5.0):
        pass
    assert error.value.what == f"port {alone.getsockname()[1]} is in use"
    assert error.value.where == "MASTER_ADDR and MASTER_PORT"


def test_the_timeout_holds_for_every_group(alone: socket.socket) -> None:
    alone.close()
    with process_group(1, 5.0):
        for group in (dist.group.WORLD, dist.new_group([0]), build_mesh(Layout(), "cpu", tied_embeddings=False)):
            first = group.groups("pp")[0] if isinstance(group, RankMesh) else group
            assert isinstance(first, dist.ProcessGroup)
            assert first._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(seconds=5.0)
    assert distributed_c10d.default_pg_timeout == datetime.timedelta(minutes=30)


# ---- what a rank tells ---------------------------------------------------------------------------------------


def test_what_a_rank_knows_reaches_the_launcher() -> None:
    failed = RunFailed("could not", rank=3, stage=1)
    again = retold(told(failed))
    assert isinstance(again, RunFailed)
    assert str(again) == str(failed) == "rank 3 (pipeline stage 1) could not"
    bad = InputError("wrong", where="here", expected="this", got="that", hint="so")
    assert str(retold(told(bad))) == str(bad)
    assert is_timeout(RuntimeError("Timed out waiting 2000ms for recv operation to complete"))
    wrapped = RuntimeError("[Stage 1] failed to run forward")
    assert not is_timeout(wrapped)
    wrapped.__cause__ = RuntimeError("Timed out waiting 2000ms for recv operation to complete")
    assert is_timeout(wrapped)
    assert not is_timeout(ValueError("timed out"))
    assert told(RuntimeError("Connection closed by peer"))["kind"] == "lost peer"
    assert told(RuntimeError("no such operator"))["kind"] == "raised"
    assert told(RuntimeError("Connection closed by peer"))["lines"][-1] == "RuntimeError: Connection closed by peer"
    assert retold(told(RuntimeError("Connection closed"))) is None
    assert [Interrupted(end).exit_code for end in (signal.SIGINT, signal.SIGTERM)] == [130, 143]
