"""Seconds between two points of a step, on the host or on the device's stream."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Clock:
    """Sums seconds under names, from one `read` to the next.

    CUDA runs behind the host, so there points are events on the stream and the sums are taken once, by
    `read`, after the device has caught up.
    """

    device: torch.device
    _spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def point(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def add(self, name: str, start: Any) -> None:
        """Book the span from `start` to now under `name`."""
        self._spans.append((name, start, self.point()))

    def read(self) -> dict[str, float]:
        """Seconds under each name since the last read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            seconds = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            sums[name] = sums.get(name, 0.0) + seconds
        self._spans.clear()
        return sums
