"""What a run's folder holds, and how it is made ready for a fresh start or a resumed one."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import torch

from planner.plan import Plan, save
from planner.record import PLAN_FILE, RECORD_FILE
from profiles.input_error import InputError
from profiles.store import write_atomically

from .checkpoint import latest, remove_unfinished, step_of
from .disk import check_room, unwritable_is_input_error
from .metrics import METRICS_FILE

LOGS_FOLDER = "logs"


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

    Raises InputError when `resume` finds no checkpoint or one that has all the `steps`, or the folder cannot
    be written or has no room for a checkpoint of `dtype`.
    """
    first_step = step_of(latest(run_dir)) + 1 if resume else 1
    if first_step > steps:
        raise InputError(
            f"the run in {run_dir} has nothing left to train",
            where="--steps",
            expected=f"more than the {first_step - 1} steps of its last checkpoint",
            got=str(steps),
        )
    with unwritable_is_input_error(run_dir):
        remove_unfinished(run_dir)
    check_room(run_dir, plan.model, dtype)
    with unwritable_is_input_error(run_dir):
        save(plan, run_dir / PLAN_FILE)
        shutil.rmtree(run_dir / LOGS_FOLDER, ignore_errors=True)
        (run_dir / LOGS_FOLDER).mkdir()
        (run_dir / RECORD_FILE).unlink(missing_ok=True)
        metrics = run_dir / METRICS_FILE
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        write_atomically(metrics, "".join(line for line in lines if _is_before(line, first_step)))


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] < step
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return False
