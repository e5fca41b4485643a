"""A run that is killed, told to leave or loses ranks, and goes on: nothing that a checkpoint held is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from planner.plan import Plan, load, save
from profiles.parent_process import die_with_parent
from runtime.checkpoint_folder import FOLDER, complete_steps, latest, step_of
from runtime.checkpoint_index import SafeReader
from runtime.data.data_options import DataOptions
from runtime.launch import train
from runtime.leaving import Left
from runtime.trainer import TrainOptions
from tests.distributed.faults import small_plan
from tests.distributed.harness import fork
from tests.distributed.test_launch import alive, process_of, steps_in
from tests.test_replanning import plan_for

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 40, 5
MOMENTS = random.Random(20261128)  # of the kills


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to read in no time; what differs between samples is enough to tell steps apart."""
    path = tmp_path_factory.mktemp("data") / "text"
    words = random.Random(1)
    path.write_text(" ".join(str(words.random()) for _ in range(3000)))
    return path


def records(run_dir: Path, first: int | None = None) -> list[dict[str, Any]]:
    """Of the first so many steps; a killed run may have left half a line after them."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[:first]]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return found


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir)]


def one_rank(options: TrainOptions, plan: Plan | None = None) -> int:
    """Train as the only rank of torchrun's would, in a process of its own, whose id this returns; see `ended`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    process = fork()
    if process > 0:
        return process
    code = 1
    try:
        rank = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in rank.items()})
        output = os.open(options.run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        torch.set_num_threads(1)
        train(plan or small_plan(), options, lambda _: None)
        code = 0
    except Left as left:
        options.run_dir.with_suffix(".left").write_text(str(left))
        code = 7
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def newest_line(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def check_kept(run_dir: Path, before: list[int], keep: int) -> list[int]:
    """The checkpoints after a kill: the newest are no older than before it, and whole."""
    now = complete_steps(run_dir)
    assert len(now) >= min(len(before), keep)
    assert max(now, default=0) >= max(before, default=0)
    assert all(step % EVERY == 0 for step in now)
    for step in now:
        SafeReader(run_dir / FOLDER / f"step_{step}")
    return now


def reading(text: Path) -> DataOptions:
    return DataOptions(paths=(str(text),))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> list[float]:
    """Losses of a run that nothing happens to."""
    options = TrainOptions(run_dir=tmp_path_factory.mktemp("whole") / "run", steps=STEPS, data=reading(text))
    assert ended(one_rank(options)) == 0
    return losses(options.run_dir)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "beside"])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(
    asynchronous: bool, tmp_path: Path, text: Path, whole: list[float]
) -> None:
    options = TrainOptions(
        run_dir=tmp_path / "killed",
        steps=STEPS,
        data=reading(text),
        checkpoint_every=EVERY,
        keep_checkpoints=2,
        async_checkpoint=asynchronous,
    )
    before: list[int] = []
    process = one_rank(options)
    until(lambda: newest_line(options.run_dir) > EVERY)
    time.sleep(MOMENTS.uniform(0.0, 0.05))
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    before = check_kept(options.run_dir, before, 2)
    assert ended(one_rank(replace(options, resume=bool(before)))) == 0
    assert losses(options.run_dir) == pytest.approx(whole, rel=1e-5)
    assert len(set(whole)) == STEPS
    assert sorted(complete_steps(options.run_dir)) == [STEPS - EVERY, STEPS]


def ranks_run(run_dir: Path) -> bool:
    """Whether both ranks of the newest start have begun."""
    logs = [run_dir / "logs" / f"rank_{rank}.log" for rank in (0, 1)]
    return all(log.exists() and "process" in log.read_text() for log in logs) and all(
        alive(process_of(run_dir, rank)) for rank in (0, 1)
    )


@pytest.mark.full
def test_20_kills_of_launcher_and_ranks_lose_no_checkpoint(tmp_path: Path, text: Path) -> None:
    """Two ranks under our launcher, which the kernel kills with it, at 20 moments from their start on."""
    run_dir, before = tmp_path / "run", list[int]()
    for _ in range(20):
        killed_after(run_dir, text, lambda: ranks_run(run_dir), MOMENTS.uniform(0.0, 1.0))
        before = check_kept(run_dir, before, 3)
    assert before
    kept = max(before)
    killed_after(tmp_path / "whole", text, lambda: newest_line(tmp_path / "whole") > kept, 0.0)
    found, whole = ([record["loss"] for record in records(folder, kept)] for folder in (run_dir, tmp_path / "whole"))
    assert found == pytest.approx(whole, rel=1e-5)
    assert len(set(whole)) == kept


