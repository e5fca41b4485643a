"""Checkpoints that load under any layout: parameters and optimizer state by name, by torch.distributed.checkpoint."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from profiles.input_error import InputError

from .local_parameters import local_part
from .parameters import named_buffers, named_parameters, tied_copies
from .transformer import Chunk

FOLDER = "checkpoints"
_COMPLETE = re.compile(r"step_(\d+)")
_UNFINISHED = re.compile(r"\.step_\d+\.unfinished")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run_dir: Path, step: int, chunks: Sequence[Chunk], optimizer: torch.optim.AdamW) -> Path:
    """Write run_dir/checkpoints/step_<step>. Every rank must call it.

    Written beside its place and renamed when it is whole, so that a killed run leaves no half checkpoint.
    Raises CheckpointException, on every rank, when one cannot write its part.
    """
    target = run_dir / FOLDER / f"step_{step}"
    unfinished = target.with_name(f".{target.name}.unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    try:
        state_dict_saver.save(_state(chunks, optimizer, step), checkpoint_id=str(unfinished))
    except CheckpointException:  # on every rank, whichever could not write
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk has better uses
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
    dist.barrier()
    return target


def load(folder: Path, chunks: Sequence[Chunk], optimizer: torch.optim.AdamW) -> int:
    """Read a checkpoint into a rank's chunks and their optimizer, in place, whatever layout wrote it.

    Returns its step.
    """
    state = _state(chunks, optimizer, 0)
    try:
        state_dict_loader.load(state, checkpoint_id=str(folder))
    except CheckpointException as error:  # a BaseException, which `except Exception` misses
        reason = next(iter(error.failures.values()))
        raise InputError(
            f"{folder} cannot be loaded",
            where=str(folder),
            expected="a checkpoint of this plan's model",
            got=str(reason).splitlines()[0] if str(reason) else repr(reason),
        ) from None
    _refresh_tied(chunks, optimizer)
    return int(state["step"].item())


def latest(run_dir: Path) -> Path:
    """The checkpoint with the highest step; an InputError when there is none."""
    folder, steps = run_dir / FOLDER, complete_steps(run_dir)
    if not steps:
        raise InputError(
            f"{run_dir} has no checkpoint to resume from",
            where=str(folder),
            expected="a folder named step_N",
            got=", ".join(_names(folder)) or "nothing",
            hint="start without --resume",
        )
    return folder / f"step_{max(steps)}"


def complete_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that are whole."""
    return [int(match.group(1)) for name in _names(run_dir / FOLDER) if (match := _COMPLETE.fullmatch(name))]


def remove_unfinished(run_dir: Path) -> None:
    """Delete what a run that was killed while writing a checkpoint has left."""
    for name in _names(run_dir / FOLDER):
        if _UNFINISHED.fullmatch(name):
            shutil.rmtree(run_dir / FOLDER / name)


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def _state(chunks: Sequence[Chunk], optimizer: torch.optim.AdamW, step: int) -> dict[str, Any]:
    """The tensors themselves by name, so that loading writes into them. Moments that are not there yet are made.

    A rank that holds two copies of a tied matrix saves the last; `_refresh_tied` fills the other.
    """
    state: dict[str, Any] = {"step": torch.tensor(step)}
    state |= {f"model.{name}": buffer for name, buffer in named_buffers(chunks)}
    for name, parameter in named_parameters(chunks):
        moments = moments_of(optimizer, parameter)
        state[f"model.{name}"] = parameter.detach()
        for key in ("step", *_MOMENTS):
            state[f"optimizer.{name}.{key}"] = moments[key]
    return state


def moments_of(optimizer: torch.optim.AdamW, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter, made as torch makes it in the first step if it is not there yet."""
    moments = optimizer.state[parameter]
    if not moments:
        moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in _MOMENTS:
            moments[moment] = torch.zeros_like(parameter)
    return moments


def _refresh_tied(chunks: Sequence[Chunk], optimizer: torch.optim.AdamW) -> None:
    """Where one rank holds both copies of a tied matrix, give the first what was loaded into the last."""
    copies = [copy for copy, _ in tied_copies(chunks)]
    if len(copies) < 2:
        return
    stale, loaded = copies
    with torch.no_grad():
        local_part(stale).copy_(local_part(loaded))
        for key in ("step", *_MOMENTS):
            target, source = (moments_of(optimizer, copy)[key] for copy in (stale, loaded))
            local_part(target).copy_(local_part(source))
