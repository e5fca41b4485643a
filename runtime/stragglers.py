"""Ranks that are slower than others with the same work, from the kernels that each has timed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from planner.layout import Layout

from .mesh import coordinate_of

# How much longer than its peers', and in what share of the steps looked at, before a rank is named. The slowest rank of
# machines with nothing wrong was measured at 1.02 to 1.04 times the mean (`straggler_slowdown` of profiles).
_SLOWER = 1.10
_MOST_OF = 0.8
_LEAST_STEPS = 3


def stragglers(kernel_seconds: Sequence[Sequence[float]], layout: Layout) -> list[dict[str, Any]]:
    """The ranks that are systematically slower than the median of their peers.

    `kernel_seconds` are, by rank, the seconds in kernels of the steps in which each was timed on its own, the same
    steps on every rank; waiting for others is not among them. Peers are the other ranks of the pipeline rank, which
    have the same work, but for the load of experts. Each finding is {rank, stage, slower, steps}: how many times as
    long as its peers, as the median over so many steps.
    """
    found: list[dict[str, Any]] = []
    stage_of = [coordinate_of(rank, layout).pp for rank in range(layout.world_size)]
    for rank, own in enumerate(kernel_seconds):
        peers = [seconds for other, seconds in enumerate(kernel_seconds) if stage_of[other] == stage_of[rank]]
        peers.remove(own)
        if not peers or len(own) < _LEAST_STEPS:
            continue
        ratios = [mine / statistics.median(theirs) for mine, *theirs in zip(own, *peers, strict=True)]
        if sum(ratio > _SLOWER for ratio in ratios) >= _MOST_OF * len(ratios):
            slower = statistics.median(ratios)
            found.append({"rank": rank, "stage": stage_of[rank], "slower": slower, "steps": len(ratios)})
    return found
