"""Layers to pipeline stages and their recomputation, as an integer linear program over critical-path cuts.

Sets       s in 0..S-1 stages, each on one of p ranks;  k segments of the model, runs of L_k layers alike;
           r in {none, selective, full} recompute modes;  v in-flight vectors of a rank;  P paths of the schedule
Variables  n[s,k,r]  whole number of layers of segment k on stage s that recompute as r
           f, i, w, g, d[s]  forward, input's and weights' backward, gather, reduce seconds of stage s
           N[q,r]    whole number of layers of the commonest segment on rank q
           u[q,k,r]  1 when rank q has a layer of segment k that recomputes as r;  y[q] its transient bytes
           z[k,s]    1 when a layer after segment k may lie on stage s
           T       seconds up to the last gradient reduction;   O  seconds of the optimizer
           Z       their sum
Minimise   Z = T + O
Subject to
  (layers)     Σ_{s,r} n[s,k,r] = L_k                                         every_layer_once
  (stages)     Σ_{k,r} n[s,k,r] >= 1 for a stage without embedding and head   no_empty_stage
  (ranks)      N[q,r] = Σ_s n[s,k,r] <= the most whose least cost reaches the goal    layers_of_ranks
  (order)      n[s,k+1,r] <= L·z[k,s],  n[s,k,r] <= L·(1 - z[k,s-1]),         segments_in_order
               z[k,s] rises with s
  (transient)  n[s,k,r] <= L·u[q,k,r],  y[q] >= each transient in use         transient_in_use
  (memory)     fixed_q + y[q] + Σ n[s,k,r]·(state + v_s·held_r + ...) <= limit, every v   fits_memory
  (durations)  f_s, i_s, w_s, g_s, d_s linear in n; their sums over s         durations
  (path)       T >= Σ_s F_s·f_s + I_s·i_s + W_s·w_s + G_s·g_s + D_s·d_s + sends·c, P      longer_than_path
                 F, I, W, G, D how often P passes them, c one send
  (optimizer)  O >= o_q(n)                                                    optimizer_of_slowest
  (head start) Z >= the closed-form bound                                     not_below_bound
  (goal)       Z <= just below the best simulated step so far                 better_than

[Note: Cuts]
A schedule with given durations is max-plus: its makespan is the longest of its paths, each linear in n. So
start from `simulation.known_paths`, solve, simulate the answer, and if the simulation is longer than T add its
critical path as a cut. Each cut is violated by the answer it came from, so no answer returns unless it is
best, and the loop ends when the relaxation's bound meets the best simulated step. First fractions of layers are
allowed: such programs are solved at once, their simulations give valid cuts too, and most layouts that cannot beat
the goal are ruled out by them alone.

Seconds are scaled by the bound and bytes by the limit, so that the solver sees numbers near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pulp

from .bounds import most_layers
from .layout_costs import Blocks, LayoutCosts, StageCount
from .part_seconds import PartSeconds
from .rank_limits import empty_counts
from .relaxed_program import RelaxedProgram
from .simulation import Path, StageSeconds

PATH_PHASES = ("forward", "backward_input", "backward_weight", "gather", "reduce")
# Two steps closer than this are one: the solver's own feasibility tolerance is 1e-6 to 1e-7.
RELATIVE_TOLERANCE = 1e-6


class RelaxedAnswer(NamedTuple):
    """Of fractions of layers: each stage's durations, T, and T + O, which no whole layers are below; in seconds."""

    durations: list[StageSeconds]
    makespan_seconds: float
    step_seconds: float


