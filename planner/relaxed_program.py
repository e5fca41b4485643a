"""A program over fractions of layers that HiGHS keeps between cuts, so that each starts from the answer before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pulp

from .ilp_solver import make_solver
from .linear_program import LinearProgram

_INFEASIBLE = ("kInfeasible", "kUnboundedOrInfeasible")  # no second is below 0, so unbounded it is not


class RelaxedProgram:
    """`linear` as if its whole numbers were not; rows that come later are taken over by the next `solve`.

    After that `optimal` and `infeasible` say how it ended; where neither holds, nothing is proven.
    """

    def __init__(self, linear: LinearProgram) -> None:
        self._linear, self._taken = linear, 0
        configured = pulp.LpProblem("fractions")  # pulp sets the options, and HiGHS gets the numbers without it
        make_solver(math.inf, whole=False).createAndConfigureSolver(configured)
        self._model: Any = configured.solverModel  # type: ignore[attr-defined]
        self._values: Sequence[float] = ()
        self.optimal = self.infeasible = False
        columns = linear.columns
        costs = [float(place == linear.objective) for place in range(len(columns))]
        least, most = [one.least for one in columns], [one.most for one in columns]
        self._model.addCols(len(columns), costs, least, most, 0, [], [], [])

    def within(self, column: int, least: float, most: float) -> None:
        """A column gets other bounds here."""
        self._model.changeColBounds(column, least, most)

    def solve(self) -> None:
        new = self._linear.rows(self._taken)
        number = len(new.names)
        self._model.addRows(number, new.least, new.most, len(new.columns), new.starts, new.columns, new.factors)
        self._taken += number
        self._model.run()
        ended = self._model.getModelStatus().name
        self.optimal, self.infeasible = ended == "kOptimal", ended in _INFEASIBLE
        self._values = self._model.getSolution().col_value if self.optimal else ()

    def value(self, column: int) -> float:
        """Of a column in the last answer, which was optimal."""
        return self._values[column]
