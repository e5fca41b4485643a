"""A linear program as numbers: columns with bounds, rows with factors.

pulp's expressions are kind to whoever writes one program; a search writes hundreds, most of which the first solve over
fractions ends. So rows are written once, as numbers: HiGHS gets those as they are (`relaxed_program`), pulp where
whole numbers are asked for (`whole_program`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Column(NamedTuple):
    """A variable: its name, bounds, and whether it is a whole number."""

    name: str
    least: float
    most: float
    whole: bool


class Rows(NamedTuple):
    """least <= Σ factor · column <= most; columns and factors of row i are those from starts[i] on."""

    names: list[str]
    starts: list[int]
    columns: list[int]
    factors: list[float]
    least: list[float]
    most: list[float]


class LinearProgram:
    """The least of one column, `objective`. Rows may still come when solvers have taken over those before."""

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self.objective = 0
        self._rows = Rows([], [], [], [], [], [])

    def column(self, name: str, least: float = 0.0, most: float = math.inf, *, whole: bool = False) -> int:
        """The number of a new variable."""
        self.columns.append(Column(name, least, most, whole))
        return len(self.columns) - 1

    def binary(self, name: str) -> int:
        return self.column(name, 0.0, 1.0, whole=True)

    def at_most(self, column: int, most: float) -> None:
        """An upper bound that the rows imply: what is reckoned from multipliers needs an end of every column."""
        self.columns[column] = self.columns[column]._replace(most=most)

    def most_of(self, factors: Mapping[int, float], constant: float) -> float:
        """A sum with each column at its most; the factors are above 0."""
        return constant + sum(each * self.columns[place].most for place, each in factors.items())

    def equals(self, name: str, column: int, factors: Mapping[int, float], constant: float) -> None:
        """The column is such a sum."""
        self.row(name, {**factors, column: -1.0}, -constant, -constant)
        self.at_most(column, self.most_of(factors, constant))

    def row(self, name: str, factors: Mapping[int, float], least: float = -math.inf, most: float = math.inf) -> None:
        """One row more, of columns that are there."""
        rows = self._rows
        rows.names.append(name)
        rows.starts.append(len(rows.columns))
        rows.columns.extend(factors)
        rows.factors.extend(factors.values())
        rows.least.append(least)
        rows.most.append(most)

    @property
    def number_of_rows(self) -> int:
        return len(self._rows.names)

    def rows(self, first: int = 0) -> Rows:
        """Those from row `first` on; their starts count from its own."""
        rows = self._rows
        begin = rows.starts[first] if first < len(rows.starts) else len(rows.columns)
        return Rows(
            rows.names[first:],
            [start - begin for start in rows.starts[first:]],
            rows.columns[begin:],
            rows.factors[begin:],
            rows.least[first:],
            rows.most[first:],
        )
