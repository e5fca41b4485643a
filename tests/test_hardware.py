"""HardwareProfile: interpolation of measured points, the models where nothing was measured, and its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from profiles.hardware import SCHEMA, HardwareProfile, load_hardware, save_hardware
from profiles.input_error import InputError
from profiles.interpolate import RateGrid, seconds_at, tiled_flops
from profiles.points import (
    EAGER_PASSES,
    AttentionModel,
    AttentionPoint,
    CollectivePoint,
    ContentionPoint,
    GemmModel,
    GemmPoint,
    MemoryPoint,
    WaitPoint,
)
from profiles.store import Reader
from tests.oracles.small_world import small_hardware
from tests.test_points import FULL
from tests.test_points import points as any_point

# ---- interpolation ---------------------------------------------------------------------------------------

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


# ---- seconds of the models -------------------------------------------------------------------------------

# The figures of an A100, 108 multiprocessors.
MODELLED = small_hardware(
    memory_bandwidth_bytes_per_second=1.7e12,
    launch_seconds=5e-6,
    peak_flops_per_second={"bf16": 312e12},
    gemm_models=(GemmModel(dtype="bf16", achievable_flops_per_second=270e12, units=108),),
    attention_models=(AttentionModel(dtype="bf16", forward_flops_per_second=187e12, backward_flops_per_second=156e12),),
)
sizes = st.integers(1, 20000)


def test_a_gemm_by_tiles_and_waves() -> None:
    # 4096 x 4096 of tiles 256 x 128 is 512 tiles, 5 waves of 108; 128 x 128: 1024, 10 waves; 128 x 64: 19 waves.
    flops = 2.0 * 5 * 108 * 256 * 128 * 4096
    assert flops == 2.0 * 10 * 108 * 128 * 128 * 4096
    finest = 2.0 * 19 * 108 * 128 * 64 * 4096
    assert finest < flops
    # Besides its products a tile costs 2.7 times the writing of its result (TILE_WRITES).
    written = 19 * 108 * 128 * 64 * 2.7 * 2 / 1.7e12
    seconds = MODELLED.gemm_seconds("forward", "bf16", 4096, 4096, 4096)
    assert seconds == pytest.approx(finest / 270e12 + written)
    # A thin product is bound by memory, a tiny one by its launch.
    assert MODELLED.gemm_seconds("forward", "bf16", 1, 50000, 12288) == pytest.approx(
        2.0 * (12288 + 12288 * 50000 + 50000) / 1.7e12
    )
    assert MODELLED.gemm_seconds("forward", "bf16", 8, 8, 8) == 5e-6


@given(sizes, sizes, sizes, st.integers(0, 2), st.integers(1, 5000))
def test_a_larger_gemm_is_never_cheaper(m: int, n: int, k: int, dim: int, more: int) -> None:
    shape = [m, n, k]
    before = MODELLED.gemm_seconds("forward", "bf16", *shape)
    shape[dim] += more
    assert MODELLED.gemm_seconds("forward", "bf16", *shape) >= before
    assert before >= 2.0 * m * n * k / 312e12  # never above the peak


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 10000), st.integers(1, 8))
def test_attention_grows_with_the_square_of_the_sequence(batch: int, heads: int, sequence: int, factor: int) -> None:
    one = MODELLED.attention_seconds("forward", "bf16", batch, heads, sequence, 128)
    assert one == pytest.approx(max(2.0 * batch * heads * sequence**2 * 128 / 187e12, 5e-6))
    assert MODELLED.attention_seconds("forward", "bf16", batch, heads, sequence * factor, 128) >= one
    assert MODELLED.attention_seconds("backward", "bf16", batch, heads, sequence, 128) >= one


@pytest.mark.parametrize("operation", list(EAGER_PASSES))
def test_a_memory_bound_operation_counts_its_passes(operation: str) -> None:
    for direction, passes in zip(("forward", "backward"), EAGER_PASSES[operation], strict=True):
        seconds = MODELLED.memory_seconds(operation, "bf16", 1e9, direction)
        assert seconds == pytest.approx(passes * 2e9 / 1.7e12)
        assert MODELLED.memory_seconds(operation, "bf16", 1.0, direction) == (5e-6 if passes else 0.0)


# ---- measured points -------------------------------------------------------------------------------------


def measured(**changes: Any) -> HardwareProfile:
    fields: dict[str, Any] = {
        "gemm": (
            GemmPoint(dtype="fp32", operation="forward", m=10, n=10, k=10, seconds=1e-3),
            GemmPoint(dtype="fp32", operation="forward", m=1000, n=10, k=10, seconds=1e-2),
        ),
        "attention": (
            AttentionPoint(
                dtype="fp32", direction="forward", batch=2, heads=3, sequence=100, head_dim=64, seconds=6e-3
            ),
            AttentionPoint(
                dtype="fp32", direction="forward", batch=1, heads=1, sequence=1000, head_dim=64, seconds=1e-1
            ),
        ),
        "memory": (
            MemoryPoint(dtype="fp32", operation="copy", direction="forward", elements=100, seconds=1e-5),
            MemoryPoint(dtype="fp32", operation="copy", direction="forward", elements=10000, seconds=4e-5),
        ),
        "collectives": (
            CollectivePoint(operation="all_reduce", ranks=2, bytes=1000, seconds=1e-4),
            CollectivePoint(operation="all_reduce", ranks=2, bytes=100000, seconds=4e-4),
            CollectivePoint(operation="all_reduce", ranks=2, stride=2, bytes=1000, seconds=7e-4),
            CollectivePoint(operation="all_reduce", ranks=4, bytes=1000, seconds=3e-4),
            CollectivePoint(operation="send_recv", ranks=2, bytes=1000, seconds=2e-4),
        ),
    }
    return small_hardware(**(fields | changes))


def test_measured_points_outrank_the_models() -> None:
    hardware = measured()
    assert hardware.gemm_seconds("forward", "fp32", 1000, 10, 10) == pytest.approx(1e-2)
    assert hardware.gemm_seconds("input_grad", "fp32", 1000, 10, 10) < 1e-2  # not measured: the model
    assert hardware.attention_seconds("forward", "fp32", 2, 3, 100, 64) == pytest.approx(6e-3)
    assert hardware.attention_seconds("forward", "fp32", 4, 3, 100, 32) == pytest.approx(6e-3)  # twice as many halves
    assert hardware.attention_seconds("forward", "fp32", 1, 1, 1000, 64) == pytest.approx(1e-1)
    assert hardware.memory_seconds("copy", "fp32", 1000) == pytest.approx(2e-5)
    assert hardware.memory_seconds("copy", "fp32", 10**6, "backward") == pytest.approx(2 * 10**6 * 4 / 1e10)
    assert hardware.knows_memory("fp32")
    assert not hardware.knows_memory("bf16")


def test_a_measured_collective_is_one_of_just_that_group() -> None:
    hardware = measured()
    assert hardware.collective_seconds("all_reduce", 2, 1000) == pytest.approx(1e-4)
    assert hardware.collective_seconds("all_reduce", 4, 1000) == pytest.approx(3e-4)
    assert hardware.collective_seconds("all_reduce", 2, 1000, 2) == pytest.approx(7e-4)
    # One size alone: in proportion, but not for messages far larger.
    assert hardware.collective_seconds("send_recv", 2, 4000) == pytest.approx(8e-4)
    assert hardware.collective_seconds("send_recv", 2, 4001) is None
    # 10 KB lies on the straight line from 1 KB in 100 us to 100 KB in 400 us, as does what lies beyond.
    assert hardware.collective_seconds("all_reduce", 2, 10000) == pytest.approx(1e-4 + 9 / 99 * 3e-4)
    assert hardware.collective_seconds("all_reduce", 2, 298000) == pytest.approx(10e-4)
    assert hardware.collective_seconds("all_reduce", 2, 10) == pytest.approx(1e-4)
    for operation, ranks, stride in (
        ("all_gather", 2, 1),
        ("all_reduce", 3, 1),
        ("all_reduce", 8, 1),
        ("all_reduce", 4, 2),
        ("send_recv", 2, 4),
    ):
        assert hardware.collective_seconds(operation, ranks, 1000, stride) is None


def test_an_uneven_all_to_all_is_apart_from_an_even_one() -> None:
    even = CollectivePoint(operation="all_to_all", ranks=4, bytes=1000, seconds=1e-4)
    uneven = replace(even, uneven=True, seconds=9e-4)
    assert measured(collectives=(uneven,)).collective_seconds("all_to_all", 4, 1000) is None
    assert measured(collectives=(uneven, even, replace(uneven, bytes=2000))).collective_seconds(
        "all_to_all", 4, 2000
    ) == pytest.approx(2e-4)


def test_attention_of_another_kind_does_not_price_causal_attention_of_as_many_heads() -> None:
    point = AttentionPoint(dtype="fp32", direction="forward", batch=1, heads=1, sequence=100, head_dim=64, seconds=1e-3)
    other = replace(point, seconds=9.0)
    others = (replace(other, kv_heads=1), replace(other, causal=False), replace(other, backend="math"))
    assert measured(attention=(*others, point)).attention_seconds("forward", "fp32", 1, 1, 100, 64) == 1e-3
    modelled = small_hardware().attention_seconds("forward", "fp32", 1, 1, 100, 64)
    assert measured(attention=others).attention_seconds("forward", "fp32", 1, 1, 100, 64) == modelled


@given(
    st.sampled_from(("all_reduce", "send_recv")),
    st.floats(1, 1e9),
    st.floats(1, 1e3),
)
def test_more_bytes_never_take_a_measured_collective_less(op: str, size: float, factor: float) -> None:
    hardware = measured()
    less = hardware.collective_seconds(op, 2, size)
    more = hardware.collective_seconds(op, 2, size * factor)
    assume(less is not None and more is not None)
    assert more >= less * (1 - 1e-12)


@pytest.mark.parametrize("points_of", [measured, small_hardware])
def test_a_correction_multiplies_the_seconds_of_its_part_and_no_others(points_of: Callable[..., Any]) -> None:
    def parts(hardware: HardwareProfile) -> dict[str, list[float]]:
        return {
            "gemm": [hardware.gemm_seconds("forward", "fp32", 100, 10, 10)],
            "attention": [hardware.attention_seconds(d, "fp32", 2, 3, 500, 64) for d in ("forward", "backward")],
            "memory": [hardware.memory_seconds(o, "fp32", 10**6) for o in ("copy", "accumulate", "swiglu")],
            "optimizer": [hardware.memory_seconds(o, "fp32", 10**6) for o in ("adamw", "gradient_norm")],
        }

    plain = parts(points_of())
    for part in plain:
        corrected = parts(points_of(corrections={part: 1.5}))
        for other, seconds in plain.items():
            factor = 1.5 if other == part else 1.0
            assert corrected[other] == pytest.approx([factor * s for s in seconds], rel=1e-12)
    assert points_of().correction("gemm") == 1.0
    assert points_of(corrections={"gemm": 1.5}).correction("gemm") == 1.5


# ---- side by side ----------------------------------------------------------------------------------------


def slowed(compute: float, communication: float) -> HardwareProfile:
    return small_hardware(overlap_compute_slowdown=compute, overlap_communication_slowdown=communication)


@pytest.mark.parametrize(
    ("slowdowns", "communication", "compute", "exposed"),
    [
        # At full pace all hides that fits beside the kernels.
        ((1.0, 1.0), 3.0, 5.0, 0.0),
        ((1.0, 1.0), 5.0, 3.0, 2.0),
        ((1.0, 1.0), 5.0, 0.0, 5.0),
        # Twice as long is one after the other.
        ((2.0, 2.0), 3.0, 5.0, 3.0),
        ((2.0, 2.0), 5.0, 3.0, 5.0),
        # The collective takes 6 of the kernels' 12.5 seconds, in which they get 6 / 1.25 = 4.8 as far.
        ((1.25, 1.5), 4.0, 10.0, 1.2),
        # The kernels take 2.5; of the collective 2.5 / 1.5 are done, and 10 - 5/3 remain: 2.5 - 2 + 25/3.
        ((1.25, 1.5), 10.0, 2.0, 0.5 + 25 / 3),
        # Only the collective is slowed: 8 seconds beside 10 cost nothing, 8 beside 6 the last fourth, at full pace.
        ((1.0, 2.0), 4.0, 10.0, 0.0),
        ((1.0, 2.0), 4.0, 6.0, 1.0),
        # Only the kernels are: they lose half of 4 seconds.
        ((2.0, 1.0), 4.0, 10.0, 2.0),
        # Both so slow that one after the other is faster.
        ((3.0, 3.0), 4.0, 10.0, 4.0),
        ((1.25, 1.5), 0.0, 10.0, 0.0),
    ],
)
def test_what_shows_of_communication_beside_compute(
    slowdowns: tuple[float, float], communication: float, compute: float, exposed: float
) -> None:
    assert slowed(*slowdowns).exposed_seconds(communication, compute) == pytest.approx(exposed, rel=1e-12)


slowdowns = st.floats(1, 3)
durations = st.just(0.0) | st.floats(1e-6, 1e3)


@given(durations, durations)
def test_the_two_ends_of_overlap(m: float, c: float) -> None:
    assert slowed(1.0, 1.0).exposed_seconds(m, c) == pytest.approx(max(0.0, m - c), rel=1e-9, abs=1e-12)
    assert slowed(2.0, 2.0).exposed_seconds(m, c) == pytest.approx(m, rel=1e-9, abs=1e-12)


@given(slowdowns, slowdowns, durations, durations)
def test_both_together_take_no_less_than_either_and_no_more_than_one_after_the_other(
    a: float, b: float, m: float, c: float
) -> None:
    exposed = slowed(a, b).exposed_seconds(m, c)
    rounding = 1e-9 * (c + m)
    assert -rounding <= exposed <= m
    assert c + exposed >= max(c, m) - rounding


@given(slowdowns, slowdowns, st.floats(1e-6, 1e3))
def test_no_jump_where_the_collective_ends_with_the_kernels(a: float, b: float, c: float) -> None:
    hardware, m = slowed(a, b), a * c / b
    before, after = (hardware.exposed_seconds(m * (1 + step), c) for step in (-1e-9, 1e-9))
    assert before == pytest.approx(after, abs=1e-8 * (c + m))
    # Both last a·c then, unless one after the other is faster.
    assert c + hardware.exposed_seconds(m, c) == pytest.approx(min(a * c, c + m), rel=1e-9)


@given(slowdowns, slowdowns, durations, durations, durations)
def test_more_communication_never_shows_less_and_more_compute_never_ends_sooner(
    a: float, b: float, m: float, c: float, more: float
) -> None:
    hardware = slowed(a, b)
    exposed = hardware.exposed_seconds(m, c)
    rounding = 1e-9 * (c + m + more)
    assert exposed <= hardware.exposed_seconds(m + more, c) + rounding
    assert c + exposed <= c + more + hardware.exposed_seconds(m, c + more) + rounding


# One kernel alone takes 1, beside another 1.2, of four 2.
CONTENTION = tuple(ContentionPoint(active=n, slowdown=s) for n, s in ((1, 1.0), (2, 1.2), (4, 2.0)))


@pytest.mark.parametrize(
    ("active", "slowdown"),
    [(0.5, 1.0), (1, 1.0), (1.5, 1.1), (2, 1.2), (3, 1.6), (4, 2.0), (9, 2.0)],
)
def test_contention_rises_on_the_lines_between_what_was_measured(active: float, slowdown: float) -> None:
    assert small_hardware(contention_points=CONTENTION).contention(active) == pytest.approx(slowdown, rel=1e-12)
    assert small_hardware(contention_points=CONTENTION[::-1]).contention(active) == pytest.approx(slowdown)
    assert small_hardware().contention(active) == 1.0


def test_a_collective_waits_longer_after_more_work_than_where_it_was_measured() -> None:
    waits = tuple(
        WaitPoint(compute_seconds=c, wait_seconds=w)
        for c, w in ((1e-3, 2e-4), (5e-3, 1e-3), (2e-2, 1e-3), (8e-2, 4e-3))
    )
    hardware = small_hardware(waits=waits)
    assert hardware.wait_seconds(5e-4) == 0.0
    assert hardware.wait_seconds(1e-3) == 0.0
    assert hardware.wait_seconds(3e-3) == pytest.approx(4e-4)
    assert hardware.wait_seconds(1e-2) == pytest.approx(8e-4)
    assert hardware.wait_seconds(1.0) == pytest.approx(3.8e-3)
    assert small_hardware().wait_seconds(1.0) == 0.0


def test_what_a_profile_supports() -> None:
    assert [MODELLED.supports(dtype) for dtype in ("bf16", "fp16", "fp32")] == [True, False, False]
    assert not small_hardware(attention_models=()).supports("fp32")
    assert not small_hardware(gemm_models=()).supports("fp32")
    assert not measured(gemm_models=(), gemm=()).supports("fp32")


# ---- files -----------------------------------------------------------------------------------------------


# Every key and every list of a profile, none at its default.
FILLED = small_hardware(
    straggler_slowdown=1.07,
    parameter_overhead_seconds=3e-7,
    host_operation_seconds=1e-5,
    host_to_device_bytes_per_second=25e9,
    device_to_host_bytes_per_second=20e9,
    multiprocessors=108,
    devices_per_node=8,
    provenance={"kind": "measured", "date": "today", "versions": {"torch": "2"}, "ranks": [0, 1]},
    corrections={"gemm": 1.1, "memory": 0.9},
    **{name: (point,) for name, point in FULL.items() if name not in ("gemm_models", "attention_models")},
)


def test_a_filled_profile_is_filled() -> None:
    for field in fields(HardwareProfile):
        assert getattr(FILLED, field.name) not in (field.default, ()), field.name


@pytest.mark.parametrize("hardware", [MODELLED, measured(), FILLED, small_hardware(name="1e3", allocator_slack=0.0)])
def test_a_profile_survives_its_file(tmp_path: Path, hardware: HardwareProfile) -> None:
    save_hardware(hardware, tmp_path / "h.yaml")
    assert load_hardware(tmp_path / "h.yaml") == hardware
    assert (tmp_path / "h.yaml").read_text(encoding="utf-8").startswith(f"schema: {SCHEMA}\n")


positives = st.floats(1e-9, 1e15)
zeros = st.just(0.0) | positives
plain_values = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.sampled_from(("", "a: b", "1e3"))
small_profiles = st.builds(
    small_hardware,
    name=st.sampled_from(("h", "", "a b", "yes", "1e5", "\u00b5")),
    memory_bytes=positives,
    context_bytes=zeros,
    launch_seconds=zeros,
    overlap_compute_slowdown=st.floats(1, 9),
    overlap_communication_slowdown=st.floats(1, 9),
    straggler_slowdown=st.floats(1, 9),
    parameter_overhead_seconds=zeros,
    host_to_device_bytes_per_second=st.none() | positives,
    device_to_host_bytes_per_second=st.none() | positives,
    multiprocessors=st.integers(0, 200),
    devices_per_node=st.integers(0, 99),
    provenance=st.dictionaries(st.sampled_from(("kind", "date", "3")), plain_values | st.lists(plain_values)),
    corrections=st.dictionaries(st.sampled_from(("gemm", "memory", "tp")), positives),
    **{
        name: st.lists(point, max_size=2).map(tuple)
        for name, point in any_point.items()
        if name not in ("gemm_models", "attention_models")  # one of each stays: a profile prices something
    },
)


@settings(deadline=None)
@given(small_profiles)
def test_any_profile_survives_its_file(tmp_path_factory: pytest.TempPathFactory, hardware: HardwareProfile) -> None:
    path = tmp_path_factory.getbasetemp() / "hardware.yaml"
    save_hardware(hardware, path)
    assert load_hardware(path) == hardware


def test_a_profile_of_today_s_least_keys() -> None:
    """Files from before a key existed are read with what the key's absence means."""
    needed = [f.name for f in fields(HardwareProfile) if f.default is MISSING and f.default_factory is MISSING]
    models = ["gemm_models", "attention_models"]
    text = small_hardware().to_dict()
    hardware = HardwareProfile.from_dict(Reader({key: text[key] for key in needed + models}, source="h.yaml"))
    expected = {f.name: f.default for f in fields(HardwareProfile) if f.default is not MISSING}
    for key, default in expected.items():
        if key not in models:
            assert getattr(hardware, key) == default, key
    assert hardware.corrections == {}


