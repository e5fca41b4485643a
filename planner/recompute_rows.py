"""What memory makes a rank recompute, as rows over the number of its layers.

`RankLimits` knows the least seconds R(n) that n whole layers of a rank recompute. Fractions of layers would recompute
fractions of what is missing: a rank that needs the bytes of one layer and a half would have half a layer less than any
whole numbers have. The seconds of a rank are not below the lower convex hull of the points (n, R(n)), which has a row
for each of its edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from .linear_program import LinearProgram
from .rank_limits import ROUNDING


def write_recompute(
    linear: LinearProgram, name: str, layers: int, spent: Mapping[int, float], least: Sequence[float]
) -> None:
    """The rows of one rank. `layers` is the column of their number, `spent` the seconds of a layer by its column, and
    `least` those of 0, 1, … layers."""
    dearest = max(spent.values(), default=0.0)
    if dearest == 0.0:
        return
    quickest, used = min(spent.values()), {column: each / dearest for column, each in spent.items() if each}
    for (first, low), (last, high) in pairwise(_hull(least)):
        slope = (high - low) / (last - first)
        constant = low - slope * first - ROUNDING * high
        if constant + slope * last > quickest * last:  # else any layers take as long
            linear.row(f"recompute_{name}_{first}", used | {layers: -slope / dearest}, least=constant / dearest)


def _hull(heights: Sequence[float]) -> list[tuple[int, float]]:
    """Corners of the lower convex hull over 0, 1, …"""
    found: list[tuple[int, float]] = []
    for at, height in enumerate(heights):
        while len(found) > 1 and _is_above(found[-1], found[-2], (at, height)):
            found.pop()
        found.append((at, height))
    return found


def _is_above(middle: tuple[int, float], left: tuple[int, float], right: tuple[int, float]) -> bool:
    """Whether the middle is not below the line from left to right."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])