@dataclass
class Program:
    """The pulp problem and its variables; `scale` is one unit of time in seconds."""

    costs: LayoutCosts
    limit_bytes: float
    scale: float
    modes: tuple[str, ...]
    goal_seconds: float
    problem: pulp.LpProblem = field(init=False)
    relaxed: RelaxedProgram | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        stages, segments = range(self.costs.layout.stages), self.costs.segments
        most = self._most = self._most_layers()
        self.problem = pulp.LpProblem("stages", pulp.LpMinimize)
        new = self.problem.add_variable
        self.n = {
            (s, k, r): new(f"n_{s}_{k}_{r}", 0, most[k], cat=pulp.LpInteger)
            for s in stages
            for k, segment in enumerate(segments)
            for r in self.modes
        }
        self.phase = {(p, s): new(f"{p}_{s}", 0) for p in PATH_PHASES for s in stages}
        self.whole = {p: new(f"{p}_whole", 0) for p in PATH_PHASES}
        self.makespan = new("T", 0)
        self.optimizer = new("O", 0)
        self.step = new("Z", 0)
        self.problem += self.step
        self.problem += self.step == self.makespan + self.optimizer, "step"

    def _most_layers(self) -> list[int]:
        """Layers of each segment that a stage may hold: more of them alone would take longer than the goal."""
        most = []
        for segment in self.costs.segments:
            each = self.costs.microbatches * (segment.seconds.forward.total + segment.seconds.backward.total)
            allowed = (self.goal_seconds - self.costs.step_seconds) / each if each > 0 else math.inf
            most.append(segment.layers if allowed >= segment.layers else int(allowed))
        return most

    # ---- linear expressions ----------------------------------------------------------------------------

    def seconds(self, stage: int, phase: str) -> pulp.LpAffineExpression:
        """Seconds of a phase on a stage, in units of `scale`; recomputation precedes the input's backward."""
        expression = pulp.LpAffineExpression(constant=_of(self.costs.ends_seconds(stage), phase) / self.scale)
        for k, segment in enumerate(self.costs.segments):
            each = _of(segment.seconds, phase)
            for r in self.modes:
                again = segment.seconds.recompute(r).total if phase == "backward_input" else 0.0
                expression += ((each + again) / self.scale) * self.n[stage, k, r]
        return expression

    # ---- constraints, one function each ------------------------------------------------------------------

    def every_layer_once(self) -> None:
        for k, segment in enumerate(self.costs.segments):
            placed = pulp.lpSum(n for (_, of, _), n in self.n.items() if of == k)
            self.problem += placed == segment.layers, f"every_layer_once_{k}"

    def no_empty_stage(self) -> None:
        for s in range(1, self.costs.layout.stages - 1):
            self.problem += pulp.lpSum(n for (of, _, _), n in self.n.items() if of == s) >= 1, f"no_empty_stage_{s}"

    def layers_of_ranks(self) -> None:
        """Layers of each rank, in all and by mode: no more than can reach the goal; the solver splits these first."""
        commonest, most = most_layers(self.costs, self.limit_bytes, self.modes, self.goal_seconds)
        layout = self.costs.layout
        chosen = [(), *((r,) for r in self.modes)] if layout.virtual_stages > 1 and len(self.modes) > 1 else [()]
        for q in range(layout.pp):
            for modes in chosen:
                name = "_".join((str(q), *modes))
                whole = self.problem.add_variable(f"N_{name}", 0, most[q], cat=pulp.LpInteger)
                held = [self.n[s, commonest, r] for s in layout.stages_of(q) for r in modes or self.modes]
                self.problem += whole == pulp.lpSum(held), f"layers_of_rank_{name}"

    def segments_in_order(self) -> None:
        stages = range(self.costs.layout.stages)
        for k in range(len(self.costs.segments) - 1):
            z = [self.problem.add_variable(f"z_{k}_{s}", cat=pulp.LpBinary) for s in stages]
            for s in stages:
                later = pulp.lpSum(self.n[s, k + 1, r] for r in self.modes)
                self.problem += later <= self.costs.segments[k + 1].layers * z[s], f"not_before_{k}_{s}"
                if s > 0:
                    here = pulp.lpSum(self.n[s, k, r] for r in self.modes)
                    self.problem += here <= self.costs.segments[k].layers * (1 - z[s - 1]), f"not_after_{k}_{s}"
                    self.problem += z[s] >= z[s - 1], f"in_order_{k}_{s}"

    def transient_in_use(self) -> dict[int, pulp.LpVariable]:
        """y of each rank, as a share of the limit: at least what its ends need, and each kind of layer it has."""
        nothing, slack = empty_counts(self.costs), 1.0 + self.costs.allocator_slack
        y = {}
        for q in range(self.costs.layout.pp):
            # Of its ends alone: what passes whatever a rank holds is among its fixed bytes.
            least = self.costs.rank_memory(q, nothing).transient - self.costs.fixed_memory[q].transient
            if any(0 < s < self.costs.layout.stages - 1 for s in self.costs.layout.stages_of(q)):  # never empty
                each = [k.memory.transient_by(r) for k in self.costs.segments for r in self.modes]
                least = max(least, min(each))
            y[q] = self.problem.add_variable(f"y_{q}", slack * least / self.limit_bytes)
            for k, segment in enumerate(self.costs.segments):
                for r in self.modes:
                    transient = segment.memory.transient_by(r)
                    if transient <= least:
                        continue
                    u = self.problem.add_variable(f"u_{q}_{k}_{r}", cat=pulp.LpBinary)
                    held = [self.n[s, k, r] for s in self.costs.layout.stages_of(q)]
                    most = min(segment.layers, self._most[k] * len(held))
                    self.problem += pulp.lpSum(held) <= most * u, f"used_{q}_{k}_{r}"
                    self.problem += y[q] >= (slack * transient / self.limit_bytes) * u, f"transient_{q}_{k}_{r}"
        return y

    def fits_memory(self) -> None:
        """Bytes as a share of the limit, one row for each in-flight vector of each rank."""
        costs, slack, nothing = self.costs, 1.0 + self.costs.allocator_slack, empty_counts(self.costs)
        transient = self.transient_in_use()
        for q in range(costs.layout.pp):
            ends = costs.rank_parts(q, nothing)
            fixed = costs.fixed_memory[q]
            kept = fixed.context + fixed.communicators + slack * (fixed.total - fixed.context - fixed.communicators)
            kept += slack * sum(part.state.total for _, part, _, _ in ends)
            for number, vector in enumerate(costs.in_flight[q]):
                held = sum(
                    part.held.total * vector.full[c] + part.held_weight.total * vector.weight_only[c]
                    for c, part, _, _ in ends
                )
                row = pulp.LpAffineExpression(constant=(kept + slack * held) / self.limit_bytes)
                for c, s in enumerate(costs.layout.stages_of(q)):
                    for k, segment in enumerate(costs.segments):
                        memory = segment.memory
                        for r in self.modes:
                            each = memory.state.total + memory.held_by(r).total * vector.full[c]
                            each += memory.held_weight.total * vector.weight_only[c]
                            row += (slack * each / self.limit_bytes) * self.n[s, k, r]
                self.problem += row + transient[q] <= 1.0, f"fits_memory_{q}_{number}"

    def optimizer_of_slowest(self) -> None:
        for q in range(self.costs.layout.pp):
            own = pulp.lpSum(self.seconds(s, "optimizer") for s in self.costs.layout.stages_of(q))
            self.problem += self.optimizer >= own, f"optimizer_{q}"

    def not_below_bound(self, bound_seconds: float) -> None:
        least = (bound_seconds - self.costs.step_seconds) / self.scale
        self.problem += self.step >= least * (1 - RELATIVE_TOLERANCE), "not_below_bound"

    def better_than(self, goal_seconds: float) -> None:
        """Only answers below the best so far are of interest: an upper bound on Z, lowered from solve to solve."""
        if goal_seconds != float("inf"):
            self.step.upBound = (goal_seconds - self.costs.step_seconds) / self.scale

    def durations(self) -> None:
        for (phase, s), variable in self.phase.items():
            self.problem += variable == self.seconds(s, phase), f"duration_{phase}_{s}"
        for phase, total in self.whole.items():
            stages = range(self.costs.layout.stages)
            self.problem += total == pulp.lpSum(self.phase[phase, s] for s in stages), f"whole_{phase}"

    def longer_than_path(self, path: Path) -> None:
        """Counts of 1 on most stages are written through the sum over all, which keeps the row short."""
        length = pulp.LpAffineExpression(constant=path.sends * self.costs.send_seconds / self.scale)
        for phase in PATH_PHASES:
            times = getattr(path, phase)
            base = 1 if times.count(1) > times.count(0) else 0
            length += base * self.whole[phase]
            for s, number in enumerate(times):
                if number != base:
                    length += (number - base) * self.phase[phase, s]
        constraint = self.makespan >= length
        self.problem += constraint
        if self.relaxed is not None:
            self.relaxed.add(constraint)

    # ---- solving ---------------------------------------------------------------------------------------

    def relax(self) -> RelaxedAnswer | None:
        """The best assignment of fractions of layers; None where there is none (`relaxed` tells whether that is
        proven) and where HiGHS is missing."""
        if not pulp.HiGHS().available():
            return None
        if self.relaxed is None:
            self.relaxed = RelaxedProgram(self.problem, make_solver(math.inf, whole=False))
        self.relaxed.solve()
        if not self.relaxed.optimal:
            return None
        value, scale = self.relaxed.value, self.scale
        return RelaxedAnswer(
            [
                StageSeconds(**{p: value(self.phase[p, s]) * scale for p in PATH_PHASES})
                for s in range(self.costs.layout.stages)
            ],
            value(self.makespan) * scale,
            value(self.step) * scale,
        )

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
            tuple(
                Blocks(**{r: round(self.n[s, k, r].value() or 0) for r in self.modes})
                for k in range(len(self.costs.segments))
            )
            for s in range(self.costs.layout.stages)
        )
        objective = float(self.step.value() or 0.0)
        if model is None and self.problem.sol_status != pulp.LpSolutionOptimal:
            return counts, 0.0  # CBC ran out of time: an answer without a bound
        dual = model.getInfo().mip_dual_bound if model is not None else objective
        return counts, min(objective, dual) * self.scale


def _of(part: PartSeconds, phase: str) -> float:
    return getattr(part, phase).total


def make_solver(limit_seconds: float, whole: bool = True) -> Any:
    """HiGHS, or CBC where HiGHS is missing; one thread, no gap, stopped after `limit_seconds`.

    Not `whole`: numbers of layers may be fractions.
    """
    highs = pulp.HiGHS(
        mip=whole,
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
    return pulp.COIN_CMD(path=bundled, mip=whole, msg=False, gapRel=0.0, threads=1, timeLimit=limit_seconds)
