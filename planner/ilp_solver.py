"""The solver of integer programs: HiGHS, or the CBC that pulp ships."""

from __future__ import annotations

from typing import Any

import pulp

# HiGHS's heuristics that solve programs of their own: the effort does not hold back all of them.
_SMALLER = tuple(f"mip_heuristic_run_{name}" for name in ("rins", "rens", "root_reduced_cost"))
_NO_SMALLER_PROGRAMS: dict[str, Any] = {"mip_heuristic_effort": 0.0, **dict.fromkeys(_SMALLER, False)}

# How far a row may be missed where numbers are whole. At the tight one HiGHS has called a program impossible that has
# an answer (tests/test_linear_program.py); at the other an answer may be a few bytes above the limit (`solve_stages`).
TOLERANCE, TIGHT_TOLERANCE = 1e-7, 1e-9


def make_solver(limit_seconds: float, whole: bool = True, heuristics: bool = True, tolerance: float = TOLERANCE) -> Any:
    """HiGHS, or CBC where HiGHS is missing; one thread, no gap, stopped after `limit_seconds`.

    Not `whole`: numbers of layers may be fractions. Without `heuristics` HiGHS solves no smaller programs to find an
    answer, which takes most of its time where a good one is known.
    """
    highs = pulp.HiGHS(
        mip=whole,
        msg=False,
        gapRel=0.0,
        threads=1,
        timeLimit=limit_seconds,
        primal_feasibility_tolerance=1e-9,
        dual_feasibility_tolerance=1e-9,
        mip_feasibility_tolerance=tolerance,
        mip_pscost_minreliable=2,  # many small nodes: trying branches out costs more than it tells
        **({} if heuristics else _NO_SMALLER_PROGRAMS),
    )
    if highs.available():
        return highs
    # The CBC that pulp 3 ships, found by its path: PULP_CBC_CMD would warn that pulp 4 does not ship it.
    bundled = pulp.apis.coin_api.pulp_cbc_path
    return pulp.COIN_CMD(path=bundled, mip=whole, msg=False, gapRel=0.0, threads=1, timeLimit=limit_seconds)
