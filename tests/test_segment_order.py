"""Layers of several kinds in the model's order: rows that hold every chain that stages may take, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import pytest

from planner.layout_costs import LayoutCosts
from planner.linear_program import LinearProgram
from planner.part_seconds import Seconds
from planner.segment_order import stages_of_segments, write_order
from tests.oracles.brute_force import assignments, fastest, priced
from tests.oracles.chunked_pipeline import interleaved
from tests.test_branches import bound_by_branches, program_of

MODES = ("none",)


def of_kinds(layers: Sequence[int], pp: int = 2, chunks: int = 2, seconds: float = 1.0) -> LayoutCosts:
    """Runs of so many layers, whose forwards take 1 s and, every second run, `seconds`."""
    costs = interleaved(sum(layers), pp, chunks)
    (segment,) = costs.segments
    other = replace(segment, seconds=replace(segment.seconds, forward=Seconds(seconds)))
    kinds = [replace(other if k % 2 else segment, layers=number) for k, number in enumerate(layers)]
    return replace(costs, segments=tuple(kinds))


def chains(costs: LayoutCosts) -> list[tuple[tuple[int, ...], ...]]:
    """Layers by stage and segment of every assignment."""
    every = assignments([segment.layers for segment in costs.segments], costs.layout.stages, MODES)
    return [tuple(tuple(blocks.total for blocks in stage) for stage in counts) for counts in every]


def holds(linear: LinearProgram, values: Mapping[int, int]) -> bool:
    rows = linear.rows()
    ends = [*rows.starts[1:], len(rows.columns)]
    sums = [
        sum(rows.factors[i] * values[rows.columns[i]] for i in range(start, end))
        for start, end in zip(rows.starts, ends, strict=True)
    ]
    return all(least <= each <= most for least, each, most in zip(rows.least, sums, rows.most, strict=True))


@pytest.mark.parametrize("layers", [(3, 5), (1, 6), (6, 1), (2, 2, 2), (1, 4, 1)])
def test_the_rows_hold_what_is_in_order_and_nothing_else(layers: tuple[int, ...]) -> None:
    costs = of_kinds(layers)
    stages, kinds = range(costs.layout.stages), range(len(layers))
    linear = LinearProgram()
    n = {(s, k): linear.column(f"n_{s}_{k}") for s in stages for k in kinds}
    order = write_order(linear, costs, lambda s, k: [n[s, k]], [max(layers)] * len(layers))
    z = [one.column for one in order.values()]
    legal, of_all = set(chains(costs)), set[tuple[int, ...]]()

    def fits_some_z(chain: Sequence[Sequence[int]]) -> bool:
        placed = {n[s, k]: chain[s][k] for s in stages for k in kinds}
        return any(
            holds(linear, placed | dict(zip(z, chosen, strict=True))) for chosen in product((0, 1), repeat=len(z))
        )

    for chain in legal:
        assert fits_some_z(chain)
        of_all |= {(s, k) for s in stages for k in kinds if chain[s][k]}
        # Two layers of different kinds change places, which few chains survive.
        for (s, k), (t, m) in product(product(stages, kinds), repeat=2):
            if s < t and k != m and chain[s][k] and chain[t][m]:
                mixed = [list(stage) for stage in chain]
                for stage, kind, more in ((s, k, -1), (t, m, -1), (s, m, 1), (t, k, 1)):
                    mixed[stage][kind] += more
                assert fits_some_z(mixed) == (tuple(map(tuple, mixed)) in legal)
    assert {(s, k) for k, allowed in enumerate(stages_of_segments(costs)) for s in allowed} == of_all


def test_where_kinds_meet_is_branched_on_before_all_else() -> None:
    """Two layers that take five times as long come first. Fractions would share them among the ranks."""
    costs = of_kinds((2, 6), chunks=2, seconds=0.1)
    best = fastest(list(priced(costs, MODES)), 1e9)
    assert best is not None
    program = program_of(costs, 1e9, MODES)
    fractions = program.relax()
    assert fractions is not None
    least, branches, more = bound_by_branches(program)
    assert not more
    assert {name for name, _, _ in branches[0].held} & {name for name in program.counted if name.startswith("z_")}
    assert least == pytest.approx(best.step_seconds, rel=1e-3)
    assert fractions.step_seconds < 0.97 * best.step_seconds
