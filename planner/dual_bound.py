"""Seconds that no fractions are below, reckoned from a solver's multipliers: whatever they are, the bound holds.

For any y, with d = c - Aᵀy, every x of l <= x <= u and L <= A·x <= U has

    c·x = y·(A·x) + d·x >= Σ_i min(y_i·L_i, y_i·U_i) + Σ_j min(d_j·l_j, d_j·u_j)

so a solver's tolerances cost the bound as much as its answer is off, and are not believed. With c = 0 a sum above 0
says that there is no such x (Farkas). After Neumaier and Shcherbina, Safe bounds in linear and mixed-integer linear
programming, Mathematical Programming 99 (2004).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .linear_program import Rows

_Numbers = NDArray[np.float64]
_ROUNDING = 1e-9  # relative to the terms of a sum: above it a sum is above 0 however it is rounded


class DualBound:
    """Rows over so many `columns`, to which others are added."""

    def __init__(self, columns: int) -> None:
        self._number = columns
        self._row = self._column = np.empty(0, dtype=np.int64)
        self._factor, self._least, self._most = (np.empty(0) for _ in range(3))

    def add(self, rows: Rows) -> None:
        lengths = np.diff([*rows.starts, len(rows.columns)])
        row = np.repeat(np.arange(len(lengths)) + len(self._least), lengths)
        column = np.array(rows.columns, dtype=np.int64)
        self._row, self._column = np.concatenate([self._row, row]), np.concatenate([self._column, column])
        self._factor = np.concatenate([self._factor, rows.factors])
        self._least, self._most = np.concatenate([self._least, rows.least]), np.concatenate([self._most, rows.most])

    def least(self, multipliers: Sequence[float], objective: int, least: _Numbers, most: _Numbers) -> float:
        """What the column `objective` is at least, where all columns are within `least` and `most`."""
        costs = np.zeros(self._number)
        costs[objective] = 1.0
        return float(self._terms(multipliers, costs, least, most).sum())

    def forbids(self, ray: Sequence[float], least: _Numbers, most: _Numbers) -> bool:
        """Whether the ray proves that nothing is within all rows and columns."""
        terms = self._terms(ray, np.zeros(self._number), least, most)
        return bool(terms.sum() > _ROUNDING * np.abs(terms).sum())

    def _terms(self, multipliers: Sequence[float], costs: _Numbers, least: _Numbers, most: _Numbers) -> _Numbers:
        y = np.asarray(multipliers, dtype=float)
        side = np.where(y > 0, self._least, self._most)
        y = np.where(np.isfinite(side), y, 0.0)  # without an end on that side the row says nothing
        side = np.where(np.isfinite(side), side, 0.0)
        rest = costs - np.bincount(self._column, weights=y[self._row] * self._factor, minlength=self._number)
        edge = np.where(rest > 0, least, np.where(rest < 0, most, 0.0))
        return np.concatenate([y * side, rest * edge])
