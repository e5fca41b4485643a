"""A program over fractions of layers that HiGHS keeps between cuts, so that each starts from the answer before it.

HiGHS finds; what is proven is reckoned from its multipliers (`dual_bound`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pulp

from .dual_bound import DualBound
from .ilp_solver import make_solver
from .linear_program import LinearProgram

_INFEASIBLE = ("kInfeasible", "kUnboundedOrInfeasible")  # no second is below 0, so unbounded it is not


class RelaxedProgram:
    """`linear` as if its whole numbers were not; rows that come later are taken over by the next `solve`.

    After that `optimal` says whether there is an answer, which `bound` has the objective's least of, and `infeasible`
    whether it is proven that there is none.
    """

    def __init__(self, linear: LinearProgram) -> None:
        self._linear, self._taken = linear, 0
        configured = pulp.LpProblem("fractions")  # pulp sets the options, and HiGHS gets the numbers without it
        make_solver(math.inf, whole=False).createAndConfigureSolver(configured)
        self._model: Any = configured.solverModel  # type: ignore[attr-defined]
        self._values: Sequence[float] = ()
        self.optimal = self.infeasible = False
        self.bound = -math.inf
        columns = linear.columns
        costs = [float(place == linear.objective) for place in range(len(columns))]
        self._least, self._most = np.array([one.least for one in columns]), np.array([one.most for one in columns])
        self._proof = DualBound(len(columns))
        self._model.addCols(len(columns), costs, self._least, self._most, 0, [], [], [])

    def within(self, column: int, least: float, most: float) -> None:
        """A column gets other bounds here."""
        self._least[column], self._most[column] = least, most
        self._model.changeColBounds(column, least, most)

    def solve(self) -> None:
        self._take_rows()
        self._model.run()
        ended = self._model.getModelStatus().name
        self.optimal, self.infeasible, self._values = ended == "kOptimal", False, ()
        if self.optimal:
            solution = self._model.getSolution()
            self._values = solution.col_value
            self.bound = self._proof.least(solution.row_dual, self._linear.objective, self._least, self._most)
        elif ended in _INFEASIBLE:
            _, found, ray = self._model.getDualRay()
            self.infeasible = found and self._proof.forbids(ray, self._least, self._most)

    def _take_rows(self) -> None:
        new = self._linear.rows(self._taken)
        number = len(new.names)
        if number:
            self._model.addRows(number, new.least, new.most, len(new.columns), new.starts, new.columns, new.factors)
            self._proof.add(new)
            self._taken += number

    def value(self, column: int) -> float:
        """Of a column in the last answer, which was optimal."""
        return self._values[column]
