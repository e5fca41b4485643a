"""A path through a schedule as the row of a program, the same for every program with as many stages.

Programs number their columns so: each phase's seconds by stage, each phase's sum over the stages, then T.
"""

from __future__ import annotations

from functools import lru_cache

from .simulation import Path

PATH_PHASES = ("forward", "backward_input", "backward_weight", "gather", "reduce")


@lru_cache(maxsize=2000)
def path_factors(path: Path) -> dict[int, float]:
    """Factors by column. Counts of 1 on most stages are written through the sum over all, so that rows are short."""
    stages, phases = len(path.forward), len(PATH_PHASES)
    summed = stages * phases
    factors = {summed + phases: -1.0}  # T
    for p, phase in enumerate(PATH_PHASES):
        times = getattr(path, phase)
        base = 1 if times.count(1) > times.count(0) else 0
        if base:
            factors[summed + p] = base
        for s, number in enumerate(times, start=p * stages):
            if number != base:
                factors[s] = number - base
    return factors
