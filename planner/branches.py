"""A layout's bound where ranks and stages hold whole layers: branch and bound over programs of fractions.

The solver branches on stages, of which a rank with chunks has many that make up for each other, so for long its bound
stays where it was. Layers of a rank do not: eight layers on a rank take as long wherever they lie. Then the widths of
stages: of more layers than stages one has two at least, and while its microbatches go through it all others wait.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .counted import Held
from .simulation import StageSeconds
from .stage_ilp import RELATIVE_TOLERANCE, Program

AT_ONCE_SECONDS = 1.0  # that a program over whole numbers may take at first
_MOST_BRANCHES = 1000
_CUTS = 4  # in a branch, at most
_CUT_ENOUGH = 1e-3  # relative: a simulation that is no longer than this above the program's makespan
_WHOLE = 1e-6


# Adds the critical path of these durations if it is longer than so many seconds, and returns its seconds.
Cut = Callable[[Sequence[StageSeconds], float], float]


class Branch(NamedTuple):
    """Seconds that no assignment is below that holds what is `held`.

    `split` is the name of what is not whole in the branch's program and its fraction, None where all are whole.
    `patience_seconds` is how long a program over whole numbers may take: twice as much after each that did not end.
    """

    least_seconds: float
    held: Held = ()
    split: tuple[str, float] | None = None
    patience_seconds: float = AT_ONCE_SECONDS


def split_branches(
    program: Program,
    branches: Sequence[Branch],
    enough_seconds: float,
    deadline: float,
    cut: Cut,
) -> tuple[list[Branch], bool]:
    """(branches that are left, the least first; whether there is more to split) of those begun.

    Ends where the least is above `enough_seconds` or all whole. A branch is left out that does not reach the program's
    goal.
    """
    heap, tried = list(branches), 0
    if len(heap) == 1:  # nothing is split yet
        heap = [branch for branch in (_relaxed(program, heap[0], cut),) if branch is not None]
    while heap and heap[0].split is not None and tried < _MOST_BRANCHES and time.monotonic() < deadline:
        if heap[0].least_seconds > enough_seconds * (1 + RELATIVE_TOLERANCE):
            break
        branch = heapq.heappop(heap)
        assert branch.split is not None
        name, value = branch.split
        for fewest, most in ((0, math.floor(value)), (math.ceil(value), program.counted[name].most)):
            tried += 1
            held = _narrowed(branch.held, name, fewest, most)
            child = _relaxed(program, branch._replace(held=held), cut)
            if child is not None:
                heapq.heappush(heap, child)
    more = bool(heap) and heap[0].split is not None and tried < _MOST_BRANCHES
    return heap, more


def _narrowed(held: Held, name: str, fewest: int, most: int) -> Held:
    """What is held, and the variable between both numbers too."""
    for own, low, high in held:
        if own == name:
            fewest, most = max(fewest, low), min(most, high)
    return (*(one for one in held if one[0] != name), (name, fewest, most))


def _relaxed(program: Program, branch: Branch, cut: Cut) -> Branch | None:
    """The branch with the least of its fractions; None where they do not reach the goal. One that no program is solved
    for is left as it is, not to be split."""
    answer, split = None, None
    for _ in range(_CUTS):
        answer = program.relax(branch.held)
        if answer is None:
            break
        least = (answer.step_seconds + program.costs.step_seconds) * (1 - RELATIVE_TOLERANCE)
        branch = branch._replace(least_seconds=max(branch.least_seconds, least))
        split = _most_fractional(program)
        enough = answer.makespan_seconds * (1 + _CUT_ENOUGH)
        if cut(answer.durations, enough) <= enough:
            break
    if answer is None and program.impossible:
        return None
    return branch._replace(split=split)


def _most_fractional(program: Program) -> tuple[str, float] | None:
    """Of those whose turn is first the one farthest from a whole number."""
    assert program.relaxed is not None
    found = {name: program.relaxed.value(one.column) for name, one in program.counted.items()}
    far = {name: abs(value - round(value)) for name, value in found.items()}
    fractions = [name for name in found if far[name] > _WHOLE]
    if not fractions:
        return None
    name = min(fractions, key=lambda name: (program.counted[name].turn, -far[name]))
    return name, found[name]
