"""The program that HiGHS keeps: rows that come later count as if they had been there from the start."""

from __future__ import annotations

import pulp
import pytest

from planner.ilp_solver import make_solver
from planner.relaxed_program import RelaxedProgram


def problem() -> tuple[pulp.LpProblem, pulp.LpVariable, pulp.LpVariable]:
    """Least 2x + 3y of whole numbers with x + y >= 3.5 and x <= 2: 8.5 of fractions, at (2, 1.5)."""
    made = pulp.LpProblem("small", pulp.LpMinimize)
    x, y = made.add_variable("x", 0, 2, cat=pulp.LpInteger), made.add_variable("y", 0, cat=pulp.LpInteger)
    made += 2 * x + 3 * y
    made += x + y >= 3.5
    return made, x, y


def kept(made: pulp.LpProblem) -> RelaxedProgram:
    return RelaxedProgram(made, make_solver(float("inf"), whole=False))


def test_fractions_are_allowed() -> None:
    made, x, y = problem()
    relaxed = kept(made)
    relaxed.solve()
    assert relaxed.optimal
    assert (relaxed.value(x), relaxed.value(y)) == pytest.approx((2.0, 1.5))


def test_a_row_that_comes_later_counts_as_one_that_was_there() -> None:
    made, x, y = problem()
    relaxed = kept(made)
    relaxed.solve()
    row = y - x >= 0.5  # (1.5, 2) is the least then
    relaxed.add(row)
    relaxed.solve()
    made += row
    fresh = kept(made)
    fresh.solve()
    for each in (relaxed, fresh):
        assert (each.value(x), each.value(y)) == pytest.approx((1.5, 2.0))


def test_what_cannot_be_met_is_proven_and_not_just_unsolved() -> None:
    made, x, y = problem()
    relaxed = kept(made)
    relaxed.add(x + y <= 3)
    relaxed.solve()
    assert (relaxed.optimal, relaxed.infeasible) == (False, True)
