"""What a run writes while it trains: a JSON line a step, and TensorBoard events."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

METRICS_FILE = "metrics.jsonl"


def only_finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for numbers that are not finite, which JSON has no words for."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


class LineFile:
    """Appends to a file, each line written at once; an OSError that a full disk raises names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Without a buffer: what could not be written would be tried again on closing, and raise again.
        self._file = path.open("ab", buffering=0)
        self.close = self._file.close

    def write(self, text: str) -> None:
        line = text.encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


class MetricsWriter:
    """Appends records to metrics.jsonl, a line each, and scalars to TensorBoard in the same folder."""

    def __init__(self, run_dir: Path) -> None:
        # Slow to import, and needed on one rank only.
        from torch.utils.tensorboard import SummaryWriter

        self._file = LineFile(run_dir / METRICS_FILE)
        self._events = SummaryWriter(log_dir=str(run_dir))

    def write(self, record: dict[str, Any]) -> None:
        """One step's record; its `step` is the x axis of every other number."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        for name, value in record.items():
            if name != "step" and value is not None:
                self._events.add_scalar(name, value, record["step"])

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        with suppress(OSError) if error is not None else nullcontext():  # the first error tells more
            self._events.close()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: the CUDA allocator's peak, on a CPU the process's resident set.

    The resident set counts Python and torch too. Read from /proc, since getrusage carries the parent's peak
    over into a process that was started by fork and exec.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")
