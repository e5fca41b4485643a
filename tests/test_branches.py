"""Bounds where ranks and stages hold whole layers: above fractions, and never above what whole layers reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.branches import Branch, split_branches
from planner.layout_costs import LayoutCosts
from planner.simulation import StageSeconds, known_paths, simulate
from planner.solve_stages import write_rows
from planner.stage_ilp import Program
from tests.oracles.brute_force import fastest, priced
from tests.oracles.chunked_pipeline import interleaved
from tests.property.worlds import any_layout_costs
from tests.thinned import examples

MODES = ("none", "full")


def program_of(costs: LayoutCosts, limit: float, modes: tuple[str, ...]) -> Program:
    program = Program(costs, limit, scale=1.0, modes=modes, goal_seconds=math.inf)
    write_rows(program)
    for path in known_paths(costs.pipeline):
        program.longer_than_path(path)
    return program


def bound_by_branches(program: Program, most_seconds: float = math.inf) -> tuple[float, list[Branch], bool]:
    """(the least of the branches, all of them, whether there is more to split)."""

    def cut(durations: Sequence[StageSeconds], above_seconds: float) -> float:
        simulation = simulate(program.costs.pipeline, durations, program.costs.hop_seconds)
        if simulation.seconds > above_seconds:
            program.longer_than_path(simulation.critical_path)
        return simulation.seconds

    program.relax()
    branches, more = split_branches(program, [Branch(0.0)], most_seconds, math.inf, cut)
    return branches[0].least_seconds if branches else math.inf, branches, more


def test_a_layer_is_not_shared_by_two_ranks() -> None:
    """Seven layers on two ranks: fractions share them evenly, but one rank has four, which take 4 · 3 s · 4."""
    costs = interleaved(7, 2, 3)
    program = program_of(costs, 100.0, MODES)
    fractions = program.relax()
    assert fractions is not None
    assert fractions.step_seconds < 48.0
    least, branches, more = bound_by_branches(program)
    assert least == pytest.approx(48.0, rel=1e-5)
    assert not more
    assert branches[0].split is None
    # Where the least is enough nothing more is split.
    least, _, more = bound_by_branches(program_of(costs, 100.0, MODES), 40.0)
    assert fractions.step_seconds * (1 - 1e-5) <= least < 48.0
    assert more


@pytest.mark.parametrize(("layers", "pp", "chunks"), [(6, 2, 2), (8, 2, 3), (9, 3, 2)])
def test_nor_is_it_shared_by_two_stages(layers: int, pp: int, chunks: int) -> None:
    """As many layers on each rank, but on some stage one more than on others, for which all ranks wait."""
    costs = interleaved(layers, pp, chunks)
    best = fastest(list(priced(costs, ("none",))), 1e9)
    assert best is not None
    least, _, more = bound_by_branches(program_of(costs, 1e9, ("none",)))
    assert not more
    assert least == pytest.approx(best.step_seconds, rel=1e-3)


@examples(60, 5)
@given(any_layout_costs(), st.data())
def test_no_assignment_is_faster_than_the_bound_of_whole_ranks(
    costs_and_modes: tuple[LayoutCosts, tuple[str, ...]], data: st.DataObject
) -> None:
    costs, modes = costs_and_modes
    every = list(priced(costs, modes))
    limit = max(1.0, data.draw(st.sampled_from([candidate.peak_bytes for candidate in every]))) * (1 + 1e-6)
    best = fastest(every, limit)
    if best is not None:
        least, branches, _ = bound_by_branches(program_of(costs, limit, modes))
        assert branches
        assert least <= best.step_seconds * (1 + 1e-9), best.counts
