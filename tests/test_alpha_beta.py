"""The α-β formula against numbers by hand, and its fit: known figures come back, and nothing is ever negative."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.alpha_beta import PASSES, AlphaBeta, Fit, Sample, fit
from profiles.cluster import COLLECTIVES

SIZES = [2.0**power for power in range(10, 31, 2)]  # 1 KiB to 1 GiB


# ---- the formula -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        # 4 ranks, 4 MB at 1 GB/s: a pass is 3 steps of 2 us and 3 MB; 10 us come once.
        ("all_reduce", 10e-6 + 6 * 2e-6 + 6e-3),
        ("all_gather", 10e-6 + 3 * 2e-6 + 3e-3),
        ("reduce_scatter", 10e-6 + 3 * 2e-6 + 3e-3),
        ("all_to_all", 10e-6 + 3 * 2e-6 + 3e-3),
        ("broadcast", 10e-6 + 3 * 2e-6 + 3e-3),
        ("send_recv", 10e-6 + 2e-6 + 4e-3),
        ("exchange", 10e-6 + 2e-6 + 4e-3),
    ],
)
def test_the_formula_by_hand(operation: str, seconds: float) -> None:
    figures = AlphaBeta(fixed_seconds=10e-6, step_seconds=2e-6, bandwidth_bytes_per_second=1e9)
    assert figures.seconds(operation, 4, 4e6) == pytest.approx(seconds, rel=1e-12)
    # With a ramp of three times the bytes, what is on the wire takes the square root of 1 + 3 times as long.
    wire = {"all_reduce": 6e-3, "send_recv": 4e-3, "exchange": 4e-3}.get(operation, 3e-3)
    ramped = replace(figures, ramp_bytes=12e6).seconds(operation, 4, 4e6)
    assert ramped == pytest.approx(seconds + wire, rel=1e-12)


def test_every_collective_has_its_passes() -> None:
    assert set(PASSES) == set(COLLECTIVES)


@given(st.sampled_from(COLLECTIVES), st.floats(1, 1e12), st.floats(1, 1e6), st.floats(0, 1e10))
def test_more_bytes_take_longer_and_a_ramp_only_adds(operation: str, size: float, factor: float, ramp: float) -> None:
    plain = AlphaBeta(fixed_seconds=1e-5, step_seconds=1e-6, bandwidth_bytes_per_second=1e10)
    ramped = replace(plain, ramp_bytes=ramp)
    assert ramped.seconds(operation, 8, size * factor) >= ramped.seconds(operation, 8, size) * (1 - 1e-12)
    assert ramped.seconds(operation, 8, size) >= plain.seconds(operation, 8, size)


# ---- the fit of what the formula itself has made ---------------------------------------------------------


def synthetic(
    figures: AlphaBeta,
    operations: Iterable[str] = ("all_reduce", "all_gather"),
    ranks: Sequence[int] = (2, 4, 8),
    sizes: Sequence[float] = SIZES,
    sharing: float = 1.0,
) -> list[Sample]:
    lent = replace(figures, bandwidth_bytes_per_second=figures.bandwidth_bytes_per_second * sharing)
    return [Sample(o, n, s, lent.seconds(o, n, s), sharing) for o in operations for n in ranks for s in sizes]


def fitted(samples: Sequence[Sample]) -> Fit:
    found = fit(samples)
    assert found is not None
    return found


def assert_same(one: AlphaBeta, other: AlphaBeta, rel: float = 1e-8) -> None:
    assert one.fixed_seconds == pytest.approx(other.fixed_seconds, rel=rel, abs=1e-13)
    assert one.step_seconds == pytest.approx(other.step_seconds, rel=rel, abs=1e-13)
    assert one.bandwidth_bytes_per_second == pytest.approx(other.bandwidth_bytes_per_second, rel=rel)
    assert one.ramp_bytes == other.ramp_bytes


latencies = st.just(0.0) | st.floats(-6, -4).map(lambda exponent: 10.0**exponent)
known = st.builds(
    AlphaBeta,
    fixed_seconds=latencies,
    step_seconds=latencies,
    bandwidth_bytes_per_second=st.floats(9, 12).map(lambda exponent: 10.0**exponent),
    ramp_bytes=st.sampled_from([0.0, *(SIZES[-1] * 4.0**-power for power in range(8))]),
)


@settings(max_examples=60, deadline=None)
@given(known, st.sampled_from([(2, 4, 8), (2, 3), (4, 16, 64)]), st.sets(st.sampled_from(COLLECTIVES[:5]), min_size=1))
def test_known_figures_come_back(figures: AlphaBeta, ranks: Sequence[int], operations: set[str]) -> None:
    found = fitted(synthetic(figures, sorted(operations), ranks))
    assert_same(found.figures, figures)
    assert max(map(abs, found.residuals)) < 1e-9


@pytest.mark.parametrize(("operation", "steps"), [("all_gather", 7), ("all_reduce", 14), ("send_recv", 1)])
def test_over_one_size_of_group_what_comes_once_is_in_the_steps(operation: str, steps: int) -> None:
    figures = AlphaBeta(
        fixed_seconds=42e-6, step_seconds=3e-6, bandwidth_bytes_per_second=2e11, ramp_bytes=SIZES[-1] / 64
    )
    found = fitted(synthetic(figures, [operation], [8]))
    assert_same(found.figures, replace(figures, fixed_seconds=0.0, step_seconds=3e-6 + 42e-6 / steps))


def test_a_group_that_is_lent_more_links_says_the_same_of_one_device_s_share() -> None:
    figures = AlphaBeta(fixed_seconds=2e-5, step_seconds=4e-6, bandwidth_bytes_per_second=2e10)
    alone, lent = synthetic(figures, ranks=(2, 4)), synthetic(figures, ranks=(16,), sharing=8.0)
    # 16 ranks, 8 in each node: 15/16 of 1 GiB over 160 GB/s.
    assert lent[-1].seconds == pytest.approx(2e-5 + 15 * 4e-6 + 15 / 16 * 2**30 / 160e9, rel=1e-12)
    found = fitted(alone + lent)
    assert_same(found.figures, figures)
    assert max(map(abs, found.residuals)) < 1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(
        AlphaBeta,
        fixed_seconds=st.floats(1e-6, 1e-4),
        step_seconds=st.floats(1e-6, 1e-4),
        bandwidth_bytes_per_second=st.floats(1e9, 1e12),
    ),
    st.lists(st.floats(0.95, 1.05), min_size=66, max_size=66),
)
def test_noise_of_five_percent_moves_the_figures_little(figures: AlphaBeta, noise: list[float]) -> None:
    exact = synthetic(figures)
    samples = [replace(s, seconds=s.seconds * factor) for s, factor in zip(exact, noise, strict=True)]
    found = fitted(samples)
    # Among the candidates are the true figures, whose residuals are 1/0.95 - 1 = 5.3 % at most: the best have a
    # root mean square no larger than that.
    assert math.sqrt(sum(r * r for r in found.residuals) / len(samples)) <= 1 / 0.95 - 1
    assert found.figures.bandwidth_bytes_per_second == pytest.approx(figures.bandwidth_bytes_per_second, rel=0.1)
    for sample in exact:
        seconds = found.figures.seconds(sample.operation, sample.ranks, sample.size_bytes)
        assert seconds == pytest.approx(sample.seconds, rel=0.12)


# ---- the fit of anything ---------------------------------------------------------------------------------

any_samples = st.lists(
    st.builds(
        Sample,
        operation=st.sampled_from(COLLECTIVES),
        ranks=st.sampled_from([2, 3, 4, 8, 64]),
        size_bytes=st.sampled_from([1.0, 1e3, 1e6, 1e9, 1e12]),
        seconds=st.floats(-9, 3).map(lambda exponent: 10.0**exponent),
        sharing=st.sampled_from([1.0, 2.0, 8.0]),
    ),
    max_size=8,
)


def by_hand(figures: AlphaBeta, sample: Sample) -> float:
    """(fitted - measured) / measured, of a ring of one pass or two, or a send."""
    n, size = sample.ranks, sample.size_bytes
    passes = 2 if sample.operation == "all_reduce" else 1
    steps, moved = (
        (1, size) if sample.operation in ("send_recv", "exchange") else (passes * (n - 1), passes * (n - 1) / n * size)
    )
    wire = moved / (figures.bandwidth_bytes_per_second * sample.sharing) * math.sqrt(1 + figures.ramp_bytes / size)
    return (figures.fixed_seconds + steps * figures.step_seconds + wire) / sample.seconds - 1


@settings(max_examples=200, deadline=None)
@given(any_samples)
def test_whatever_was_measured_no_figure_is_negative_and_residuals_are_those_of_the_figures(
    samples: list[Sample],
) -> None:
    found = fit(samples)
    if len({sample.size_bytes for sample in samples}) < 2:
        assert found is None
        return
    assert found is not None
    figures = found.figures
    assert min(figures.fixed_seconds, figures.step_seconds, figures.ramp_bytes) >= 0
    assert 0 < figures.bandwidth_bytes_per_second < math.inf
    for sample, residual in zip(samples, found.residuals, strict=True):
        assert residual == pytest.approx(by_hand(figures, sample), rel=1e-6, abs=1e-9)
    # The least squares: no figure is better a little larger or smaller.
    least = sum(residual**2 for residual in found.residuals)
    for key in ("fixed_seconds", "step_seconds", "bandwidth_bytes_per_second"):
        for factor in (0.99, 1.01):
            other = replace(figures, **{key: getattr(figures, key) * factor})
            assert sum(by_hand(other, sample) ** 2 for sample in samples) >= least * (1 - 1e-6) - 1e-12


def test_residuals_by_hand() -> None:
    """Each size measured twice, as t and 3t: x minimises (x/t - 1)² + (x/3t - 1)² at 1.2 t, off by +20 % and -60 %."""
    figures = AlphaBeta(fixed_seconds=0.0, step_seconds=1e-6, bandwidth_bytes_per_second=1e9)
    once = synthetic(figures, ["send_recv"], [2], [1e3, 1e6, 1e9])
    found = fitted([*once, *(replace(sample, seconds=3 * sample.seconds) for sample in once)])
    assert found.residuals == pytest.approx([0.2] * 3 + [-0.6] * 3, rel=1e-9)
    assert found.figures.step_seconds == pytest.approx(1.2e-6)
    assert found.figures.bandwidth_bytes_per_second == pytest.approx(1e9 / 1.2)
    assert found.summary == "fit of 6 points, residual 40% in the median, 60% worst"


def test_a_latency_that_would_be_negative_is_none() -> None:
    """Twice the seconds for more than twice the bytes: what lies below 0 at 0 bytes is left out, not negative."""
    samples = [Sample("send_recv", 2, size, seconds) for size, seconds in ((1e3, 1e-7), (1e6, 1e-3), (2e6, 2e-3))]
    assert fitted(samples).figures.step_seconds == 0.0


def test_one_size_does_not_tell_latency_from_bandwidth() -> None:
    assert fit([]) is None
    assert fit([Sample("all_gather", n, 1e6, 1e-3 * n) for n in (2, 4, 8)]) is None
    assert fit([Sample("all_gather", 2, size, 1e-3) for size in (1e6, 2e6)]) is not None