PARTS = 20  # of the file's bytes, so that a failure says about where


def loaded(path: Path) -> HardwareProfile | InputError:
    try:
        return load_hardware(path)
    except InputError as error:
        return error


@pytest.mark.parametrize("part", range(PARTS))
def test_a_file_that_ends_anywhere_is_an_error_or_a_profile_with_fewer_points(tmp_path: Path, part: int) -> None:
    """A full disk or a broken copy: never a traceback, never another figure."""
    whole = replace(FILLED, name="NAME")
    path = tmp_path / "h.yaml"
    save_hardware(whole, path)
    # A letter of two bytes, which a cut can halve.
    data = path.read_bytes().replace(b"name: NAME", "name: \u00b5".encode(), 1)
    path.write_bytes(data)
    whole = replace(whole, name="\u00b5")
    assert load_hardware(path) == whole
    for end in range(part * len(data) // PARTS, (part + 1) * len(data) // PARTS):
        path.write_bytes(data[:end])
        read = loaded(path)
        if isinstance(read, InputError):
            assert str(path) in read.where
            continue
        # What is left of a file that can be read lacks points at its end and nothing else.
        for field in fields(HardwareProfile):
            before, after = getattr(whole, field.name), getattr(read, field.name)
            assert after == before or (field.name in FULL and after == before[: len(after)]), (end, field.name)


def test_a_file_that_ends_before_its_models_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "h.yaml"
    save_hardware(small_hardware(), path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("attention_models:")], encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_hardware(path)
    assert caught.value.expected == "points or a model of GEMM and attention for one dtype at least"
    path.write_text(text[: text.index("peak_flops")], encoding="utf-8")
    with pytest.raises(InputError, match="the key peak_flops_per_second is missing"):
        load_hardware(path)


def document() -> dict[str, Any]:
    text = measured().to_dict()
    del text["schema"]
    return text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("memory_bytes",), 0, "a finite number > 0"),
        (("overlap_compute_slowdown",), 0.9, "a finite number >= 1"),
        (("overlap_communication_slowdown",), 0, "a finite number >= 1"),
        (("straggler_slowdown",), 0.99, "a finite number >= 1"),
        (("microbatch_overhead_seconds",), -1e-9, "a finite number >= 0"),
        (("shard_overhead_seconds",), -1e-9, "a finite number >= 0"),
        (("sequence_shard_overhead_seconds",), -1e-9, "a finite number >= 0"),
        (("parameter_overhead_seconds",), "none", "a finite number >= 0"),
        (("host_to_device_bytes_per_second",), 0, "a finite number > 0"),
        (("device_to_host_bytes_per_second",), "fast", "a finite number > 0"),
        (("multiprocessors",), -1, "a whole number >= 0"),
        (("devices_per_node",), 8.0, "a whole number >= 0"),
        (("corrections",), [], "a mapping of keys to values"),
        (("corrections", "gemm"), 0, "a finite number > 0"),
        (("corrections", "tp"), -1.5, "a finite number > 0"),
        (("provenance",), "measured here", "a mapping of keys to values"),
        (("provenance",), ["measured"], "a mapping of keys to values"),
        (("provenance",), None, "a mapping of keys to values"),
        (("peak_flops_per_second", "fp32"), "fast", "a finite number > 0"),
        (("gemm", 1, "seconds"), 0, "a finite number > 0"),
        (("gemm", 0, "m"), 1.5, "a whole number >= 1"),
        (("gemm", 0, "dtype"), "fp64", "one of fp32, tf32, bf16, fp16, fp8"),
        (("gemm", 0, "operation"), "backward", "one of forward, input_grad, weight_grad"),
        (("attention", 0, "direction"), "sideways", "one of forward, backward"),
        (("memory", 0, "operation"), "sort", "one of " + ", ".join(EAGER_PASSES)),
        (("collectives", 0, "ranks"), 0, "a whole number >= 2"),
        (("gemm_models", 0, "units"), 0, "a whole number >= 1"),
    ],
)
def test_a_figure_that_cannot_be_names_its_place(path: tuple[Any, ...], value: object, expected: str) -> None:
    text = document() | {"corrections": {}}
    at: Any = text
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    with pytest.raises(InputError) as caught:
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))
    assert (caught.value.where, caught.value.expected) == (f"h.yaml: {place}", expected)


