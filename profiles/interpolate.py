"""Interpolation between measured points: piecewise straight or in log-log, and trilinear over a grid of GEMM shapes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise, product


def line_at(points: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds for `size` bytes on the wire from (size, seconds) points sorted by size: as `seconds_at`, but straight
    between points, since latency plus bytes over bandwidth is a straight line in the bytes."""
    right = bisect_right([point[0] for point in points], size)
    if right in (0, len(points)):
        return seconds_at(points, size)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


def seconds_at(points: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds for `size` from (size, seconds) points sorted by size.

    Between points log-log linear; above the largest on the line through the last two (their latency stays, their
    bandwidth goes on), of a single point in proportion; below the smallest the smallest point's seconds.
    """
    sizes = [point[0] for point in points]
    if size <= sizes[0]:
        return points[0][1]
    if size >= sizes[-1]:
        (x0, y0), (x1, y1) = points[-2] if points[1:] else (0.0, 0.0), points[-1]
        return y1 + (size - x1) * max(0.0, y1 - y0) / (x1 - x0)
    right = bisect_right(sizes, size)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    weight = math.log(size / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** weight


def held_at(points: Sequence[tuple[float, float]], x: float, missing: float) -> float:
    """y at x on the straight lines between the points, as at the ends beyond them; `missing` where there are none."""
    points = sorted(points)
    if not points or x <= points[0][0]:
        return points[0][1] if points else missing
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def causal_seconds_at(points: Sequence[tuple[float, float]], sequence: float) -> float:
    """Seconds of one head's causal attention from (sequence², seconds) points sorted by it: as `seconds_at`, but above
    the largest on the curve a·s² + b·s through the last two.

    A flash kernel computes the blocks that the diagonal crosses in full: of keys in blocks of k it sees s²/2 + k·s/2
    pairs, of which half a block of each query is for nothing (512 keys in torch's kernel for CPUs).
    """
    if len(points) < 2 or sequence**2 <= points[-1][0]:
        return seconds_at(points, sequence**2)
    (s0, y0), (s1, y1) = ((square**0.5, seconds) for square, seconds in points[-2:])
    squares = min(max((y1 / s1 - y0 / s0) / (s1 - s0), 0.0), y1 / s1**2)  # noise bends the curve neither way
    return squares * sequence**2 + (y1 / s1 - squares * s1) * sequence


_TILES = ((256, 128), (128, 128), (128, 64))


def tiled_flops(m: int, n: int, k: int, units: int, count: int = 1) -> float:
    """FLOPs that the best grid of tiles spends on `count` products, the last wave and the ragged edges counted whole.

    A wave is `units` tiles at once (Nvidia, Matrix Multiplication Background: tile and wave quantization); 0
    units is a device without waves, where the FLOPs are 2·m·n·k.
    """
    if units == 0:
        return 2.0 * m * n * k * count
    spent = []
    for height, width in _TILES:
        tiles = -(-m // height) * -(-n // width) * count
        spent.append(2.0 * -(-tiles // units) * units * height * width * k)
    return min(spent)


# What a tile costs beyond its inner products (filling the pipeline, writing the result), in times of writing the
# result through the device's memory: fitted to the published efficiency of 183 GEMMs on an A100 PCIe by size, by a
# script that is not kept here; on other devices it is carried over.
TILE_WRITES = 2.7


def tiled_seconds(
    m: int, n: int, k: int, *, units: int, flops_per_second: float, write_seconds: float, count: int = 1
) -> float:
    """Seconds of `count` products on a device of `units` multiprocessors, by the grid of tiles that takes least.

    Every wave takes its inner products at `flops_per_second`, and TILE_WRITES times `write_seconds` (one element of
    the result through memory) for each element. Without units nothing but the inner products counts.
    """
    if units == 0:
        return tiled_flops(m, n, k, 0, count) / flops_per_second
    each = 2.0 * k / flops_per_second + TILE_WRITES * write_seconds
    least = float("inf")
    for height, width in _TILES:
        tiles = -(-m // height) * -(-n // width) * count
        least = min(least, -(-tiles // units) * units * height * width * each)
    return least


class RateGrid:
    """FLOP/s over a grid of (m, n, k): trilinear in the logarithms, constant beyond the edges.

    The FLOPs are those that tiles and waves spend, so that between two points the seconds follow the steps of the
    waves and not a line. Corners that were not measured are left out and the weights of the others scaled up.
    """

    def __init__(self, points: Sequence[tuple[int, int, int, float]], units: int = 0) -> None:
        self._units = units
        self._rates = {(m, n, k): tiled_flops(m, n, k, units) / seconds for m, n, k, seconds in points}
        self._axes = tuple(sorted({shape[dim] for shape in self._rates}) for dim in range(3))

    def seconds(self, m: int, n: int, k: int, count: int = 1) -> float:
        """Seconds of `count` products (m × k)·(k × n) issued as one."""
        return tiled_flops(m, n, k, self._units, count) / self.flops_per_second(m, n, k)

    def flops_per_second(self, m: int, n: int, k: int) -> float:
        brackets = [_bracket(axis, size) for axis, size in zip(self._axes, (m, n, k), strict=True)]
        total = weighted = 0.0
        for corner in product(*brackets):
            rate = self._rates.get((corner[0][0], corner[1][0], corner[2][0]))
            weight = corner[0][1] * corner[1][1] * corner[2][1]
            if rate is not None and weight > 0:
                total += weight
                weighted += weight * math.log(rate)
        if total == 0:
            return self._nearest(m, n, k)
        return math.exp(weighted / total)

    def _nearest(self, m: int, n: int, k: int) -> float:
        def distance(shape: tuple[int, int, int]) -> float:
            return sum(math.log(a / b) ** 2 for a, b in zip(shape, (m, n, k), strict=True))

        return self._rates[min(self._rates, key=distance)]


def _bracket(axis: list[int], size: int) -> list[tuple[int, float]]:
    """The one or two grid values around `size` with their weights."""
    if size <= axis[0]:
        return [(axis[0], 1.0)]
    if size >= axis[-1]:
        return [(axis[-1], 1.0)]
    right = bisect_right(axis, size)
    low, high = axis[right - 1], axis[right]
    weight = math.log(size / low) / math.log(high / low)
    return [(low, 1.0 - weight), (high, weight)]
