"""Starts of pipelines with chunks: layers dealt out by rank, and what moves off the critical path make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import better_assignment as module
from planner.better_assignment import better_assignment, quicker_by_neighbours
from planner.bounds import fits
from planner.first_assignment import dealt_by_rank, first_assignment
from planner.layout_costs import Blocks, LayoutCosts, StageCount
from planner.schedule import Pipeline
from planner.simulation import Simulation, StageSeconds, simulate
from tests.oracles.brute_force import fastest, priced
from tests.oracles.chunked_pipeline import interleaved
from tests.property.worlds import any_layout_costs
from tests.thinned import examples

MODES = ("none", "full")


def widths(costs: LayoutCosts, widest: int) -> list[list[int]]:
    """Layers of each chunk of each rank."""
    counts = dealt_by_rank(costs, MODES, widest)
    return [[counts[stage][0].total for stage in costs.layout.stages_of(rank)] for rank in range(costs.layout.pp)]


def test_ranks_have_as_many_layers_and_chunks_the_same_width_on_all() -> None:
    assert widths(interleaved(20, 4, 3), 2) == [[1, 2, 2]] * 4
    assert widths(interleaved(20, 4, 3), 0) == [[2, 1, 2]] * 4
    assert widths(interleaved(16, 4, 3), 1) == [[1, 2, 1]] * 4
    assert widths(interleaved(18, 4, 3), 2) == [[1, 2, 2], [1, 2, 2], [1, 1, 2], [1, 1, 2]]
    # A head as long as two layers takes the place of two.
    assert widths(interleaved(18, 4, 3, head_seconds=6.0), 2) == [[1, 2, 2]] * 3 + [[1, 2, 0]]


def test_moves_find_what_is_better() -> None:
    """Seven layers on two ranks of three chunks, where the start recomputes: the best by trying everything."""
    costs, found = interleaved(7, 2, 3), list[tuple[float, float]]()
    every = list(priced(costs, MODES))
    for limit in (6.0, 7.0, 8.0):
        start, best = first_assignment(costs, limit, MODES), fastest(every, limit)
        assert best is not None
        better = better_assignment(costs, start, limit, MODES)
        assert costs.step(better) == best.step_seconds
        found.append((costs.step(start), costs.step(better)))
    assert found == [(52.0, 51.0), (52.0, 49.0), (52.0, 49.0)]


def test_layers_go_to_the_neighbour_that_is_done_sooner() -> None:
    """Eight layers on two stages, of which the last has a long head: as good as the best of all splits."""
    costs = interleaved(8, 2, 1, head_seconds=6.0)

    def split(first: int) -> tuple[StageCount, ...]:
        return (Blocks(none=first),), (Blocks(none=8 - first),)

    best = min(map(split, range(9)), key=costs.step)
    assert costs.step(best) < costs.step(split(4))
    assert costs.step(quicker_by_neighbours(costs, split(4), 3)) == costs.step(best)
    assert quicker_by_neighbours(costs, split(4), 0) == split(4)


@examples(60, 5)
@given(any_layout_costs())
def test_layers_that_go_to_neighbours_take_no_longer(costs_and_modes: tuple[LayoutCosts, tuple[str, ...]]) -> None:
    costs, modes = costs_and_modes
    start = first_assignment(costs, math.inf, modes)
    quicker = quicker_by_neighbours(costs, start, 3)
    assert costs.step(quicker) <= costs.step(start)
    assert [sum(stage[k].total for stage in quicker) for k in range(len(costs.segments))] == [
        segment.layers for segment in costs.segments
    ]
    assert all(sum(blocks.total for blocks in stage) for stage in quicker[1:-1])
    held = [k for stage in quicker for k, blocks in enumerate(stage) if blocks.total]
    assert held == sorted(held)


@examples(60, 5)
@given(any_layout_costs(), st.data())
def test_what_is_made_better_fits_and_is_never_slower(
    costs_and_modes: tuple[LayoutCosts, tuple[str, ...]], data: st.DataObject
) -> None:
    costs, modes = costs_and_modes
    every = list(priced(costs, modes))
    start = data.draw(st.sampled_from(every))
    better = better_assignment(costs, start.counts, start.peak_bytes, modes)
    assert better in [candidate.counts for candidate in every]
    assert fits(costs, better, start.peak_bytes)
    assert costs.step(better) <= costs.step(start.counts)


def test_paths_that_ruled_moves_out_spare_simulations_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    played = list[float]()

    def counted(pipeline: Pipeline, durations: Sequence[StageSeconds], hop_seconds: Sequence[float]) -> Simulation:
        played.append(sum(hop_seconds))
        return simulate(pipeline, durations, hop_seconds)

    monkeypatch.setattr(module, "simulate", counted)
    costs = interleaved(19, 4, 3, head_seconds=2.0)
    start, numbers, found = first_assignment(costs, 10.0, MODES), list[int](), list[object]()
    for most in (0, 40):
        monkeypatch.setattr(module, "_MOST_PATHS", most)
        played.clear()
        found.append(better_assignment(costs, start, 10.0, MODES))
        numbers.append(len(played))
    assert found[0] == found[1]
    assert 2 * numbers[1] < numbers[0], numbers
