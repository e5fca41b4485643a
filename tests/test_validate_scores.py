"""Errors, the null model, sweeps: against numbers worked out by hand."""

from __future__ import annotations

import pytest

from planner.validate_scores import Outcome, held_out, null_fractions, score, spearman, sweeps


def row(measured: float | None, predicted: float | None, **more) -> Outcome:
    more = {"id": "r", "source": "s", "gpu": "g"} | more
    return Outcome(measured_seconds=measured, predicted_seconds=predicted, **more)


def test_errors_by_hand() -> None:
    rows = [row(1.0, 1.1), row(2.0, 1.6), row(4.0, 4.0), row(None, 3.0), row(5.0, None, skipped="why")]
    found = score(rows, {})
    assert found.n == 3
    assert found.mape == pytest.approx(0.1)
    assert found.median_ape == pytest.approx(0.1)
    assert found.bias == pytest.approx(-0.1 / 3)
    assert (found.null_mape, found.memory_n, found.memory_mape) == (None, 0, None)


def test_memory_errors_by_hand() -> None:
    rows = [row(None, 1.0, measured_memory=40.0, predicted_memory=44.0)]
    rows.append(row(1.0, 1.0, measured_memory=10.0, predicted_memory=8.0))
    found = score(rows, {})
    assert (found.n, found.memory_n) == (1, 2)
    assert found.memory_mape == pytest.approx(0.15)
    assert found.memory_bias == pytest.approx(-0.05)


def test_rows_that_are_too_weak_are_not_scored() -> None:
    assert score([row(1.0, 9.0, unfit="from memory"), row(1.0, 1.0)], {}).mape == 0.0
    assert score([row(1.0, 9.0, unfit="from memory")], {}).mape is None


def test_no_other_constant_fraction_does_better_than_the_null_model() -> None:
    shares = [0.5, 0.42, 0.1, 0.45, 0.44]
    rows = [row(1.0, 1.0, ideal_seconds=share) for share in shares]
    best = null_fractions(rows)["g"]
    assert best == 0.44
    least = score(rows, {"g": best}).null_mape
    assert least == pytest.approx((0.06 + 0.02 + 0.34 + 0.01) / 0.44 / 5)
    for fraction in [f / 1000 for f in range(50, 700)]:
        assert score(rows, {"g": fraction}).null_mape >= least - 1e-12


def test_each_gpu_has_its_own_fraction() -> None:
    rows = [row(1.0, 1.0, ideal_seconds=0.5), row(1.0, 1.0, ideal_seconds=0.2, gpu="h")]
    assert null_fractions(rows) == {"g": 0.5, "h": 0.2}
    assert score(rows, null_fractions(rows)).null_mape == 0.0


@pytest.mark.parametrize(
    ("a", "b", "rank"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        ([1, 1, 2], [1, 2, 3], 0.8660254037844387),
        ([1, 1], [1, 2], None),
    ],
)
def test_rank_correlation(a: list[float], b: list[float], rank: float | None) -> None:
    assert spearman(a, b) == (None if rank is None else pytest.approx(rank))


def test_regret_is_what_the_layout_ranked_first_loses() -> None:
    rows = [
        row(2.0, 1.0, sweep="q", layout="a"),
        row(1.6, 1.2, sweep="q", layout="b"),
        row(4.0, 1.3, sweep="q", layout="c"),
        row(9.0, 0.1, sweep="q", layout="d", unfit="from memory"),
        row(1.0, 1.0, sweep="alone", layout="a"),
        row(1.0, 1.0, sweep="twice the same", layout="a"),
        row(2.0, 1.0, sweep="twice the same", layout="a"),
    ]
    (found,) = sweeps(rows)
    assert (found.name, found.n) == ("q", 3)
    assert found.regret == pytest.approx(0.25)
    assert found.spread == pytest.approx(1.5)
    assert found.spearman == pytest.approx(0.5)


def test_of_layouts_that_tie_the_slowest_counts() -> None:
    rows = [row(1.0, 1.0, sweep="q", layout="a"), row(3.0, 1.0, sweep="q", layout="b")]
    assert sweeps(rows)[0].regret == 2.0
    assert sweeps(reversed(rows))[0].regret == 2.0


def test_a_third_of_the_sources_is_held_out_by_a_fixed_rule() -> None:
    share = sum(held_out(f"source {i}") for i in range(3000)) / 3000
    assert share == pytest.approx(1 / 3, abs=0.03)
    assert [held_out(name) for name in ("a", "b", "SimuMax assets/A100-Pcie.png")] == [False, False, True]
