"""A run's checkpoint in one process: any tensor of it whole, whatever layout wrote it, one at a time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from profiles.input_error import InputError

from .checkpoint_folder import FOLDER, complete_steps, latest
from .checkpoint_index import SafeReader


def checkpoint_of(run_dir: Path, step: int | None) -> Path:
    """The run's checkpoint of that step, or its last; an InputError names the steps that there are."""
    if step is None:
        return latest(run_dir)
    steps = sorted(complete_steps(run_dir))
    if step not in steps:
        raise InputError(
            f"{run_dir} has no checkpoint of step {step}",
            where="--step",
            expected="one of " + ", ".join(map(str, steps)) if steps else "a run with checkpoints",
            got=str(step),
        )
    return run_dir / FOLDER / f"step_{step}"


class CheckpointReader:
    """The parameters and trained buffers in a checkpoint by name.

    Raises InputError where the folder is not such a checkpoint or a file of it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = SafeReader(folder)
        self._metadata = self._files.read_metadata()

    def require(self, name: str, shape: torch.Size) -> None:
        """Raise InputError unless the checkpoint has a tensor of this name and whole shape."""
        got = self._entry(name).size
        if got != shape:
            raise InputError(
                f"{self.folder} has another shape than the plan's model",
                where=f"{self.folder}: {name}",
                expected=str(list(shape)),
                got=str(list(got)),
            )

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in the dtype of the checkpoint."""
        entry = self._entry(name)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
                state_dict_loader.load({f"model.{name}": tensor}, storage_reader=self._files, no_dist=True)
        except CheckpointException as error:  # a BaseException, which `except Exception` misses
            raise self._unreadable(next(iter(error.failures.values()))) from None
        except (OSError, EOFError, RuntimeError) as error:
            raise self._unreadable(error) from None
        return tensor

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(f"model.{name}")
        if not isinstance(entry, TensorStorageMetadata):
            raise InputError(
                f"{self.folder} lacks a parameter of the plan's model",
                where=f"{self.folder}: {name}",
                expected=f"the tensor {name}",
                got="no such tensor",
            )
        return entry

    def _unreadable(self, error: Any) -> InputError:
        return InputError(
            f"{self.folder} cannot be read",
            where=str(self.folder),
            expected="a whole checkpoint",
            got=(str(error).splitlines() or [repr(error)])[0],
        )
