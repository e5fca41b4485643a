"""A window of steps under torch's profiler, and when each action of the schedule ran on each rank.

[Note: Timelines]
RUN/trace/rank_N.json.gz is what torch's profiler saw on rank N. RUN/trace/measured.json has the actions of all ranks,
as Chrome-trace JSON: a process a rank, in it a thread that `planner/timeline.py` lays the planned actions beside, under
the same names (`1F0` is the forward of microbatch 0 on stage 1). Seconds count from a barrier before the window, on a
GPU those of its stream. Ranks leave a barrier one after another, on busy processors some milliseconds apart; those of
one machine share its clock, and count from when the first of them by number left. While the window is open no operation
is timed on its own, since that would take away overlap.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from planner.layout import Layout
from planner.trace_names import MEASURED, action_event, track_names
from profiles.probes.topology import node_identity
from profiles.store import write_atomically

from .clock import Clock

TRACE_FOLDER = "trace"
MEASURED_FILE = "measured.json"


class TraceWindow:
    """Call `before` and `after` around every step, on every rank; outside of the window they do nothing."""

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, clock: Clock, layout: Layout) -> None:
        self.steps = range(steps[0], steps[1] + 1) if steps is not None else range(0)
        self._folder, self._clock, self._layout = run_dir / TRACE_FOLDER, clock, layout
        self._profiler: Any = None
        self._zero: Any = None
        self._zero_seconds = 0.0  # of the machine's own
        self._events: list[dict[str, Any]] = []

    def before(self, step: int, last_of_run: int) -> None:
        """Open the window at its first step; it closes with the run at the latest."""
        if step not in self.steps:
            return
        if self._profiler is None:
            self.steps = range(step, min(self.steps[-1], last_of_run) + 1)
            cuda = self._clock.device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            self._profiler = profile(activities=activities)
            self._profiler.start()
            dist.barrier()
            self._zero, now = self._clock.point(), time.perf_counter()
            self._zero_seconds = now - _first_of_machine(now)

    def after(self, step: int) -> None:
        """Keep the step's actions, and at the end of the window write what was seen. Before the clock is read."""
        if step not in self.steps:
            return
        rank = dist.get_rank()
        for action, *span in self._clock.actions(self._zero):
            start, end = (self._zero_seconds + seconds for seconds in span)
            self._events.append(action_event(rank, MEASURED, action, start, end) | {"args": {"step": step}})
        if step == self.steps[-1]:
            self._profiler.stop()
            if rank == 0:
                self._folder.mkdir(exist_ok=True)
            dist.barrier()
            self._profiler.export_chrome_trace(str(self._folder / f"rank_{rank}.json.gz"))
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, self._events)
            if rank == 0:
                events = [*track_names(self._layout), *(event for events in every for event in events)]
                write_atomically(self._folder / MEASURED_FILE, json.dumps({"traceEvents": events}))


def _first_of_machine(now: float) -> float:
    """What `now` is on the first rank that runs on this rank's machine. Every rank must call it."""
    machine = node_identity().boot_id
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (machine, now))
    return next(at for other, at in every if other == machine)
