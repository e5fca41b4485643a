"""The best assignment of a layout: programs, simulations and cuts until they meet (see [Note: Cuts] in `stage_ilp`)."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .better_assignment import better_assignment
from .bounds import fits
from .branches import AT_ONCE_SECONDS, Branch, Cut, split_branches
from .ilp_solver import TIGHT_TOLERANCE, TOLERANCE, make_solver
from .layout import RECOMPUTE_MODES
from .layout_costs import LayoutCosts, StageCount
from .path_rows import PATH_PHASES
from .schedule import Pipeline
from .simulation import Path, StageSeconds, known_paths, simulate
from .stage_ilp import RELATIVE_TOLERANCE, Program

_MOST_CUTS = 1000
# Rounds of cuts before whole numbers are asked for: many where the goal is not reached in so many times a quarter of
# the few, as the last quarter of them rose. And how far above its own bound a step still is then.
_FEW_RELAXED, _MOST_RELAXED, _QUARTERS_TO_GOAL = 40, 200, 20
_RELAXED_ENOUGH = 1e-3
_WELL_ABOVE = 0.03  # the bound of the next layout: fractions are cut no further before that has had its turn
_SPLIT_ABOVE = 0.01  # the same of branches: to come back to a layout takes as long as splitting several
_MOST_SHARED = 200  # paths of a pipeline that layouts share
_TOWARDS_ANSWER = 0.3  # of the way from the best fractions seen to the program's answer


class SharedCuts:
    """Paths that simulations came upon, by pipeline: they lie in its graph whatever its durations, so one layout's are
    valid for every other with the same pipeline. The latest are kept."""

    def __init__(self) -> None:
        self._paths: dict[Pipeline, dict[Path, None]] = {}

    def of(self, pipeline: Pipeline) -> tuple[Path, ...]:
        return tuple(self._paths.get(pipeline, ()))

    def add(self, pipeline: Pipeline, path: Path) -> None:
        paths = self._paths.setdefault(pipeline, {})
        paths.pop(path, None)
        paths[path] = None
        if len(paths) > _MOST_SHARED:
            del paths[next(iter(paths))]


@dataclass(frozen=True)
class Begun:
    """What is kept of a layout that is put aside: the best that it is known to reach, the paths that whole numbers came
    upon, whether what is known has been made better, the branches that are left, and whether they may be split."""

    counts: tuple[StageCount, ...] | None = None
    cuts: tuple[Path, ...] = ()
    climbed: bool = False
    branches: tuple[Branch, ...] = ()
    may_split: bool = True


NOTHING_BEGUN = Begun()
# Finds the costs of an assignment, with what its stages choose, and the assignment; None where none fits.
Start = Callable[[], tuple[LayoutCosts, tuple[StageCount, ...]] | None]


@dataclass(frozen=True)
class Solution:
    """The best assignment found, its simulated step, and a bound no assignment of the layout can beat.

    `counts` is None when nothing fits, or when the layout cannot beat the cut-off (then `bound_seconds`
    is at least the cut-off). `aside` where the bound is not reached, but others should be looked at first.
    `costs` are those of the layout with what its stages have chosen.
    """

    costs: LayoutCosts
    counts: tuple[StageCount, ...] | None
    step_seconds: float
    bound_seconds: float
    ilps_solved: int
    aside: Begun | None = None


def solve_stages(
    costs: LayoutCosts,
    limit_bytes: float,
    *,
    bound_seconds: float,
    cutoff_seconds: float = math.inf,
    aside_seconds: float = math.inf,
    begun: Begun = NOTHING_BEGUN,
    start: Start | None = None,
    modes: Sequence[str] = RECOMPUTE_MODES,
    deadline: float = math.inf,
    shared: SharedCuts | None = None,
) -> Solution:
    """The assignment with the least simulated step that fits `limit_bytes`.

    Args:
        bound_seconds: a valid lower bound (`bounds.lower_bound`); it spares the solver the proof of it.
        cutoff_seconds: stop when no assignment can be faster than this.
        aside_seconds: put the layout aside when its bound is found to be above this.
        begun: what an earlier call kept, or just an assignment that fits, if one is known.
        start: finds one where none is known, called where fractions do not rule the cut-off out.
        modes: what a layer may recompute.
        deadline: of `time.monotonic`; past it the best so far is returned with the bound reached.
        shared: cuts of other layouts, to which this one's are added.
    """
    best, chosen = begun.counts, costs
    # What is known already is simulated later where there is a cut-off: most layouts cannot beat that anyway.
    best_seconds = costs.step(best) if best is not None and cutoff_seconds == math.inf else math.inf
    bound, solved = bound_seconds, 0
    if bound >= min(best_seconds, cutoff_seconds) * (1 - RELATIVE_TOLERANCE):
        return Solution(chosen, best, best_seconds, min(bound, best_seconds), solved)
    program = Program(
        costs, limit_bytes, scale=bound_seconds, modes=tuple(modes), goal_seconds=min(best_seconds, cutoff_seconds)
    )
    write_rows(program)
    shared = shared or SharedCuts()
    for path in dict.fromkeys((*known_paths(costs.pipeline), *shared.of(costs.pipeline), *begun.cuts)):
        program.longer_than_path(path)
    found = list(begun.cuts)
    if best_seconds == math.inf and cutoff_seconds < math.inf:
        program.better_than(cutoff_seconds * (1 - RELATIVE_TOLERANCE))
        if program.relax() is None and program.impossible:
            return Solution(chosen, None, math.inf, cutoff_seconds, solved)
        if best is None and start is not None:
            chosen, best = start() or (costs, None)
        best_seconds = chosen.step(best) if best is not None else math.inf
    start_seconds = chosen.durations(best) if best is not None else None
    program.better_than(min(best_seconds, cutoff_seconds) * (1 - RELATIVE_TOLERANCE))
    cut = partial(_cut, program, shared)
    least = min(best_seconds, cutoff_seconds)
    relaxed = _cut_by_fractions(program, start_seconds, aside_seconds, least, deadline, cut)
    if relaxed == math.inf:
        return Solution(chosen, best, best_seconds, least, solved)
    bound = max(bound, relaxed)
    climbed, branches = begun.climbed, list(begun.branches) or [Branch(bound)]
    may_split = begun.may_split and costs.layout.virtual_stages > 1 and program.relaxed is not None
    while True:
        least = min(best_seconds, cutoff_seconds)
        # Nothing below the goal: the goal itself is proven.
        bound = max(bound, min(branches[0].least_seconds, least) if branches else least)
        goal = least * (1 - RELATIVE_TOLERANCE)
        if bound >= goal or solved == _MOST_CUTS or time.monotonic() >= deadline:
            return Solution(chosen, best, best_seconds, min(bound, best_seconds), solved)
        if bound > aside_seconds * (1 + RELATIVE_TOLERANCE):
            kept = Begun(best, tuple(found), climbed, tuple(branches), may_split)
            return Solution(chosen, best, best_seconds, bound, solved, aside=kept)
        if best is not None and costs.layout.virtual_stages > 1 and not climbed:
            best, climbed = better_assignment(chosen, best, limit_bytes, modes), True
            best_seconds = chosen.step(best)
            continue
        program.better_than(goal)
        # Whole numbers at once where they take no time: most of what is branched takes longer.
        if may_split and branches[0].patience_seconds > AT_ONCE_SECONDS:
            branches, may_split = split_branches(program, branches, aside_seconds * (1 + _SPLIT_ABOVE), deadline, cut)
            continue
        branch = heapq.heappop(branches)
        began = time.monotonic()
        patience = min(branch.patience_seconds, deadline - began)
        counts, relaxed = _whole(program, branch, patience, limit_bytes, heuristics=not climbed)
        solved += 1
        reached = max(branch.least_seconds, relaxed + costs.step_seconds)
        if reached < goal:
            ended = time.monotonic() - began < branch.patience_seconds
            longer = branch.patience_seconds * (1 if ended else 2)
            heapq.heappush(branches, branch._replace(least_seconds=reached, patience_seconds=longer))
        if counts is None:
            continue
        answer = program.as_chosen()
        simulation = answer.simulate(counts)
        seconds = simulation.seconds + answer.optimizer_seconds(counts) + costs.step_seconds
        if seconds < best_seconds:
            best, best_seconds, chosen = counts, seconds, answer
        found.append(simulation.critical_path)
        shared.add(costs.pipeline, simulation.critical_path)
        program.longer_than_path(simulation.critical_path)


def _whole(
    program: Program, branch: Branch, patience_seconds: float, limit_bytes: float, heuristics: bool
) -> tuple[tuple[StageCount, ...] | None, float]:
    """As `Program.solve`; an answer that misses the limit by less than the solver sees is asked for once more."""
    for tolerance in (TOLERANCE, TIGHT_TOLERANCE):
        solver = make_solver(patience_seconds, heuristics=heuristics, tolerance=tolerance)
        counts, least = program.solve(solver, branch.held, branch.least_seconds)
        if counts is None or fits(program.as_chosen(), counts, limit_bytes):
            break
    return counts, least


def write_rows(program: Program) -> None:
    """All that holds for any assignment, whatever the paths."""
    program.every_layer_once()
    program.no_empty_stage()
    program.layers_of_ranks()
    program.layers_of_stages()
    program.segments_in_order()
    program.one_choice_a_stage()
    program.fits_memory()
    program.durations()
    program.optimizer_of_slowest()
    program.whole_step()


def _cut(program: Program, shared: SharedCuts, durations: Sequence[StageSeconds], above_seconds: float) -> float:
    """Seconds of the pipeline with these durations; its critical path is added if it is longer than `above_seconds`."""
    pipeline = program.costs.pipeline
    simulation = simulate(pipeline, durations, program.costs.hop_seconds)
    if simulation.seconds > above_seconds:
        program.longer_than_path(simulation.critical_path)
        shared.add(pipeline, simulation.critical_path)
    return simulation.seconds


def _cut_by_fractions(
    program: Program,
    start: Sequence[StageSeconds] | None,
    aside_seconds: float,
    goal_seconds: float,
    deadline: float,
    cut: Cut,
) -> float:
    """Add the paths that matter to fractions of layers. Seconds that no assignment is below, infinite when even
    fractions do not reach the program's goal. Well above `aside_seconds` it is left at that.

    The programs' own answers jump from corner to corner, and each corner has a path of its own. So paths are taken
    between the answer and the best seen too (in-out separation), where few matter.
    """
    costs = program.costs
    inner, least = (cut(start, 0.0), start) if start is not None else None, 0.0
    risen: list[float] = []
    for _ in range(_MOST_RELAXED):
        if time.monotonic() > deadline:
            break
        answer = program.relax()
        if answer is None:
            return math.inf if program.impossible else least
        outer, makespan = answer.durations, answer.makespan_seconds
        least = answer.step_seconds + costs.step_seconds
        risen.append(least)
        rises = _QUARTERS_TO_GOAL * (least - risen[-_FEW_RELAXED // 4]) if len(risen) > _FEW_RELAXED else math.inf
        slow = rises < goal_seconds - least
        if slow or least > aside_seconds * (1 + _WELL_ABOVE):
            break
        seconds = cut(outer, 0.0)
        if inner is None or seconds < inner[0]:
            inner = (seconds, outer)
        between = [_mixed(a, b) for a, b in zip(inner[1], outer, strict=True)]
        seconds = cut(between, 0.0)
        if seconds < inner[0]:
            inner = (seconds, between)
        if inner[0] <= makespan + _RELAXED_ENOUGH * (makespan + costs.step_seconds):
            break
    return least * (1 - RELATIVE_TOLERANCE)


def _mixed(inner: StageSeconds, outer: StageSeconds) -> StageSeconds:
    return StageSeconds(
        **{p: (1 - _TOWARDS_ANSWER) * getattr(inner, p) + _TOWARDS_ANSWER * getattr(outer, p) for p in PATH_PHASES}
    )
