"""Paired step times -> their median ratio, its interval, and whether a bound holds.

[Note: Interval of a median]
The k-th smallest and the k-th largest of n ratios enclose their population's median with probability
1 - 2·P(B < k), B binomial(n, 1/2), whatever the distribution: the median is missed only where fewer than k ratios lie
on one side of it. Taken is the largest k that leaves 95 %. Ratios of one run are not quite independent (the machine's
pace drifts), which pairing takes out as far as both steps of a pair see the same pace.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
LEAST_PAIRS = 6  # the smallest and the largest of fewer enclose the median with less than 95 %


@dataclass(frozen=True)
class Ratio:
    """The median of `pairs` ratios, ours over theirs, and its interval."""

    median: float
    low: float
    high: float
    pairs: int

    def holds(self, bound: float) -> bool:
        """Not worse than `bound`: the lower end of the interval is within it."""
        return self.low <= bound

    def holds_whole(self, bound: float) -> bool:
        """The whole interval is within `bound`."""
        return self.high <= bound


def slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each step, those of its slowest rank; `ranks` holds one list a rank."""
    return [max(step) for step in zip(*ranks, strict=True)]


def together(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each step, those of all ranks; `ranks` holds one list a rank."""
    return [sum(step) for step in zip(*ranks, strict=True)]


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The i-th of ours was run beside the i-th of theirs. At least LEAST_PAIRS of them."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    outside = values_outside(len(ratios))
    return Ratio(statistics.median(ratios), ratios[outside], ratios[-1 - outside], len(ratios))


def values_outside(pairs: int) -> int:
    """How many of the sorted ratios lie below the interval, and as many above ([Note: Interval of a median])."""
    assert pairs >= LEAST_PAIRS, f"{pairs} pairs have no {CONFIDENCE:.0%} interval"
    below = 0.0  # P(B < k), for k = outside + 1
    for outside in range(pairs // 2 + 1):
        below += math.comb(pairs, outside) / 2**pairs
        if 1 - 2 * below < CONFIDENCE:
            return outside - 1
    raise AssertionError("P(B <= n / 2) is over one half")
