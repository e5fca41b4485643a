"""What a rank's known paths take at least: the least of every assignment, and no more."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given

from planner.bounds import largest_segment, lower_bound
from planner.layout import SCHEDULES
from planner.layout_costs import LayoutCosts
from planner.path_bounds import seconds_of_paths
from planner.schedule import BLOCKING
from planner.simulation import known_paths
from tests.oracles.brute_force import priced
from tests.oracles.chunked_pipeline import interleaved
from tests.property.worlds import layout_costs
from tests.thinned import examples


def least_by_trying(costs: LayoutCosts, rank: int) -> list[list[float]]:
    """[path][layers] of each of the rank's paths the least that any assignment makes of it, with so many layers of the
    commonest kind there; infinite where no assignment has so many."""
    segment, stages = largest_segment(costs), costs.layout.stages_of(rank)
    kind, found = costs.segments.index(segment), [[math.inf] * (segment.layers + 1) for _ in range(3)]
    for one in priced(costs, ("none",)):
        layers, durations = sum(one.counts[s][kind].total for s in stages), costs.durations(one.counts)
        for least, path in zip(found, known_paths(costs.pipeline)[3 * rank : 3 * rank + 3], strict=True):
            least[layers] = min(least[layers], path.seconds(durations, costs.hop_seconds))
    return found


@examples(60, 5)
@given(layout_costs(tuple(s for s in SCHEDULES if s not in BLOCKING)))
def test_paths_take_what_the_best_assignment_makes_of_them(costs: LayoutCosts) -> None:
    """Those that rise with the layers by themselves; one that falls is as low as with all of them."""
    for rank in range(costs.layout.pp):
        seconds, tried = seconds_of_paths(costs, costs.segments[0]), least_by_trying(costs, rank)
        possible = [layers for layers in range(costs.layers + 1) if tried[0][layers] < math.inf]
        rising = [path for path in tried if all(path[a] <= path[b] for a, b in pairwise(possible))]
        for layers in possible:
            assert seconds(rank, layers) >= max((path[layers] for path in rising), default=0.0) * (1 - 1e-9)


@examples(60, 5)
@given(layout_costs(SCHEDULES, segments=3))
def test_no_assignment_is_below_its_paths(costs: LayoutCosts) -> None:
    segment = largest_segment(costs)
    for rank in range(costs.layout.pp):
        seconds, tried = seconds_of_paths(costs, segment), least_by_trying(costs, rank)
        found = [seconds(rank, layers) for layers in range(segment.layers + 1)]
        assert found == sorted(found)
        assert all(one <= max(paths) * (1 + 1e-9) for one, *paths in zip(found, *tried, strict=True))


def test_a_rank_waits_for_the_first_microbatch_to_come_down() -> None:
    """Five layers and a head of 3 s on two ranks with two chunks each, four microbatches: 12 s a layer and 12 s the
    head are 36 s for either rank, of which the second works no second before a forward has come down."""
    costs = interleaved(5, 2, 2, head_seconds=3.0)
    assert lower_bound(costs, 1e9, ("none",)) == pytest.approx(37.0)
    assert lower_bound(costs, math.inf, ("none",)) == pytest.approx(36.0)  # where no paths are looked at