def killed_after(run_dir: Path, text: Path, condition: Callable[[], bool], seconds: float) -> None:
    """Start the run, or go on with it, and kill its launcher so many seconds after the condition holds."""
    command = [sys.executable, "-m", "tests.distributed.faults", str(run_dir), "1000000", str(text)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    until(lambda: condition() or run.poll() is not None, 120.0)
    time.sleep(seconds)
    assert run.poll() is None
    ranks = [process_of(run_dir, rank) for rank in (0, 1)]
    run.kill()
    run.wait()
    until(lambda: not any(map(alive, ranks)))


def test_a_time_limit_leaves_with_a_checkpoint(tmp_path: Path, text: Path) -> None:
    """Of a rank with a checkpoint every 60 ms besides, of which two stay, written while it trains."""
    options = TrainOptions(
        run_dir=tmp_path / "run",
        steps=100_000,
        data=reading(text),
        checkpoint_minutes=0.001,
        keep_checkpoints=2,
        async_checkpoint=True,
        time_limit_seconds=4.5,
    )
    assert ended(one_rank(options)) == 7
    said = options.run_dir.with_suffix(".left").read_text()
    found = records(options.run_dir)
    last = found[-1]["step"]
    assert f"left after step {last} of 100000, asked by the time limit of 0.075 minutes" in said
    assert step_of(latest(options.run_dir)) == last
    assert len(complete_steps(options.run_dir)) == 2
    written = [record for record in found if "checkpoint_seconds" in record]
    assert len(written) >= 3
    size = sum(file.stat().st_size for file in latest(options.run_dir).iterdir())
    for record in written:
        assert 0 < record["checkpoint_stall_seconds"] < record["checkpoint_seconds"] < 1.5
        assert record["checkpoint_bytes"] == pytest.approx(size, rel=0.02)
    assert not (options.run_dir / "record.yaml").exists()


def test_sigterm_to_launcher_and_ranks_leaves_with_a_checkpoint(tmp_path: Path, text: Path) -> None:
    """To all of them, as a batch system sends it; the exit code is 75, and the same command with --resume goes on."""
    save(plan_for(tmp_path, devices=2, pins=("pp=2",)), tmp_path / "plan.yaml")
    run_dir = tmp_path / "run"
    command = [sys.executable, "cli.py", "train", str(tmp_path / "plan.yaml"), "--run-dir", str(run_dir)]
    run = subprocess.Popen(
        [*command, "--steps", "100000", "--data", str(text), "--lr", "0.001"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    until(lambda: newest_line(run_dir) >= 3)
    ranks = [process_of(run_dir, rank) for rank in (0, 1)]
    os.killpg(run.pid, signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 75, said
    assert not any(map(alive, ranks))
    last = steps_in(run_dir)[-1]
    assert f"left after step {last} of 100000, asked by SIGTERM" in said
    assert complete_steps(run_dir) == [last]


# ---- elastic -------------------------------------------------------------------------------------------------


def agent(port: int, folder: Path, text: Path, number: int) -> subprocess.Popen[str]:
    """torchrun with one rank, of up to four; they meet at `port`, in this process, which outlives them."""
    meeting = f"--rdzv-id life --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} "
    meeting += "--rdzv-conf is_host=0,last_call_timeout=2,join_timeout=120"
    torchrun = f"--nnodes 1:4 --nproc-per-node 1 --max-restarts 3 --monitor-interval 0.2 {meeting}"
    train = f"--elastic --steps {STEPS} --checkpoint-every {EVERY} --data {text} --lr 0.001 --warmup 10"
    command = f"{torchrun} cli.py train {folder / 'plan.yaml'} --run-dir {folder / 'run'} {train}"
    with (folder / f"agent_{number}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command.split()],
            cwd=ROOT,
            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=die_with_parent,
        )


def rank_under(process: int) -> int:
    """The rank that an agent has started."""
    (child,) = map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    environment = Path(f"/proc/{child}/environ").read_text().split("\0")
    return next(int(setting.removeprefix("RANK=")) for setting in environment if setting.startswith("RANK="))


@pytest.mark.full
@pytest.mark.parametrize("killed", [0, 2])
def test_an_elastic_run_loses_a_node_and_goes_on(killed: int, tmp_path: Path, text: Path) -> None:
    """One of four agents is killed, that of rank 0 or another: the three left plan anew and go on by themselves."""
    plan, run_dir = plan_for(tmp_path), tmp_path / "run"
    save(plan, tmp_path / "plan.yaml")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents = [agent(store.port, tmp_path, text, number) for number in range(4)]
    try:
        until(lambda: newest_line(run_dir) >= STEPS // 2, 240.0)
        victim = next(run for run in agents if rank_under(run.pid) == killed)
        victim.kill()
        for run in agents:
            assert run.wait(timeout=300) == (-signal.SIGKILL if run is victim else 0)
    finally:
        for run in agents:
            run.kill()
    assert load(run_dir / "plan.yaml").layout.world_size == 3
    assert [load(path) for path in run_dir.glob("plan_until_step_*.yaml")] == [plan]
    options = TrainOptions(
        run_dir=tmp_path / "whole",
        steps=STEPS,
        data=reading(text),
        learning_rate=1e-3,
        warmup_steps=10,
        min_learning_rate=3e-4,
    )
    assert ended(one_rank(options, plan_for(tmp_path, devices=1))) == 0
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert max(complete_steps(run_dir)) == STEPS
