"""What a run writes while it trains: a JSON line a step, and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to metrics.jsonl, each line flushed at once, and scalars to TensorBoard in the same folder."""

    def __init__(self, run_dir: Path) -> None:
        # Slow to import, and needed on one rank only.
        from torch.utils.tensorboard import SummaryWriter

        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._events = SummaryWriter(log_dir=str(run_dir))

    def write(self, record: dict[str, Any]) -> None:
        """One step's record; its `step` is the x axis of every other number."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self._events.add_scalar(name, value, record["step"])

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
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
