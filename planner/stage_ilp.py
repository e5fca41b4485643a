"""Layers to pipeline stages and their recomputation, as an integer linear program over critical-path cuts.

Sets       s in 0..p-1 stages;  r in {none, full} recompute modes;  P paths through the schedule
Variables  n[s,r]  whole number of blocks on stage s that recompute as r
           f, b, g, r[s]  forward, backward, gather, reduce seconds of stage s
           u[s]    1 when stage s recomputes any block
           T       seconds up to the last gradient reduction;   O  seconds of the optimizer
           Z       their sum
Minimise   Z = T + O
Subject to
  (layers)     Σ_{s,r} n[s,r] = L                                             every_layer_once
  (stages)     Σ_r n[s,r] >= 1 for a stage without embedding and head         no_empty_stage
  (recompute)  n[s,full] <= L·u[s]                                            recompute_in_use
  (memory)     fixed_s + Σ_r n[s,r]·(state + k_s·held_r) + peak_s <= limit    fits_memory
                 k_s in-flight microbatches; peak_s >= each transient in use
  (durations)  f_s, b_s, g_s, r_s linear in n; their sums over s              durations
  (path)       T >= Σ_s F_s·f_s + B_s·b_s + G_s·g_s + R_s·r_s + sends·c, P    longer_than_path
                 F, B, G, R how often P passes them, c one send
  (optimizer)  O >= o_s(n)                                                    optimizer_of_slowest
  (head start) Z >= the closed-form bound                                     not_below_bound
  (goal)       Z <= just below the best simulated step so far                 better_than

A schedule with given durations is max-plus: its makespan is the longest of its paths, each linear in n. So
start from `simulation.known_paths`, solve, simulate the answer, and if the simulation is longer than T add its
critical path as a cut. Each cut is violated by the answer it came from, so no answer returns unless it is
best, and the loop ends when the relaxation's bound meets the best simulated step.

Seconds are scaled by the bound and bytes by the limit, so that the solver sees numbers near 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pulp

from .part_seconds import PartSeconds
from .schedule import Pipeline
from .simulation import Path, known_paths
from .step_cost import LayoutCosts, StageCount

MODES = ("none", "full")
PATH_PHASES = ("forward", "backward", "gather", "reduce")
# Two steps closer than this are one: the solver's own feasibility tolerance is 1e-6 to 1e-7.
RELATIVE_TOLERANCE = 1e-6
_MOST_CUTS = 200


@dataclass(frozen=True)
class Solution:
    """The best assignment found, its simulated step, and a bound no assignment of the layout can beat.

    `counts` is None when nothing fits, or when the layout cannot beat the cut-off (then `bound_seconds`
    is at least the cut-off).
    """

    counts: tuple[StageCount, ...] | None
    step_seconds: float
    bound_seconds: float
    ilps_solved: int


@dataclass
class _Program:
    """The pulp problem and its variables; `scale` is one unit of time in seconds."""

    costs: LayoutCosts
    limit_bytes: float
    scale: float
    modes: tuple[str, ...]
    problem: pulp.LpProblem = field(init=False)

    def __post_init__(self) -> None:
        stages, layers = range(self.costs.layout.pp), self.costs.layers
        self.problem = pulp.LpProblem("stages", pulp.LpMinimize)
        new = self.problem.add_variable
        most = {mode: layers if mode in self.modes else 0 for mode in MODES}
        self.n = {(s, r): new(f"n_{s}_{r}", 0, most[r], cat=pulp.LpInteger) for s in stages for r in MODES}
        self.u = {s: new(f"u_{s}", cat=pulp.LpBinary) for s in stages}
        self.phase = {(p, s): new(f"{p}_{s}", 0) for p in PATH_PHASES for s in stages}
        self.whole = {p: new(f"{p}_whole", 0) for p in PATH_PHASES}
        self.makespan = new("T", 0)
        self.optimizer = new("O", 0)
        self.step = new("Z", 0)
        self.problem += self.step
        self.problem += self.step == self.makespan + self.optimizer, "step"

    # ---- linear expressions ----------------------------------------------------------------------------

    def seconds(self, stage: int, phases: Sequence[str]) -> pulp.LpAffineExpression:
        """Seconds of the phases on a stage, in units of `scale`; the backward of a full block recomputes."""
        ends, block = self.costs.ends_seconds(stage), self.costs.block
        constant, per_block = _total(ends, phases), _total(block, phases)
        again = block.recompute.total if "backward" in phases else 0.0
        expression = pulp.LpAffineExpression(constant=constant / self.scale)
        expression += (per_block / self.scale) * self.n[stage, "none"]
        expression += ((per_block + again) / self.scale) * self.n[stage, "full"]
        return expression

    # ---- constraints, one function each ------------------------------------------------------------------

    def every_layer_once(self) -> None:
        self.problem += pulp.lpSum(self.n.values()) == self.costs.layers, "every_layer_once"

    def no_empty_stage(self) -> None:
        for s in range(1, self.costs.layout.pp - 1):
            self.problem += pulp.lpSum(self.n[s, r] for r in MODES) >= 1, f"no_empty_stage_{s}"

    def recompute_in_use(self) -> None:
        for s, used in self.u.items():
            self.problem += self.n[s, "full"] <= self.costs.layers * used, f"recompute_in_use_{s}"

    def fits_memory(self) -> None:
        """Bytes as a share of the limit. The transient of an end part is always in use, so it sits in `empty`."""
        costs, slack = self.costs, 1.0 + self.costs.allocator_slack
        block = costs.block_memory
        for s, used in self.u.items():
            flight = costs.in_flight[s]
            empty = costs.stage_memory(s, StageCount(0, 0))
            fixed = empty.total - slack * empty.transient
            state = slack * block.state.total
            rows = pulp.LpAffineExpression(constant=fixed / self.limit_bytes)
            for r, held in (("none", block.held), ("full", block.held_recomputed)):
                rows += ((state + slack * flight * held.total) / self.limit_bytes) * self.n[s, r]
            for name, constant, coefficient in (
                ("end", empty.transient, 0.0),
                ("block", block.transient, 0.0),
                ("recompute", 0.0, block.transient_recomputed),
            ):
                if name == "block" and s in (0, costs.layout.pp - 1):
                    continue  # an end stage may hold no block; its blocks' transient is checked below
                peak = (slack / self.limit_bytes) * (constant + coefficient * used)
                self.problem += rows + peak <= 1.0, f"fits_memory_{s}_{name}"
            if s in (0, costs.layout.pp - 1):
                self._block_transient_on_end(s, rows, slack)

    def _block_transient_on_end(self, s: int, rows: pulp.LpAffineExpression, slack: float) -> None:
        holds = self.problem.add_variable(f"holds_{s}", cat=pulp.LpBinary)
        self.problem += self.n[s, "none"] <= self.costs.layers * holds, f"holds_blocks_{s}"
        peak = (slack * self.costs.block_memory.transient / self.limit_bytes) * holds
        self.problem += rows + peak <= 1.0, f"fits_memory_{s}_block"

    def optimizer_of_slowest(self) -> None:
        for s in range(self.costs.layout.pp):
            self.problem += self.optimizer >= self.seconds(s, ("optimizer",)), f"optimizer_{s}"

    def not_below_bound(self, bound_seconds: float) -> None:
        least = (bound_seconds - self.costs.step_seconds) / self.scale
        self.problem += self.step >= least * (1 - RELATIVE_TOLERANCE), "not_below_bound"

    def better_than(self, goal_seconds: float) -> None:
        """Only answers below the best so far are of interest: an upper bound on Z, lowered from solve to solve."""
        if goal_seconds != float("inf"):
            self.step.upBound = (goal_seconds - self.costs.step_seconds) / self.scale

    def durations(self) -> None:
        for (phase, s), variable in self.phase.items():
            self.problem += variable == self.seconds(s, (phase,)), f"duration_{phase}_{s}"
        for phase, total in self.whole.items():
            stages = range(self.costs.layout.pp)
            self.problem += total == pulp.lpSum(self.phase[phase, s] for s in stages), f"whole_{phase}"

    def longer_than_path(self, path: Path) -> None:
        """Counts of 1 on most stages are written through the sum over all, which keeps the row short."""
        length = pulp.LpAffineExpression(constant=path.sends * self.costs.send_seconds / self.scale)
        for phase in PATH_PHASES:
            times = path.backward_input if phase == "backward" else getattr(path, phase)
            base = 1 if times.count(1) > times.count(0) else 0
            length += base * self.whole[phase]
            for s, number in enumerate(times):
                if number != base:
                    length += (number - base) * self.phase[phase, s]
        self.problem += self.makespan >= length

    # ---- solving ---------------------------------------------------------------------------------------

    def solve(self, solver: pulp.LpSolver) -> tuple[tuple[StageCount, ...] | None, float]:
        """(assignment or None, lower bound of T + O in seconds); the bound is infinite when nothing is feasible.

        The bound is the solver's dual bound where it gives one (HiGHS), else what its answer costs. Its
        status is read for "infeasible" alone: a time-limited answer is called optimal too.
        """
        self.problem.solve(solver)
        if self.problem.status == pulp.LpStatusInfeasible:
            return None, float("inf")
        model = getattr(self.problem, "solverModel", None)
        if self.problem.status != pulp.LpStatusOptimal:
            return None, model.getInfo().mip_dual_bound * self.scale if model is not None else 0.0
        counts = tuple(
            StageCount(*(round(self.n[s, r].value() or 0) for r in MODES)) for s in range(self.costs.layout.pp)
        )
        objective = float(self.step.value() or 0.0)
        if model is None and self.problem.sol_status != pulp.LpSolutionOptimal:
            return counts, 0.0  # CBC ran out of time: an answer without a bound
        dual = model.getInfo().mip_dual_bound if model is not None else objective
        return counts, min(objective, dual) * self.scale


def _total(part: PartSeconds, phases: Sequence[str]) -> float:
    return sum(getattr(part, phase).total for phase in phases)


def make_solver(limit_seconds: float) -> pulp.LpSolver:
    """HiGHS, or CBC where HiGHS is missing; one thread, no gap, stopped after `limit_seconds`."""
    highs = pulp.HiGHS(
        msg=False,
        gapRel=0.0,
        threads=1,
        timeLimit=limit_seconds,
        primal_feasibility_tolerance=1e-9,
        mip_feasibility_tolerance=1e-9,
    )
    if highs.available():
        return highs
    # The CBC that pulp 3 ships, found by its path: PULP_CBC_CMD would warn that pulp 4 does not ship it.
    bundled = pulp.apis.coin_api.pulp_cbc_path
    return pulp.COIN_CMD(path=bundled, msg=False, gapRel=0.0, threads=1, timeLimit=limit_seconds)


def solve_stages(
    costs: LayoutCosts,
    limit_bytes: float,
    *,
    bound_seconds: float,
    cutoff_seconds: float = float("inf"),
    start: Sequence[StageCount] | None = None,
    recompute: str | None = None,
    deadline: float = float("inf"),
) -> Solution:
    """The assignment with the least simulated step that fits `limit_bytes`.

    Args:
        bound_seconds: a valid lower bound (`bounds.lower_bound`); it spares the solver the proof of it.
        cutoff_seconds: stop when no assignment can be faster than this.
        start: an assignment that fits, if one is known.
        recompute: pins every block to "none" or "full".
        deadline: of `time.monotonic`; past it the best so far is returned with the bound reached.
    """
    best = tuple(start) if start is not None else None
    best_seconds = costs.step(best) if best is not None else float("inf")
    bound, solved = bound_seconds, 0
    if bound >= min(best_seconds, cutoff_seconds) * (1 - RELATIVE_TOLERANCE):
        return Solution(best, best_seconds, min(bound, best_seconds), solved)
    program = _Program(costs, limit_bytes, scale=bound_seconds, modes=(recompute,) if recompute else MODES)
    program.every_layer_once()
    program.no_empty_stage()
    program.recompute_in_use()
    program.fits_memory()
    program.durations()
    program.optimizer_of_slowest()
    program.not_below_bound(bound_seconds)
    for path in known_paths(Pipeline(costs.layout.schedule, costs.layout.pp, 1, costs.microbatches)):
        program.longer_than_path(path)
    if best is not None:
        program.longer_than_path(costs.simulate(best).critical_path)
    while solved < _MOST_CUTS and time.monotonic() < deadline:
        goal = min(best_seconds, cutoff_seconds) * (1 - RELATIVE_TOLERANCE)
        if bound >= goal:
            break
        program.better_than(goal)
        counts, relaxed = program.solve(make_solver(deadline - time.monotonic()))
        solved += 1
        # Nothing below the goal: the goal itself is proven.
        bound = max(bound, min(relaxed + costs.step_seconds, min(best_seconds, cutoff_seconds)))
        if counts is None:
            break
        simulation = costs.simulate(counts)
        seconds = simulation.seconds + costs.optimizer_seconds(counts) + costs.step_seconds
        if seconds < best_seconds:
            best, best_seconds = counts, seconds
        program.longer_than_path(simulation.critical_path)
    return Solution(best, best_seconds, min(bound, best_seconds), solved)
