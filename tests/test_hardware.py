"""HardwareProfile: interpolation of measured points, the models where nothing was measured, and its file."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.catalogue import list_catalogue, resolve_hardware_path
from profiles.hardware import (
    EAGER_PASSES,
    SCHEMA,
    AttentionPoint,
    CollectivePoint,
    GemmPoint,
    HardwareProfile,
    MemoryPoint,
    load_hardware,
    save_hardware,
)
from profiles.input_error import InputError
from profiles.interpolate import RateGrid, seconds_at
from profiles.store import Reader
from tests.oracles.small_world import small_hardware

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
    assert seconds_at(points, points[-1][0] * factor) == pytest.approx(points[-1][1] * factor)
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


# ---- seconds of the models -------------------------------------------------------------------------------

A100 = load_hardware(resolve_hardware_path("a100-sxm-80gb"))
sizes = st.integers(1, 20000)


def test_a_gemm_by_tiles_and_waves() -> None:
    # 4096 x 4096 of tiles 256 x 128 is 512 tiles, 5 waves of 108; 128 x 128: 1024, 10 waves; 128 x 64: 19 waves.
    flops = 2.0 * 5 * 108 * 256 * 128 * 4096
    assert flops == 2.0 * 10 * 108 * 128 * 128 * 4096
    finest = 2.0 * 19 * 108 * 128 * 64 * 4096
    assert finest < flops
    assert A100.gemm_seconds("forward", "bf16", 4096, 4096, 4096) == pytest.approx(finest / 271.2e12)
    # A thin product is bound by memory, a tiny one by its launch.
    assert A100.gemm_seconds("forward", "bf16", 1, 50000, 12288) == pytest.approx(
        2.0 * (12288 + 12288 * 50000 + 50000) / 1.733e12
    )
    assert A100.gemm_seconds("forward", "bf16", 8, 8, 8) == 5e-6


@given(sizes, sizes, sizes, st.integers(0, 2), st.integers(1, 5000))
def test_a_larger_gemm_is_never_cheaper(m: int, n: int, k: int, dim: int, more: int) -> None:
    shape = [m, n, k]
    before = A100.gemm_seconds("forward", "bf16", *shape)
    shape[dim] += more
    assert A100.gemm_seconds("forward", "bf16", *shape) >= before
    assert before >= 2.0 * m * n * k / 312e12  # never above the peak


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 10000), st.integers(1, 8))
def test_attention_grows_with_the_square_of_the_sequence(batch: int, heads: int, sequence: int, factor: int) -> None:
    one = A100.attention_seconds("forward", "bf16", batch, heads, sequence, 128)
    assert one == pytest.approx(max(2.0 * batch * heads * sequence**2 * 128 / 187.2e12, 5e-6))
    assert A100.attention_seconds("forward", "bf16", batch, heads, sequence * factor, 128) >= one
    assert A100.attention_seconds("backward", "bf16", batch, heads, sequence, 128) >= one


@pytest.mark.parametrize("operation", list(EAGER_PASSES))
def test_a_memory_bound_operation_counts_its_passes(operation: str) -> None:
    for direction, passes in zip(("forward", "backward"), EAGER_PASSES[operation], strict=True):
        seconds = A100.memory_seconds(operation, "bf16", 1e9, direction)
        assert seconds == pytest.approx(passes * 2e9 / 1.733e12)
        assert A100.memory_seconds(operation, "bf16", 1.0, direction) == (5e-6 if passes else 0.0)


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
            CollectivePoint(operation="all_reduce", ranks=2, bytes=100000, seconds=5e-4),
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


def test_a_measured_collective_and_the_sizes_around_it() -> None:
    hardware = measured()
    assert hardware.collective_seconds("all_reduce", 2, 1000) == pytest.approx(1e-4)
    assert hardware.collective_seconds("all_reduce", 4, 1000) == pytest.approx(3e-4)
    assert hardware.collective_seconds("all_gather", 2, 1000) is None
    # 3 ranks: log-nearest is 4, whose 3 latencies become 2.
    assert hardware.collective_seconds("all_reduce", 3, 1000) == pytest.approx(3e-4 * 2 / 3)
    # 8 ranks, ten times the bytes: latency 3e-4 x 7/3; the rest, 27e-4, has (7/8) / (3/4) of its bytes on the wire.
    assert hardware.collective_seconds("all_reduce", 8, 10000) == pytest.approx(3e-4 * 7 / 3 + 27e-4 * 7 / 6)
    assert hardware.collective_seconds("send_recv", 2, 5000) == pytest.approx(1e-3)


@given(
    st.sampled_from(("all_reduce", "send_recv")),
    st.integers(2, 64),
    st.floats(1, 1e9),
    st.floats(1, 1e3),
)
def test_more_bytes_never_take_a_measured_collective_less(op: str, ranks: int, size: float, factor: float) -> None:
    hardware = measured()
    less = hardware.collective_seconds(op, ranks, size)
    more = hardware.collective_seconds(op, ranks, size * factor)
    assert less is not None
    assert more is not None
    assert more >= less * (1 - 1e-12)


def test_what_a_profile_supports() -> None:
    assert [A100.supports(dtype) for dtype in ("bf16", "fp16", "fp32")] == [True, True, False]
    assert not small_hardware(attention_models=()).supports("fp32")
    assert not small_hardware(gemm_models=()).supports("fp32")
    assert not measured(gemm_models=(), gemm=()).supports("fp32")


# ---- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_catalogue("hardware"))
def test_a_catalogue_profile_says_where_each_figure_is_from(name: str) -> None:
    hardware = load_hardware(resolve_hardware_path(name))
    assert hardware.name == name
    assert hardware.supports("bf16")
    assert all(model.source for model in (*hardware.gemm_models, *hardware.attention_models))
    for key in ("peak_flops_per_second", "memory_bandwidth_bytes_per_second", "hidden_communication"):
        assert key in hardware.provenance
    for model in hardware.gemm_models:
        assert model.achievable_flops_per_second < hardware.peak_flops_per_second[model.dtype]


@pytest.mark.parametrize("hardware", [A100, measured(), small_hardware(name="1e3", allocator_slack=0.0)])
def test_a_profile_survives_its_file(tmp_path: Path, hardware: HardwareProfile) -> None:
    save_hardware(hardware, tmp_path / "h.yaml")
    assert load_hardware(tmp_path / "h.yaml") == hardware
    assert (tmp_path / "h.yaml").read_text(encoding="utf-8").startswith(f"schema: {SCHEMA}\n")


def document() -> dict[str, Any]:
    text = measured().to_dict()
    del text["schema"]
    return text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("memory_bytes",), 0, "a finite number > 0"),
        (("hidden_communication",), -0.1, "a finite number >= 0"),
        (("peak_flops_per_second", "fp32"), "fast", "a finite number > 0"),
        (("gemm", 1, "seconds"), 0, "a finite number > 0"),
        (("gemm", 0, "m"), 1.5, "a whole number >= 1"),
        (("gemm", 0, "dtype"), "fp64", "one of fp32, bf16, fp16"),
        (("gemm", 0, "operation"), "backward", "one of forward, input_grad, weight_grad"),
        (("attention", 0, "direction"), "sideways", "one of forward, backward"),
        (("memory", 0, "operation"), "sort", "one of " + ", ".join(EAGER_PASSES)),
        (("collectives", 0, "ranks"), 0, "a whole number >= 2"),
        (("gemm_models", 0, "units"), 0, "a whole number >= 1"),
    ],
)
def test_a_figure_that_cannot_be_names_its_place(path: tuple[Any, ...], value: object, expected: str) -> None:
    text = document()
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


def test_no_more_communication_can_be_hidden_than_all() -> None:
    with pytest.raises(InputError):
        HardwareProfile.from_dict(Reader(document() | {"hidden_communication": 90}, source="h.yaml"))


def test_a_precision_is_supported_only_with_all_its_operations() -> None:
    assert not measured(gemm_models=(), attention_models=()).supports("fp32")


def test_a_collective_of_one_rank_is_refused_or_harmless() -> None:
    points = (CollectivePoint(operation="all_reduce", ranks=1, bytes=1000, seconds=1e-4),)
    text = replace(measured(), collectives=points).to_dict()
    del text["schema"]
    try:
        hardware = HardwareProfile.from_dict(Reader(text, source="h.yaml"))
    except InputError:
        return
    assert hardware.collective_seconds("all_reduce", 2, 1000) is not None
