"""HardwareProfile: seconds of measured points, models where nothing was measured, and what runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from profiles.hardware import HardwareProfile
from profiles.points import (
    EAGER_PASSES,
    AttentionModel,
    AttentionPoint,
    CollectivePoint,
    ContentionPoint,
    GemmModel,
    GemmPoint,
    MemoryPoint,
    ShardPoint,
    WaitPoint,
)
from tests.oracles.small_world import small_hardware

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


def test_contention_of_memory_rises_with_its_bytes() -> None:
    """Between two sizes on a line over their logarithms; beyond them as at the nearest."""
    memory = [
        ContentionPoint(active=n, memory_bytes=size, slowdown=1 + (n - 1) * each)
        for size, each in ((2**10, 0.1), (2**14, 0.5))
        for n in (1, 4)
    ]
    hardware = small_hardware(contention_points=(*CONTENTION, *memory))
    found = [hardware.contention(4, size) for size in (2**8, 2**10, 2**12, 2**14, 2**20)]
    assert found == pytest.approx([1.3, 1.3, 1.9, 2.5, 2.5])
    assert hardware.contention(2.5, 2**14) == pytest.approx(1.75)
    assert hardware.contention(4) == 2.0
    assert small_hardware(contention_points=CONTENTION).contention(4, 2**12) == 2.0  # as a GEMM


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
    falling = (*waits, WaitPoint(compute_seconds=0.2, wait_seconds=1e-3))
    assert small_hardware(waits=falling).wait_seconds(1.0) == pytest.approx(3.8e-3)


def test_cutting_a_block_costs_more_the_more_its_linears_touch() -> None:
    shards = tuple(
        ShardPoint(sequence=sequence, bytes=size, seconds=seconds)
        for sequence, size, seconds in ((False, 2**10, 1.0), (False, 2**12, 2.5), (True, 2**10, 4.0))
    )
    hardware = small_hardware(shard_overheads=shards, shard_overhead_seconds=9.0, sequence_shard_overhead_seconds=9.0)
    found = [hardware.shard_seconds(False, size) for size in (1, 2**10, 2**11, 2**12, 2**20)]
    assert found == pytest.approx([1.0, 1.0, 1.5, 2.5, 2.5])
    assert hardware.shard_seconds(True, 2**20) == 4.0
    plain = small_hardware(shard_overhead_seconds=7.0, sequence_shard_overhead_seconds=8.0)
    assert [plain.shard_seconds(sequence, 2**10) for sequence in (False, True)] == [7.0, 8.0]


def test_what_a_profile_supports() -> None:
    assert [MODELLED.supports(dtype) for dtype in ("bf16", "fp16", "fp32")] == [True, False, False]
    assert not small_hardware(attention_models=()).supports("fp32")
    assert not small_hardware(gemm_models=()).supports("fp32")
    assert not measured(gemm_models=(), gemm=()).supports("fp32")
