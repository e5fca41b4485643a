"""What a run's folder holds, and how it is made ready for a fresh start or a resumed one."""

from __future__ import annotations

import datetime
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from planner.plan import Plan, save
from planner.record import PLAN_FILE, RECORD_FILE, put_plan
from profiles.input_error import InputError
from profiles.store import write_atomically

from .checkpoint_folder import STATE_FILE, RunState, complete_steps, latest, remove_unfinished, step_of
from .checkpoint_index import SafeReader
from .disk import check_room, unwritable_is_input_error
from .flight_recorder import PREFIX
from .leaving import REQUEST_FILE
from .metrics import METRICS_FILE

LOGS_FOLDER = "logs"
FORK_SERVER_LOG = "fork_server.log"
_OF_RANKS = ("rank_*.log", "rank_*.at", f"{PREFIX}*", REQUEST_FILE, FORK_SERVER_LOG)  # what a start leaves in its logs
_LOCK_FILE = ".lock"


def default_run_dir() -> Path:
    """runs/DATE-TIME below the current folder."""
    return Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def torchrun_needs_files() -> InputError:
    """The error for ranks of torchrun's or srun's that would each choose a plan or a folder of their own."""
    return InputError(
        "under torchrun and srun all ranks must be told the same plan and run folder",
        where="train",
        expected="a plan file and --run-dir FOLDER",
        got="the environment of a rank, and not both of them",
        hint="torchrun --nproc-per-node 2 cli.py train plan.yaml --run-dir runs/mine",
    )


def prepare(run_dir: Path, plan: Plan, *, steps: int, resume: bool, dtype: torch.dtype = torch.float32) -> None:
    """Write the plan and make metrics.jsonl end where training begins. By one process, before the ranks start.

    Raises InputError when `resume` finds no checkpoint, a damaged one, one of another run, or one that has all the
    `steps`; when a fresh run would mix its checkpoints with another's; when the folder cannot be written or has no
    room for a checkpoint of `dtype`.
    """
    done = _done(run_dir, resume)
    if done >= steps:
        raise InputError(
            f"the run in {run_dir} has nothing left to train",
            where="--steps",
            expected=f"more than the {done} steps of its last checkpoint",
            got=str(steps),
        )
    if resume:
        checkpoint = latest(run_dir)
        _check_same_run(RunState.read(checkpoint), plan, checkpoint)
        SafeReader(checkpoint)
    with unwritable_is_input_error(run_dir):
        remove_unfinished(run_dir)
    check_room(run_dir, plan.model, dtype)
    with unwritable_is_input_error(run_dir):
        put_plan(run_dir, plan, done) if resume else save(plan, run_dir / PLAN_FILE)
        _clear_logs(run_dir / LOGS_FOLDER)
        (run_dir / RECORD_FILE).unlink(missing_ok=True)
        metrics = run_dir / METRICS_FILE
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        write_atomically(metrics, "".join(line for line in lines if _is_before(line, done + 1)))


def _done(run_dir: Path, resume: bool) -> int:
    """Steps that are done when training begins."""
    if resume:
        return step_of(latest(run_dir))
    refuse_another_run(run_dir)
    return 0


def refuse_another_run(run_dir: Path) -> None:
    """Raise InputError where a run from the start would mix its checkpoints with those that are there."""
    steps = complete_steps(run_dir)
    if steps:
        raise InputError(
            f"{run_dir} holds a run already",
            where="--run-dir",
            expected="a folder without checkpoints for a run from the start",
            got=f"checkpoints up to step {max(steps)}",
            hint="--resume to go on with it, or another --run-dir",
        )


def _clear_logs(logs: Path) -> None:
    """Make the folder, and take what ranks of an earlier start have left there; what else a person has in it stays."""
    logs.mkdir(exist_ok=True)
    for pattern in _OF_RANKS:
        for file in logs.glob(pattern):
            file.unlink()


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """While this process trains into the folder no other on this machine does, nor where a shared disk has locks.

    Raises InputError if one does. The kernel lets go of the lock however the process ends.
    """
    with unwritable_is_input_error(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / _LOCK_FILE).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is writing into {run_dir}",
                where="--run-dir",
                expected="a folder that no process trains into",
                got=f"{run_dir / _LOCK_FILE} is held",
                hint="wait for it to end, or another --run-dir",
            ) from None
        except OSError:  # a disk without locks
            pass
        yield


def _check_same_run(state: RunState, plan: Plan, checkpoint: Path) -> None:
    """Raise InputError where the plan is not for what the checkpoint's run trains; layout and devices may change."""
    if plan.model != state.plan.model:
        raise InputError(
            "the plan is for another model than the run's",
            where="plan: model",
            expected=f"{state.plan.model.name} as in {checkpoint / STATE_FILE}",
            got=_what_differs(state.plan.model.to_dict(), plan.model.to_dict()),
            hint="another --run-dir for another model",
        )
    for name in ("global_batch", "sequence"):
        before, now = getattr(state.plan.job, name), getattr(plan.job, name)
        if before != now:
            raise InputError(
                "the plan's steps see other samples than the run's",
                where=f"plan: job.{name}",
                expected=f"{before}, as in {checkpoint / STATE_FILE}: which samples a step sees follows from it",
                got=str(now),
                hint="plan with the run's --global-batch and --seq, or start another run",
            )


def _what_differs(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [f"{key} {now.get(key)}, not {value}" for key, value in before.items() if now.get(key) != value]
    return ", ".join(changed) or "a model with more to it"


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] < step
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return False
