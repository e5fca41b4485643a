"""The machine's pace: one piece of work timed again and again, so that what was measured when can be compared.

[Note: Pace]
A core that is shared with others, or that changes its clock, runs now faster and now slower, by a fifth within seconds
on a virtual machine. The same piece of work, timed on all ranks before each measurement, tells how the
machine was just then; what was measured in a slow moment is scaled to the median pace of the session. On GPUs, whose
clocks are noted instead, nothing is scaled.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence

import torch

from .timing import Rank

_REPEATS = 5
_NEIGHBOURS = 4  # times before and after a measurement whose median is the pace at it


class Pace:
    """Times the reference work: some GEMMs and some traffic, about as training mixes them, 1 to 2 ms."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._left, self._right = torch.randn(256, 256), torch.randn(256, 256)
        self._large = torch.randn(1 << 19)
        self._other = torch.randn(1 << 19)

    def seconds(self) -> float:
        """Seconds of the work now, the mean over the ranks, as many of them at once as have a core of their own."""
        at_work = min(self._rank.world_size, len(os.sched_getaffinity(0)))
        self._rank.barrier()
        if self._rank.rank >= at_work:
            return self._rank.mean(0.0) * self._rank.world_size / at_work
        samples = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for _ in range(3):
                torch.mm(self._left, self._right)
            torch.add(self._large, self._other)
            samples.append(time.perf_counter() - start)
        return self._rank.mean(statistics.median(samples)) * self._rank.world_size / at_work


def local_pace(paces: Sequence[float], index: int) -> float:
    """The pace around the measurement `index`: the median of the times next to it."""
    return statistics.median(paces[max(0, index - _NEIGHBOURS) : index + _NEIGHBOURS + 1])
