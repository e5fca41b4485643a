"""The arithmetic of benchmarks/runtime.py: slowest ranks, median ratios, their intervals, bounds."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.paired_ratios import CONFIDENCE, LEAST_PAIRS, ratio_of, slowest, together, values_outside

RANKS = [[1.0, 5.0, 2.0], [3.0, 4.0, 2.5]]


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    assert slowest(RANKS) == [3.0, 5.0, 2.5]


def test_cpu_seconds_of_a_step_are_those_of_all_ranks() -> None:
    assert together(RANKS) == [4.0, 9.0, 4.5]


def test_a_pair_is_divided_before_the_median_is_taken() -> None:
    # The machine is ten times slower in the last four pairs; the medians of the columns would give 11 / 10.
    ours = [1.1, 1.2, 1.3, 11.0, 12.0, 13.0, 14.0]
    theirs = [1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 10.0]
    ratio = ratio_of(ours, theirs)
    assert (ratio.median, ratio.pairs) == (pytest.approx(1.2), 7)
    assert (ratio.low, ratio.high) == (pytest.approx(1.1), pytest.approx(1.4))  # all of seven


@pytest.mark.parametrize(("pairs", "outside"), [(6, 0), (8, 0), (9, 1), (15, 3), (17, 4), (20, 5), (25, 7)])
def test_the_interval_is_the_narrowest_that_has_95_percent(pairs: int, outside: int) -> None:
    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(pairs, below) for below in range(k)) / 2**pairs

    assert values_outside(pairs) == outside
    assert coverage(outside + 1) >= CONFIDENCE > coverage(outside + 2)


def test_the_interval_has_the_median_of_a_skewed_population_about_as_often_as_it_says() -> None:
    draw = random.Random(1)
    found = 0
    for _ in range(2000):
        ratios = [draw.expovariate(1.0) for _ in range(17)]
        ratio = ratio_of(ratios, [1.0] * 17)
        found += ratio.low <= math.log(2) <= ratio.high
    # 1 - 2·P(B < 5) for 17 pairs; 2,000 draws scatter by 0.5 %.
    assert found / 2000 == pytest.approx(0.951, abs=0.015)


def test_a_bound_holds_where_the_lower_end_is_within_it() -> None:
    ratio = ratio_of([1.01, 1.02, 1.03, 1.04, 1.05, 1.06], [1.0] * 6)
    assert [ratio.holds(bound) for bound in (1.00, 1.01, 1.03)] == [False, True, True]
    assert [ratio.holds_whole(bound) for bound in (1.03, 1.05, 1.06)] == [False, False, True]


def test_too_few_pairs_have_no_interval() -> None:
    with pytest.raises(AssertionError, match="5 pairs have no 95% interval"):
        ratio_of([1.0] * (LEAST_PAIRS - 1), [1.0] * (LEAST_PAIRS - 1))
