"""Seconds between measured points: rates of GEMMs on a grid, tiles and waves, straight lines."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.interpolate import RateGrid, causal_seconds_at, seconds_at, tiled_flops
from profiles.points import (
    GemmPoint,
)
from tests.oracles.small_world import small_hardware

curves = st.lists(
    st.tuples(st.integers(1, 10**9), st.floats(1e-7, 10.0)), min_size=1, max_size=6, unique_by=lambda point: point[0]
).map(sorted)


@given(curves)
def test_a_curve_goes_through_its_points(points: list[tuple[float, float]]) -> None:
    for size, seconds in points:
        assert seconds_at(points, size) == pytest.approx(seconds, rel=1e-12)


@given(curves, st.floats(0, 1))
def test_between_points_lies_between_their_seconds(points: list[tuple[float, float]], share: float) -> None:
    for (x0, y0), (x1, y1) in pairwise(points):
        seconds = seconds_at(points, x0 + share * (x1 - x0))
        assert min(y0, y1) * (1 - 1e-9) <= seconds <= max(y0, y1) * (1 + 1e-9)


@given(curves, st.floats(1, 1e6))
def test_beyond_the_largest_point_bandwidth_rules_and_below_the_smallest_latency(
    points: list[tuple[float, float]], factor: float
) -> None:
    (x0, y0), (x1, y1) = points[-2] if points[1:] else (0, 0.0), points[-1]
    beyond = y1 + max(0.0, y1 - y0) * (x1 * factor - x1) / (x1 - x0)
    assert seconds_at(points, x1 * factor) == pytest.approx(beyond)
    assert seconds_at(points, points[0][0] / factor) == points[0][1]


def test_beyond_the_longest_causal_attention_sees_half_a_block_of_each_query_for_nothing() -> None:
    def seconds(sequence: int) -> float:
        """Of pairs in whole blocks of 512 keys, as torch's kernel for CPUs computes them for 256 queries at once."""
        return sum(-(-(first + 256) // 512) * 512 * 256 * 1e-9 for first in range(0, sequence, 256))

    points = [(s**2.0, seconds(s)) for s in (512, 1024)]
    assert [causal_seconds_at(points, s) for s in (512, 1024)] == [points[0][1], points[1][1]]
    assert causal_seconds_at(points, 2048) == pytest.approx(seconds(2048))
    assert causal_seconds_at(points, 8192) == pytest.approx(seconds(8192))
    assert causal_seconds_at(points[1:], 2048) == 4 * points[1][1]
    noisy = [(points[0][0], 1e-6), points[1]]  # a first point that is too short bends nothing down
    assert causal_seconds_at(noisy, 2048) == 4 * points[1][1]


def test_between_two_points_the_curve_is_straight_in_the_logarithms() -> None:
    assert seconds_at([(100, 1.0), (10000, 4.0)], 1000) == pytest.approx(2.0)


axes = st.lists(st.sampled_from([1, 16, 64, 100, 512, 4096]), min_size=1, max_size=3, unique=True)


@st.composite
def grids(draw: st.DrawFn) -> dict[tuple[int, int, int], float]:
    """Some corners of a grid of shapes with their FLOP/s."""
    shapes = [(m, n, k) for m in draw(axes) for n in draw(axes) for k in draw(axes)]
    kept = draw(st.lists(st.sampled_from(shapes), min_size=1, unique=True))
    return {shape: 10.0 ** draw(st.floats(6, 15)) for shape in kept}


def rate_grid(rates: dict[tuple[int, int, int], float]) -> RateGrid:
    return RateGrid([(m, n, k, 2.0 * m * n * k / rate) for (m, n, k), rate in rates.items()])


@given(grids())
def test_a_grid_goes_through_its_points(rates: dict[tuple[int, int, int], float]) -> None:
    grid = rate_grid(rates)
    for shape, rate in rates.items():
        assert grid.flops_per_second(*shape) == pytest.approx(rate, rel=1e-9)


@given(grids(), st.tuples(*[st.integers(1, 10000)] * 3))
def test_a_grid_stays_between_its_slowest_and_fastest_point(
    rates: dict[tuple[int, int, int], float], shape: tuple[int, int, int]
) -> None:
    rate = rate_grid(rates).flops_per_second(*shape)
    assert min(rates.values()) * (1 - 1e-9) <= rate <= max(rates.values()) * (1 + 1e-9)


def test_a_grid_is_trilinear_in_the_logarithms_and_flat_beyond_its_edges() -> None:
    grid = rate_grid({(10, 10, 10): 1e9, (1000, 10, 10): 1e11, (10, 1000, 10): 1e11, (1000, 1000, 10): 1e13})
    assert grid.flops_per_second(100, 10, 10) == pytest.approx(1e10)
    assert grid.flops_per_second(100, 100, 10) == pytest.approx(1e11)
    assert grid.flops_per_second(10**6, 1, 99) == pytest.approx(1e11)


def test_a_corner_that_was_not_measured_leaves_its_weight_to_the_others() -> None:
    grid = rate_grid({(10, 10, 10): 1e9, (1000, 10, 10): 1e11, (10, 1000, 10): 1e11})
    assert grid.flops_per_second(100, 100, 10) == pytest.approx(10 ** ((9 + 11 + 11) / 3))
    assert grid.flops_per_second(1000, 1000, 10) == pytest.approx(1e11)  # nothing but the nearest


# 108 units, k = 1000: a wave of 128 x 128 tiles over 128·i rows and 108·128 columns is 108 tiles, so i waves. Half as
# wide or twice as high tiles need as much at i even, and the latter more at i odd.
COLUMNS = 108 * 128
WAVE = 2.0 * 108 * 128 * 128 * 1000


@pytest.mark.parametrize(("rows", "waves"), [(1, 1), (128, 1), (129, 2), (257, 3), (384, 3), (385, 4), (1280, 10)])
def test_tiles_come_in_waves(rows: int, waves: int) -> None:
    assert tiled_flops(rows, COLUMNS, 1000, 108) == waves * WAVE
    assert tiled_flops(rows, COLUMNS, 1000, 0) == 2.0 * rows * COLUMNS * 1000  # without waves, what is asked for


def test_a_shape_that_fills_half_a_wave_of_the_finest_tiles() -> None:
    # 128 x 64 tiles, one wave of 108 of them; a wave of any other tile is twice that and more.
    assert tiled_flops(128, 54 * 128, 1000, 108) == 2.0 * 108 * 128 * 64 * 1000 == WAVE / 2


def test_between_two_points_of_a_tiled_grid_the_seconds_follow_the_waves() -> None:
    # 1 wave at 1 TFLOP/s of tiles, and 10 waves at the same.
    wave_seconds = WAVE / 1e12
    grid = RateGrid([(128, COLUMNS, 1000, wave_seconds), (1280, COLUMNS, 1000, 10 * wave_seconds)], 108)
    for rows, waves in ((128, 1), (129, 2), (256, 2), (257, 3), (384, 3), (385, 4), (1152, 9), (1153, 10), (1280, 10)):
        assert grid.seconds(rows, COLUMNS, 1000) == pytest.approx(waves * wave_seconds, rel=1e-9)
    assert grid.seconds(2561, COLUMNS, 1000) == pytest.approx(21 * wave_seconds, rel=1e-9)  # beyond the edge as well
    # A line would have given 257 rows 2.0 waves.
    line = RateGrid([(128, COLUMNS, 1000, wave_seconds), (1280, COLUMNS, 1000, 10 * wave_seconds)])
    assert line.seconds(257, COLUMNS, 1000) == pytest.approx(257 / 128 * wave_seconds)


def test_the_rate_of_a_tiled_grid_is_straight_in_the_logarithms() -> None:
    # 1 wave at 1 TFLOP/s, 100 waves at 4 TFLOP/s: half way, at 10 waves, 2 TFLOP/s.
    grid = RateGrid([(128, COLUMNS, 1000, WAVE / 1e12), (12800, COLUMNS, 1000, 100 * WAVE / 4e12)], 108)
    assert grid.flops_per_second(1280, COLUMNS, 1000) == pytest.approx(2e12)
    assert grid.seconds(1280, COLUMNS, 1000) == pytest.approx(10 * WAVE / 2e12)


def test_a_profile_s_grid_has_the_waves_of_its_multiprocessors() -> None:
    shapes = [(128, WAVE / 1e12), (1280, 10 * WAVE / 1e12)]
    gemm = tuple(
        GemmPoint(dtype="fp32", operation="forward", m=m, n=COLUMNS, k=1000, seconds=seconds) for m, seconds in shapes
    )
    tiled, plain = (small_hardware(gemm=gemm, multiprocessors=units) for units in (108, 0))
    assert tiled.gemm_seconds("forward", "fp32", 257, COLUMNS, 1000) == pytest.approx(3 * WAVE / 1e12)
    assert plain.gemm_seconds("forward", "fp32", 257, COLUMNS, 1000) == pytest.approx(257 / 128 * WAVE / 1e12)
