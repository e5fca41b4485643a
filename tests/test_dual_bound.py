"""Whatever the multipliers, no fractions are below what is reckoned from them; a solver's word is not believed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.dual_bound import DualBound
from planner.linear_program import LinearProgram
from planner.relaxed_program import RelaxedProgram


def random_program(seed: int) -> LinearProgram:
    """The least of the first column, with rows on one side, on both and equal, and some that cannot all hold."""
    draw, made = np.random.default_rng(seed), LinearProgram()
    columns = [made.column(f"x{i}", *sorted(draw.integers(-4, 5, 2).astype(float))) for i in range(draw.integers(2, 7))]
    made.objective = columns[0]
    for row in range(draw.integers(1, 9)):
        factors = {
            column: float(draw.choice([-3, -2, -1, 1, 2, 3]))
            for column in columns
            if draw.random() < 0.7 or column == row % len(columns)
        }
        least, most = sorted(draw.integers(-9, 10, 2).astype(float))
        kind = draw.integers(4)
        made.row(f"r{row}", factors, [least, -math.inf, least, most][kind], [most, most, math.inf, most][kind])
    return made


def taken_over(made: LinearProgram) -> tuple[DualBound, np.ndarray, np.ndarray]:
    proof = DualBound(len(made.columns))
    proof.add(made.rows())
    return proof, np.array([c.least for c in made.columns]), np.array([c.most for c in made.columns])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9))
def test_any_multipliers_give_a_bound_and_the_solvers_the_least_itself(seed: int) -> None:
    made = random_program(seed)
    relaxed = RelaxedProgram(made)
    relaxed.solve()
    proof, least, most = taken_over(made)
    draw = np.random.default_rng(seed)
    guessed = draw.normal(size=(20, len(made.rows().names)))
    if not relaxed.optimal:
        assert relaxed.infeasible
        return
    best = relaxed.value(made.objective)
    assert relaxed.bound == pytest.approx(best, abs=1e-7)
    for multipliers in guessed:
        assert proof.least(multipliers.tolist(), made.objective, least, most) <= best + 1e-9
        assert not proof.forbids(multipliers.tolist(), least, most)


def test_rows_that_come_in_turn_count_as_those_that_come_at_once() -> None:
    made = random_program(5)
    number = len(made.rows().names)
    assert number > 2
    at_once, least, most = taken_over(made)
    first, then = LinearProgram(), DualBound(len(made.columns))
    names, starts, columns, factors, lows, highs = made.rows()
    for i in range(number):
        of_row = slice(starts[i], starts[i + 1] if i + 1 < number else len(columns))
        first.row(names[i], dict(zip(columns[of_row], factors[of_row], strict=True)), lows[i], highs[i])
        then.add(first.rows(i))
        then.add(first.rows(i + 1))  # nothing new
    multipliers = np.random.default_rng(0).normal(size=number).tolist()
    bounds = [each.least(multipliers, made.objective, least, most) for each in (at_once, then)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-12)


def test_a_solver_that_says_too_much_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its multipliers are off, its objective is not asked for; and a ray that proves nothing is no proof."""
    made = LinearProgram()
    x, y = made.column("x", 0.0, 10.0), made.column("y", 0.0, 10.0)
    made.objective = x
    made.row("enough", {x: 1.0, y: 1.0}, least=12.0)
    relaxed = RelaxedProgram(made)
    relaxed.solve()
    assert relaxed.bound == pytest.approx(2.0)
    proof, least, most = taken_over(made)
    assert proof.least([1.5], x, least, most) == pytest.approx(18.0 - 5.0 - 15.0)
    assert not proof.forbids([1.0], least, most)
    made.row("too_few", {x: 1.0, y: 1.0}, most=11.0)
    relaxed.solve()
    assert relaxed.infeasible
    monkeypatch.setattr(relaxed, "_model", _Liar(relaxed._model))
    relaxed.solve()
    assert not relaxed.optimal
    assert not relaxed.infeasible


class _Liar:
    """HiGHS, but for a ray that is no proof."""

    def __init__(self, model: object) -> None:
        self._model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def getDualRay(self) -> tuple[object, bool, list[float]]:
        return None, True, [1.0, 1.0]


def test_without_an_end_a_column_proves_nothing() -> None:
    made = LinearProgram()
    x, y = made.column("x"), made.column("y")
    made.row("more", {x: 1.0, y: -1.0}, least=1.0)
    proof, least, most = taken_over(made)
    assert proof.least([1.0], x, least, most) == pytest.approx(1.0)
    assert proof.least([1.0 + 1e-12], x, least, most) == -math.inf
