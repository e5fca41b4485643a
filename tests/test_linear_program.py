"""The program that HiGHS keeps, and the one that pulp does: rows that come later count as if they had been there."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from planner.ilp_solver import make_solver
from planner.linear_program import LinearProgram
from planner.relaxed_program import RelaxedProgram
from planner.whole_program import WholeProgram


def program() -> tuple[LinearProgram, int, int]:
    """Least Z = 2x + 3y of whole numbers with x + y >= 3.5 and x <= 2: 8.5 of fractions, at (2, 1.5)."""
    made = LinearProgram()
    x, y, z = made.column("x", 0, 2, whole=True), made.column("y", whole=True), made.column("Z")
    made.objective = z
    made.row("costs", {x: 2.0, y: 3.0, z: -1.0}, 0.0, 0.0)
    made.row("enough", {x: 1.0, y: 1.0}, least=3.5)
    return made, x, y


def test_fractions_are_allowed() -> None:
    made, x, y = program()
    relaxed = RelaxedProgram(made)
    relaxed.solve()
    assert relaxed.optimal
    assert (relaxed.value(x), relaxed.value(y)) == pytest.approx((2.0, 1.5))


def test_whole_numbers_are_whole() -> None:
    made, x, y = program()
    values, bound = WholeProgram(made).solve(make_solver(math.inf))
    assert values is not None
    assert (values[x], values[y], bound) == pytest.approx((2.0, 2.0, 10.0))


def test_a_row_that_comes_later_counts_as_one_that_was_there() -> None:
    made, x, y = program()
    relaxed, whole = RelaxedProgram(made), WholeProgram(made)
    relaxed.solve()
    whole.solve(make_solver(math.inf))
    made.row("more_of_y", {y: 1.0, x: -1.0}, least=0.5)  # (1.5, 2) is the least then, or (1, 3) of whole numbers
    relaxed.solve()
    fresh = RelaxedProgram(made)
    fresh.solve()
    for each in (relaxed, fresh):
        assert (each.value(x), each.value(y)) == pytest.approx((1.5, 2.0))
    for each in (whole, WholeProgram(made)):
        values, _ = each.solve(make_solver(math.inf))
        assert values is not None
        assert (values[x], values[y]) == pytest.approx((1.0, 3.0))


def test_a_column_within_other_bounds_is_so_in_that_solver_alone() -> None:
    made, x, y = program()
    relaxed, other = RelaxedProgram(made), RelaxedProgram(made)
    relaxed.within(x, 0.0, 1.0)
    for each in (relaxed, other):
        each.solve()
    assert (relaxed.value(x), relaxed.value(y)) == pytest.approx((1.0, 2.5))
    assert other.value(x) == pytest.approx(2.0)
    relaxed.within(x, 0.0, 2.0)
    relaxed.solve()
    assert relaxed.value(x) == pytest.approx(2.0)


def test_what_cannot_be_met_is_proven_and_not_just_unsolved() -> None:
    made, x, y = program()
    relaxed, whole = RelaxedProgram(made), WholeProgram(made)
    made.row("too_few", {x: 1.0, y: 1.0}, most=3.0)
    relaxed.solve()
    assert (relaxed.optimal, relaxed.infeasible) == (False, True)
    assert whole.solve(make_solver(math.inf)) == (None, math.inf)


def stored_program() -> tuple[LinearProgram, dict[int, int]]:
    """A program of llama3-405b's stages that the search came upon, and whole numbers that are within all its rows."""
    packed = Path(__file__).parent / "data" / "program_with_an_answer.json.gz"
    stored, made = json.loads(gzip.decompress(packed.read_bytes())), LinearProgram()
    for number, (least, most, whole) in enumerate(stored["columns"]):
        made.column(f"x{number:04}", least, math.inf if most is None else most, whole=whole)
    for number, (least, most, columns, factors) in enumerate(stored["rows"]):
        of_row = dict(zip(columns, factors, strict=True))
        made.row(
            f"r{number}",
            of_row,
            *(end if end is not None else side * math.inf for end, side in ((least, -1), (most, 1))),
        )
    made.objective = stored["objective"]
    return made, {int(column): layers for column, layers in stored["answer"].items()}


def test_whole_numbers_that_are_there_are_not_called_impossible() -> None:
    """HiGHS 1.15.1 calls this program impossible where rows may be missed by 1e-9 alone: its own bounds of columns are
    rounded by more."""
    made, answer = stored_program()
    known = RelaxedProgram(made)
    for column, layers in answer.items():
        known.within(column, layers, layers)
    known.solve()
    assert known.optimal
    values, bound = WholeProgram(made).solve(make_solver(math.inf, heuristics=False))
    assert values is not None
    assert bound == pytest.approx(known.value(made.objective), rel=1e-6)
