"""A program over fractions of layers that HiGHS keeps between cuts, so that each starts from the answer before it.

pulp makes a new model for every solve. Of the hundreds of small programs of a search that takes most of the time, so
here pulp writes the model once, and rows and bounds that come later are given to the solver as they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pulp

_INFEASIBLE = ("kInfeasible", "kUnboundedOrInfeasible")  # no second is below 0, so unbounded it is not


class RelaxedProgram:
    """`problem` as if its whole numbers were not; constraints that come later are added to it, never taken away.

    After `solve`, `optimal` and `infeasible` say how it ended; where neither holds, nothing is proven.
    """

    def __init__(self, problem: pulp.LpProblem, solver: pulp.HiGHS) -> None:
        solver.createAndConfigureSolver(problem)
        solver.buildSolverModel(problem)
        self._model: Any = problem.solverModel
        self._values: Sequence[float] = ()
        self.optimal = self.infeasible = False

    def add(self, constraint: pulp.LpConstraint) -> None:
        """One row more, of variables that the problem had from the start."""
        low, high = constraint.getLb(), constraint.getUb()
        items = [(variable.index, factor) for variable, factor in constraint.items() if factor]
        self._model.addRow(
            -math.inf if low is None else low,
            math.inf if high is None else high,
            len(items),
            [index for index, _ in items],
            [factor for _, factor in items],
        )

    def within(self, variable: Any, least: float, most: float) -> None:
        """A variable gets other bounds."""
        self._model.changeColBounds(variable.index, least, most)

    def solve(self) -> None:
        self._model.run()
        ended = self._model.getModelStatus().name
        self.optimal, self.infeasible = ended == "kOptimal", ended in _INFEASIBLE
        self._values = self._model.getSolution().col_value if self.optimal else ()

    def value(self, variable: Any) -> float:
        """Of a variable of the problem, in the last answer, which was optimal."""
        return self._values[variable.index]
