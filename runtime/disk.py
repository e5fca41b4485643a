"""A run folder whose disk is full: found before the start where it can be, told with what is free where it cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from planner.layout import Layout
from profiles.input_error import InputError
from profiles.model import ModelSpec

from .checkpoint_folder import complete_steps
from .failure import RunFailed, is_full_disk
from .mesh import coordinate_of

_STATES = 3  # that a checkpoint holds of each parameter: itself and AdamW's two moments


def checkpoint_bytes(model: ModelSpec, dtype: torch.dtype) -> int:
    """Of one checkpoint; what torch writes about it comes on top."""
    return _STATES * model.parameters * dtype.itemsize


def free_bytes(folder: Path) -> int:
    """What a process of ours may still write to the disk of `folder`, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def check_room(run_dir: Path, model: ModelSpec, dtype: torch.dtype) -> None:
    """Raise InputError where not even one checkpoint fits: a run always ends with one."""
    needed, free = checkpoint_bytes(model, dtype), free_bytes(run_dir)
    if free < needed:
        raise InputError(
            f"{run_dir} has no room for a checkpoint",
            where=str(run_dir),
            expected=f"{_size(needed)} free, for parameters and two moments of AdamW",
            got=f"{_size(free)} free",
            hint="--run-dir on a disk with room",
        )


@contextmanager
def unwritable_is_input_error(run_dir: Path) -> Iterator[None]:
    """While the folder is made ready: what cannot be written there is a person's to put right."""
    try:
        yield
    except (OSError, InputError) as error:
        got = error.got if isinstance(error, InputError) else str(error)
        raise InputError(
            f"{run_dir} cannot be written",
            where=str(run_dir),
            expected="a folder with room that may be written to",
            got=f"{got}; {_size(free_bytes(run_dir))} free",
            hint="--run-dir on another disk",
        ) from None


@contextmanager
def full_disk_ends_run(run_dir: Path, layout: Layout) -> Iterator[None]:
    """While a rank trains: a full or broken disk is told as a RunFailed that names who could not write what."""
    try:
        yield
    except CheckpointException as error:  # of `save`; every rank gets the same
        rank = min(error.failures)
        reason = error.failures[rank][0]
        raise _failed(rank, layout, run_dir, "a checkpoint", str(reason) or repr(reason)) from error
    except (OSError, InputError) as error:
        cause = error.__cause__ if isinstance(error, InputError) else error
        if not isinstance(cause, OSError) or not is_full_disk(cause):
            raise
        what = error.where if isinstance(error, InputError) else str(cause.filename or "to the run folder")
        raise _failed(dist.get_rank(), layout, run_dir, what, str(cause.strerror)) from error


def _failed(rank: int, layout: Layout, run_dir: Path, what: str, reason: str) -> RunFailed:
    return RunFailed(
        f"could not write {what}: {reason.splitlines()[0]}; {_size(free_bytes(run_dir))} free in {run_dir}, "
        f"{last_checkpoint(run_dir)}",
        rank=rank,
        stage=coordinate_of(rank, layout).pp,
    )


def last_checkpoint(run_dir: Path) -> str:
    """What --resume would go on from, in words."""
    steps = complete_steps(run_dir)
    return f"the last complete checkpoint is step_{max(steps)}" if steps else "there is no complete checkpoint"


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.2f} MiB"
