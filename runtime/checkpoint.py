"""Checkpoints that load under any layout: parameters and optimizer state by name, by torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from profiles.input_error import InputError
from profiles.store import write_atomically

from .checkpoint_folder import STATE_FILE, publish, unfinished
from .checkpoint_index import SafeReader
from .local_parameters import local_part
from .loss_scale import LossScaler
from .parameters import named_buffers, named_parameters, tied_copies
from .transformer import Chunk

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LOSS_SCALE = "loss_scale"


def begin(run_dir: Path, step: int, about: str, group: dist.ProcessGroup | None = None) -> Path:
    """An empty folder for the checkpoint of `step`, with `about` (see StateText) in it. Every rank must call it."""
    folder = unfinished(run_dir, step)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(folder / STATE_FILE, about)
    dist.barrier(group)
    return folder


def save(
    run_dir: Path,
    step: int,
    chunks: Sequence[Chunk],
    optimizer: torch.optim.AdamW,
    about: str,
    scaler: LossScaler | None = None,
) -> None:
    """Write run_dir/checkpoints/step_<step>. Every rank must call it.

    Written beside its place and renamed when it is whole, so that a killed run leaves no half checkpoint.
    Raises CheckpointException, on every rank, when one cannot write its part.
    """
    folder = begin(run_dir, step, about)
    try:
        state_dict_saver.save(state_of(chunks, optimizer, step, scaler), checkpoint_id=str(folder))
    except CheckpointException:  # on every rank, whichever could not write
        give_up(folder)
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        publish(run_dir, step)
    dist.barrier()


def give_up(folder: Path) -> None:
    """Delete what was written of a checkpoint that will not be whole: a full disk has better uses."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: Path, chunks: Sequence[Chunk], optimizer: torch.optim.AdamW, scaler: LossScaler | None = None) -> int:
    """Read a checkpoint into a rank's chunks, their optimizer and loss scale, in place, whatever layout wrote it.

    A run that went on in another precision until then has left no loss scale: it begins as a new run's. Returns the
    checkpoint's step.
    """
    reader = SafeReader(folder)
    scaled = scaler is not None and _LOSS_SCALE in reader.read_metadata().state_dict_metadata
    state = state_of(chunks, optimizer, 0, scaler if scaled else None)
    try:
        state_dict_loader.load(state, storage_reader=reader)
    except CheckpointException as error:  # a BaseException, which `except Exception` misses
        reason = next(iter(error.failures.values()))
        raise InputError(
            f"{folder} cannot be loaded",
            where=str(folder),
            expected="a checkpoint of this plan's model",
            got=str(reason).splitlines()[0] if str(reason) else repr(reason),
        ) from None
    _refresh_tied(chunks, optimizer)
    if scaler is not None and scaled:
        scaler.load(state[_LOSS_SCALE])
    return int(state["step"].item())


def state_of(
    chunks: Sequence[Chunk], optimizer: torch.optim.AdamW, step: int, scaler: LossScaler | None = None
) -> dict[str, Any]:
    """The tensors themselves by name, so that loading writes into them. Moments that are not there yet are made.

    A rank that holds two copies of a tied matrix saves the last; `_refresh_tied` fills the other.
    """
    state: dict[str, Any] = {"step": torch.tensor(step)}
    if scaler is not None:
        state[_LOSS_SCALE] = scaler.state()
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
