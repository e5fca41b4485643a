"""Checkpoints as folders: their names, what one says of its run, and how one takes its place or goes. Without torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.plan import SCHEMA as PLAN_SCHEMA
from planner.plan import Plan
from profiles.input_error import InputError
from profiles.store import dump_yaml, load_document

FOLDER = "checkpoints"
STATE_FILE = "run.yaml"
SCHEMA = "meshwright.checkpoint/v1"
_COMPLETE = re.compile(r"step_(\d+)")
_UNFINISHED = re.compile(r"\.step_\d+\.(unfinished|discarded)")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint holds beside its tensors.

    `step` steps are done, and with them `samples` sequences of the data's order are used up, those of skipped steps
    too. Nothing random runs in training but first values and the data's order, both pure functions of the seed, so
    that `step` and the seed in `settings` are the generators' whole state. `settings` are plain values by the names
    of whoever started the run (the command line's options), from which a resume goes on.
    """

    step: int
    samples: int
    plan: Plan
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        """From the folder of a checkpoint; an InputError names file and key path of whatever is wrong."""
        reader = load_document(checkpoint / STATE_FILE, schema=SCHEMA, kind="checkpoint's run")
        plan = reader.child("plan")
        plan.text("schema", choices=(PLAN_SCHEMA,))
        state = cls(
            step=reader.integer("step"),
            samples=reader.integer("samples"),
            plan=Plan.from_dict(plan),
            settings=reader.plain("settings"),
        )
        reader.finish()
        if state.step != step_of(checkpoint):
            raise reader.fail("step", f"{step_of(checkpoint)}, as the folder is named", state.step)
        return state


class StateText:
    """The text of STATE_FILE for any step of a run; what does not change is put into words once."""

    def __init__(self, plan: Plan, settings: Mapping[str, Any]) -> None:
        self._samples_per_step = plan.job.global_batch
        self._rest = dump_yaml({"plan": plan.to_dict(), "settings": dict(settings)})

    def at(self, step: int) -> str:
        return f"schema: {SCHEMA}\nstep: {step}\nsamples: {step * self._samples_per_step}\n{self._rest}"


def latest(run_dir: Path) -> Path:
    """The checkpoint with the highest step; an InputError when there is none."""
    folder, steps = run_dir / FOLDER, complete_steps(run_dir)
    if not steps:
        raise InputError(
            f"{run_dir} has no checkpoint to resume from",
            where=str(folder),
            expected="a folder named step_N",
            got=", ".join(_names(folder)) or "nothing",
            hint="name a run that wrote a checkpoint, or start one without --resume",
        )
    return folder / f"step_{max(steps)}"


def complete_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that are whole."""
    return [int(match.group(1)) for name in _names(run_dir / FOLDER) if (match := _COMPLETE.fullmatch(name))]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def unfinished(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is whole."""
    return run_dir / FOLDER / f".step_{step}.unfinished"


def publish(run_dir: Path, step: int) -> Path:
    """Give the written checkpoint of `step` its place; by one process, when every rank has written its part.

    The name appears when all below it is on the disk, so that a run killed at any moment, or a machine that loses its
    power, leaves whole checkpoints only. An older one of the same step, which a resume from before it has made
    obsolete, is moved aside first.
    """
    written, target = unfinished(run_dir, step), run_dir / FOLDER / f"step_{step}"
    _sync(written / STATE_FILE)  # torch has synced its own files
    _sync(written)
    _discard(target)
    os.replace(written, target)
    _sync(target.parent)
    return target


def keep_newest(run_dir: Path, count: int) -> None:
    """Delete all whole checkpoints but the `count` newest; 0 keeps all."""
    if count > 0:
        for step in sorted(complete_steps(run_dir))[:-count]:
            _discard(run_dir / FOLDER / f"step_{step}")


def remove_unfinished(run_dir: Path) -> None:
    """Delete what a run that was killed while writing or deleting a checkpoint has left."""
    for name in _names(run_dir / FOLDER):
        if _UNFINISHED.fullmatch(name):
            shutil.rmtree(run_dir / FOLDER / name)


def size_bytes(checkpoint: Path) -> int:
    """Of all files in the folder of a checkpoint."""
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that none that is half deleted ever has a whole one's name."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f".{checkpoint.name}.discarded")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        shutil.rmtree(aside)


def _sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []
