"""What a rank's known paths take at least: the least of every assignment, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given

from planner.bounds import lower_bound
from planner.layout import SCHEDULES
from planner.layout_costs import LayoutCosts
from planner.path_bounds import seconds_of_paths
from planner.schedule import BLOCKING
from planner.simulation import known_paths
from tests.oracles.brute_force import priced
from tests.oracles.chunked_pipeline import interleaved
from tests.property.worlds import layout_costs
from tests.thinned import examples


def least_by_trying(costs: LayoutCosts, rank: int, layers: int) -> float:
    """Of the rank's three paths the longest, each with the assignment that makes it shortest."""
    stages = costs.layout.stages_of(rank)
    every = [one.counts for one in priced(costs, ("none",))]
    here = [counts for counts in every if sum(counts[s][0].total for s in stages) == layers]
    paths = known_paths(costs.pipeline)[3 * rank : 3 * rank + 3]
    return max(
        (min(path.seconds(costs.durations(counts), costs.hop_seconds) for counts in here) for path in paths if here),
        default=0.0,
    )


@examples(60, 5)
@given(layout_costs(tuple(s for s in SCHEDULES if s not in BLOCKING)))
def test_paths_take_what_the_best_assignment_makes_of_them(costs: LayoutCosts) -> None:
    assume(len(costs.segments) == 1)
    seconds = seconds_of_paths(costs, costs.segments[0])
    for rank in range(costs.layout.pp):
        found = [seconds(rank, layers) for layers in range(costs.layers + 1)]
        assert found == sorted(found)
        tried = [least_by_trying(costs, rank, layers) for layers in range(costs.layers + 1)]
        # What rises with the layers by itself is met; what would fall is as low as with all of them.
        for layers in range(costs.layers + 1):
            if tried[layers]:
                assert found[layers] <= tried[layers] * (1 + 1e-9)
                assert tried != sorted(tried) or found[layers] == pytest.approx(tried[layers])


def test_a_rank_waits_for_the_first_microbatch_to_come_down() -> None:
    """Five layers and a head of 3 s on two ranks with two chunks each, four microbatches: 12 s a layer and 12 s the
    head are 36 s for either rank, of which the second works no second before a forward has come down."""
    costs = interleaved(5, 2, 2, head_seconds=3.0)
    assert lower_bound(costs, 1e9, ("none",)) == pytest.approx(37.0)
    without = replace(costs, segments=(*costs.segments, replace(costs.segments[0], layers=0)))  # not of one kind
    assert lower_bound(without, 1e9, ("none",)) == pytest.approx(36.0)
