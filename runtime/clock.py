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
    _spans: list[tuple[str, Any, Any, str]] = field(default_factory=list)

    def point(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def add(self, name: str, start: Any, action: str = "") -> None:
        """Book the span from `start` to now under `name`; `action` is what it is called in a timeline, if it is."""
        self._spans.append((name, start, self.point(), action))

    def read(self) -> dict[str, float]:
        """Seconds under each name since the last read."""
        self._catch_up()
        sums: dict[str, float] = {}
        for name, start, end, _ in self._spans:
            sums[name] = sums.get(name, 0.0) + self._seconds(start, end)
        self._spans.clear()
        return sums

    def actions(self, zero: Any) -> list[tuple[str, float, float]]:
        """Of the spans since the last read those that are actions, with begin and end in seconds from `zero`."""
        self._catch_up()
        found = [(action, start, end) for _, start, end, action in self._spans if action]
        return [(action, self._seconds(zero, start), self._seconds(zero, end)) for action, start, end in found]

    def _catch_up(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
