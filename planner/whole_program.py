"""A program over whole numbers of layers as pulp has it, which hands it to HiGHS or to CBC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pulp

from .linear_program import LinearProgram


class WholeAnswer(NamedTuple):
    """The value of every column, None where none is known; and a bound of the objective that no whole numbers are
    below, infinite where there are none."""

    values: Sequence[float] | None
    bound: float


class WholeProgram:
    """`linear` as pulp's problem; rows that come later are taken over by the next `solve`."""

    def __init__(self, linear: LinearProgram) -> None:
        self._linear, self._taken = linear, 0
        self._problem = pulp.LpProblem("stages", pulp.LpMinimize)
        self._columns = [
            self._problem.add_variable(
                one.name, one.least, _finite(one.most), cat=pulp.LpInteger if one.whole else pulp.LpContinuous
            )
            for one in linear.columns
        ]
        self._problem += self._columns[linear.objective]

    def within(self, column: int, least: float, most: float) -> None:
        """A column gets other bounds here."""
        variable = self._columns[column]
        variable.lowBound, variable.upBound = least, _finite(most)

    def solve(self, solver: Any) -> WholeAnswer:
        """The best whole numbers that pulp's `solver` finds, and its dual bound, or without one (CBC) what they cost.

        Its status is read for "infeasible" alone: a time-limited answer is called optimal too.
        """
        self._take_rows()
        problem = self._problem
        problem.solve(solver)
        if problem.status == pulp.LpStatusInfeasible:
            return WholeAnswer(None, math.inf)
        model = getattr(problem, "solverModel", None)
        if problem.status != pulp.LpStatusOptimal:
            return WholeAnswer(None, model.getInfo().mip_dual_bound if model is not None else 0.0)
        values = [float(variable.value() or 0.0) for variable in self._columns]
        if model is None and problem.sol_status != pulp.LpSolutionOptimal:
            return WholeAnswer(values, 0.0)  # CBC ran out of time: an answer without a bound
        objective = values[self._linear.objective]
        return WholeAnswer(values, objective if model is None else min(objective, model.getInfo().mip_dual_bound))

    def _take_rows(self) -> None:
        new = self._linear.rows(self._taken)
        places = pairwise((*new.starts, len(new.columns)))
        for name, (start, end), least, most in zip(new.names, places, new.least, new.most, strict=True):
            columns = [self._columns[place] for place in new.columns[start:end]]
            row = pulp.LpAffineExpression(dict(zip(columns, new.factors[start:end], strict=True)))
            if least == most:
                self._problem += row == least, name
            elif most == math.inf:
                self._problem += row >= least, name
            else:
                assert least == -math.inf, f"{name} is bounded twice"
                self._problem += row <= most, name
        self._taken += len(new.names)


def _finite(most: float) -> float | None:
    return None if most == math.inf else most
