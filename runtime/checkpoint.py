"""Checkpoints that load under any layout: parameters and optimizer state by name, by torch.distributed.checkpoint."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from profiles.input_error import InputError

from .parameters import named_parameters
from .transformer import Chunk

FOLDER = "checkpoints"
_COMPLETE = re.compile(r"step_(\d+)")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run_dir: Path, step: int, chunk: Chunk, optimizer: torch.optim.AdamW) -> Path:
    """Write run_dir/checkpoints/step_<step>. Every rank must call it.

    Written beside its place and renamed when it is whole, so that a killed run leaves no half checkpoint.
    """
    target = run_dir / FOLDER / f"step_{step}"
    unfinished = target.with_name(f".{target.name}.unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    state_dict_saver.save(_state(chunk, optimizer, step), checkpoint_id=str(unfinished))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
    dist.barrier()
    return target


def load(folder: Path, chunk: Chunk, optimizer: torch.optim.AdamW) -> int:
    """Read a checkpoint into a chunk and its optimizer, in place, whatever layout wrote it; returns its step."""
    state = _state(chunk, optimizer, 0)
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
    return int(state["step"].item())


def latest(run_dir: Path) -> Path:
    """The checkpoint with the highest step; an InputError when there is none."""
    folder = run_dir / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    steps = [int(match.group(1)) for name in names if (match := _COMPLETE.fullmatch(name))]
    if not steps:
        raise InputError(
            f"{run_dir} has no checkpoint to resume from",
            where=str(folder),
            expected="a folder named step_N",
            got=", ".join(sorted(names)) or "nothing",
            hint="start without --resume",
        )
    return folder / f"step_{max(steps)}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def _state(chunk: Chunk, optimizer: torch.optim.AdamW, step: int) -> dict[str, Any]:
    """The tensors themselves by name, so that loading writes into them. Moments that are not there yet are made."""
    state: dict[str, Any] = {"step": torch.tensor(step)}
    for name, parameter in named_parameters(chunk):
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in _MOMENTS:
                moments[moment] = torch.zeros_like(parameter)
        state[f"model.{name}"] = parameter.detach()
        for key in ("step", *_MOMENTS):
            state[f"optimizer.{name}.{key}"] = moments[key]
    return state