def test_a_profile_without_gemm_or_attention_is_none() -> None:
    text = document() | {"gemm": [], "gemm_models": []}
    with pytest.raises(InputError) as caught:
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))
    assert caught.value.where == "h.yaml: gemm"
    assert caught.value.expected == "points or a model of GEMM and attention for one dtype at least"


def test_an_unknown_key_of_a_point_is_named() -> None:
    text = document()
    text["gemm"][0]["speed"] = 3
    with pytest.raises(InputError, match=r"unknown key gemm\[0\]\.speed"):
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))


# ---- what a file could once say ------------------------------------------------------------------------------


def test_the_share_that_is_hidden_is_no_key_any_more() -> None:
    with pytest.raises(InputError, match="unknown key hidden_communication"):
        HardwareProfile.from_dict(Reader(document() | {"hidden_communication": 0.5}, source="h.yaml"))


def test_a_precision_is_supported_only_with_all_its_operations() -> None:
    assert not measured(gemm_models=(), attention_models=()).supports("fp32")


def test_a_collective_of_one_rank_is_refused() -> None:
    points = (CollectivePoint(operation="all_reduce", ranks=1, bytes=1000, seconds=1e-4),)
    text = replace(measured(), collectives=points).to_dict()
    del text["schema"]
    with pytest.raises(InputError) as caught:
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))
    assert caught.value.where == "h.yaml: collectives[0].ranks"
