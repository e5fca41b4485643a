"""Layers to pipeline stages and their recomputation, as an integer linear program over critical-path cuts.

Sets       s in 0..S-1 stages, each on one of p ranks;  k segments of the model, runs of L_k layers alike;
           r in {none, selective, full} recompute modes;  v in-flight vectors of a rank;  P paths of the schedule
Variables  n[s,k,r]  whole number of layers of segment k on stage s that recompute as r
           f, i, w, g, d[s]  forward, input's and weights' backward, gather, reduce seconds of stage s
           N[q,r]    whole number of layers of the commonest segment on rank q
           u[q,k,r]  1 when rank q has a layer of segment k that recomputes as r;  y[q] its transient bytes
           z[k,s]    1 when a layer after segment k may lie on stage s
           x[s,c]    1 when stage s makes choice c, where stages choose ([Note: Resharding] in `layout_costs`): then
                     n, u are of each (r, c), and a layer's seconds and bytes are those of its stage's choice
           T       seconds up to the last gradient reduction;   O  seconds of the optimizer
           Z       their sum
Minimise   Z = T + O
Subject to
  (layers)     Σ_{s,r} n[s,k,r] = L_k                                         every_layer_once
  (stages)     Σ_{k,r} n[s,k,r] >= 1 for a stage without embedding and head   no_empty_stage
  (ranks)      N[q,r] = Σ_s n[s,k,r] <= the most whose least cost reaches the goal    layers_of_ranks
  (order)      n[s,k+1,r] <= L·z[k,s],  n[s,k,r] <= L·(1 - z[k,s-1]),         segments_in_order
               z[k,s] rises with s
  (choice)     Σ_c x[s,c] = 1,  Σ_{k,r} n[s,k,r,c] <= L·x[s,c];  some stage frees  one_choice_a_stage
  (transient)  n[s,k,r] <= L·u[q,k,r],  y[q] >= each transient in use,        transient_in_use
               but where one stage is a rank those of a segment's least r alone
  (memory)     fixed_q + y[q] + Σ n[s,k,r]·(state + v_s·held_r + gradients_v + ...) <= limit, every v   fits_memory
  (durations)  f_s, i_s, w_s, g_s, d_s linear in n; their sums over s         durations
  (path)       T >= Σ_s F_s·f_s + I_s·i_s + W_s·w_s + G_s·g_s + D_s·d_s + C_s·c_s, P      longer_than_path
                 F, I, W, G, D, C how often P passes them, c_s one send from s to s + 1
  (optimizer)  O >= o_q(n)                                                    optimizer_of_slowest
  (head start) Z >= the bound known                                           not_below_bound
  (goal)       Z <= just below the best simulated step so far                 better_than

[Note: Cuts]
A schedule with given durations is max-plus: its makespan is the longest of its paths, each linear in n. So
start from `simulation.known_paths`, solve, simulate the answer, and if the simulation is longer than T add its
critical path as a cut. Each cut is violated by the answer it came from, so no answer returns unless it is
best, and the loop ends when the relaxation's bound meets the best simulated step. First fractions of layers are
allowed: such programs are solved at once, their simulations give valid cuts too, and most layouts that cannot beat
the goal are ruled out by them alone. With chunks, whole layers on ranks come next, branch by branch (`rank_branches`).

Seconds are scaled by the bound and bytes by the limit, so that the solver sees numbers near 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pulp

from .bounds import most_layers
from .ilp_solver import make_solver
from .in_flight import sums_nothing
from .layout import RECOMPUTE_MODES
from .layout_costs import Blocks, LayoutCosts, SegmentCosts, StageCount
from .memory_bytes import LaterMoment
from .part_seconds import PartSeconds
from .rank_limits import empty_counts
from .relaxed_program import RelaxedProgram
from .simulation import Path, StageSeconds

# How a layer recomputes, and what its stage does with weights where it has a choice.
Way = tuple[str, bool | None]
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
        self._choices = tuple(choice for choice, _ in self.costs.choices)
        self._seconds: dict[str, list[tuple[int, Way, float]]] = {}
        self._ways = [(r, choice) for r in self.modes for choice in self._choices or (None,)]
        most = self._most = self._most_layers()
        self.problem = pulp.LpProblem("stages", pulp.LpMinimize)
        new = self.problem.add_variable
        self.n = {
            (s, k, way): new("_".join(("n", str(s), str(k), *_name(way))), 0, most[k], cat=pulp.LpInteger)
            for s in stages
            for k in range(len(segments))
            for way in self._ways
        }
        self.x: dict[tuple[int, bool | None], pulp.LpVariable] = {}
        self.phase = {(p, s): new(f"{p}_{s}", 0) for p in PATH_PHASES for s in stages}
        self.whole = {p: new(f"{p}_whole", 0) for p in PATH_PHASES}
        self.of_ranks: dict[str, tuple[pulp.LpVariable, int]] = {}  # layers of a rank, and how many at most
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

    def seconds(self, stage: int, phase: str) -> tuple[dict[pulp.LpVariable, float], float]:
        """(factors of the layers, constant) of the seconds of a phase on a stage, in units of `scale`; recomputation
        precedes the input's backward."""
        terms = {self.n[stage, k, way]: each / self.scale for k, way, each in self._each_layer(phase)}
        return terms, _of(self.costs.stage_ends[stage], phase) / self.scale

    def _each_layer(self, phase: str) -> list[tuple[int, Way, float]]:
        """Seconds of a layer of each segment and way, where it has any."""
        if phase not in self._seconds:
            found = []
            for k, way, segment in self._layers():
                again = segment.seconds.recompute(way[0]).total if phase == "backward_input" else 0.0
                found.append((k, way, _of(segment.seconds, phase) + again))
            self._seconds[phase] = [one for one in found if one[2]]
        return self._seconds[phase]

    def _layers(self) -> Iterator[tuple[int, Way, SegmentCosts]]:
        """Each segment in each way that its layers may have."""
        of_choice = {choice: self.costs.segments_if(choice) for _, choice in self._ways}
        for k in range(len(self.costs.segments)):
            for way in self._ways:
                yield k, way, of_choice[way[1]][k]

    # ---- constraints, one function each ------------------------------------------------------------------

    def every_layer_once(self) -> None:
        for k, segment in enumerate(self.costs.segments):
            placed = _sum(n for (_, of, _), n in self.n.items() if of == k)
            self.problem += placed == segment.layers, f"every_layer_once_{k}"

    def no_empty_stage(self) -> None:
        kinds = range(len(self.costs.segments))
        for s in range(1, self.costs.layout.stages - 1):
            held = _sum(self.n[s, k, way] for k in kinds for way in self._ways)
            self.problem += held >= 1, f"no_empty_stage_{s}"

    def layers_of_ranks(self) -> None:
        """Layers of each rank, in all and by mode: no more than can reach the goal; the solver splits these first."""
        commonest, most = most_layers(self.costs, self.limit_bytes, self.modes, self.goal_seconds)
        layout = self.costs.layout
        chosen = [(), *((r,) for r in self.modes)] if layout.virtual_stages > 1 and len(self.modes) > 1 else [()]
        for q in range(layout.pp):
            for modes in chosen:
                name = "_".join((str(q), *modes))
                whole = self.problem.add_variable(f"N_{name}", 0, most[q], cat=pulp.LpInteger)
                self.of_ranks[name] = (whole, most[q])
                ways = [way for way in self._ways if way[0] in (modes or self.modes)]
                held = [self.n[s, commonest, way] for s in layout.stages_of(q) for way in ways]
                self.problem += _sum(held, [whole]) == 0, f"layers_of_rank_{name}"

    def segments_in_order(self) -> None:
        stages = range(self.costs.layout.stages)
        for k in range(len(self.costs.segments) - 1):
            z = [self.problem.add_variable(f"z_{k}_{s}", cat=pulp.LpBinary) for s in stages]
            for s in stages:
                later = pulp.lpSum(self.n[s, k + 1, way] for way in self._ways)
                self.problem += later <= self.costs.segments[k + 1].layers * z[s], f"not_before_{k}_{s}"
                if s > 0:
                    here = pulp.lpSum(self.n[s, k, way] for way in self._ways)
                    self.problem += here <= self.costs.segments[k].layers * (1 - z[s - 1]), f"not_after_{k}_{s}"
                    self.problem += z[s] >= z[s - 1], f"in_order_{k}_{s}"

    def one_choice_a_stage(self) -> None:
        """Where stages choose. Not all keep their weights, unless a pin says so: that is zero 1."""
        if not self._choices:
            return
        stages, new = range(self.costs.layout.stages), self.problem.add_variable
        self.x = {(s, one): new(f"x_{s}_{one}", cat=pulp.LpBinary) for s in stages for one in self._choices}
        for s in stages:
            self.problem += pulp.lpSum(self.x[s, choice] for choice in self._choices) == 1, f"one_choice_{s}"
            for choice in self._choices:
                held = pulp.lpSum(n for (of, _, way), n in self.n.items() if of == s and way[1] == choice)
                self.problem += held <= self.costs.layers * self.x[s, choice], f"choice_{s}_{choice}"
        if self._choices != (False,):
            freed = pulp.lpSum(n for (_, _, way), n in self.n.items() if way[1] is not False)
            self.problem += freed >= 1, "some_stage_frees"

    def transient_in_use(self, first: bool) -> dict[int, pulp.LpVariable]:
        """y of each rank, as a share of the limit: at least what its ends need, and each kind of layer it has. `first`:
        in backwards that sum no gradients."""
        slack, y = 1.0 + self.costs.allocator_slack, dict[int, pulp.LpVariable]()
        for q in range(self.costs.layout.pp):
            # Of its ends alone: what passes whatever a rank holds is among its fixed bytes.
            ends = [end.transient_by(mode, never_summed=first) for _, end, _, mode in self.costs.end_parts(q)]
            least = max(ends, default=0.0)
            if any(0 < s < self.costs.layout.stages - 1 for s in self.costs.layout.stages_of(q)):  # never empty
                each = [segment.memory.transient_by(way[0], never_summed=first) for _, way, segment in self._layers()]
                least = max(least, min(each))
            y[q] = self.problem.add_variable(f"y_{q}_{first}", slack * least / self.limit_bytes)
            for k, way, segment in self._layers():
                transient = segment.memory.transient_by(way[0], never_summed=first)
                if transient <= least:
                    continue
                name = "_".join((str(q), str(k), *_name(way), str(first)))
                u = self.problem.add_variable(f"u_{name}", cat=pulp.LpBinary)
                held = [self.n[s, k, way] for s in self.costs.layout.stages_of(q)]
                most = min(segment.layers, self._most[k] * len(held))
                self.problem += pulp.lpSum(held) <= most * u, f"used_{name}"
                others = self._lesser_in_use(q, k, way, name) if self.costs.last_recompute_least else ()
                share = slack * transient / self.limit_bytes
                self.problem += y[q] >= share * (u - pulp.lpSum(others)), f"transient_{name}"
        return y

    def _lesser_in_use(self, rank: int, k: int, way: Way, name: str) -> list[pulp.LpVariable]:
        """For each mode that recomputes less, 1 at most, and where the rank's stage has a layer so."""
        found, (stage,) = [], self.costs.layout.stages_of(rank)
        for lesser in RECOMPUTE_MODES[: RECOMPUTE_MODES.index(way[0])]:
            if (lesser_n := self.n.get((stage, k, (lesser, way[1])))) is None:
                continue
            w = self.problem.add_variable(f"w_{name}_{lesser}", 0, 1)
            self.problem += w <= lesser_n, f"lesser_{w.name}"
            found.append(w)
        return found

    def fits_memory(self) -> None:
        """Bytes as a share of the limit, one row for each in-flight vector of each rank."""
        costs, slack, nothing = self.costs, 1.0 + self.costs.allocator_slack, empty_counts(self.costs)
        layers = [(k, way, segment.memory.totals) for k, way, segment in self._layers()]
        differs = any(segment.memory.transient_first for _, _, segment in self._layers())
        of_all = [one for q in range(costs.layout.pp) for one in costs.backward_moments(q)]
        kinds = {differs and sums_nothing(one) for one in of_all}
        transient = {first: self.transient_in_use(first) for first in kinds}
        for q in range(costs.layout.pp):
            ends = costs.rank_parts(q, nothing)
            fixed = costs.fixed_memory[q]
            kept = fixed.context + fixed.communicators + slack * (fixed.total - fixed.context - fixed.communicators)
            kept += slack * sum(part.state.total for _, part, _, _ in ends)
            passing = {kind: ({each[q]: 1.0}, 0.0) for kind, each in transient.items()}
            moments = [(one, passing[differs and sums_nothing(one)]) for one in costs.backward_moments(q)]
            moments += [(one.moment, self._besides(q, one)) for one in costs.later_moments(q)]
            for number, (vector, (besides, always)) in enumerate(moments):
                held = sum(
                    part.totals.held["none"] * vector.full[c]
                    + part.totals.held_weight * vector.weight_only[c]
                    + part.totals.gradients[vector.phase(c)]["none"]
                    for c, part, _, _ in ends
                )
                terms = dict(besides)
                for c, s in enumerate(costs.layout.stages_of(q)):
                    phase, full, weight_only = vector.phase(c), vector.full[c], vector.weight_only[c]
                    for k, way, totals in layers:
                        each = totals.state + totals.gradients[phase][way[0]]
                        each += totals.held[way[0]] * full + totals.held_weight * weight_only
                        terms[self.n[s, k, way]] = slack * each / self.limit_bytes
                row = pulp.LpAffineExpression(terms, constant=(kept + slack * held) / self.limit_bytes + always)
                self.problem += row <= 1.0, f"fits_memory_{q}_{number}"

    def _besides(self, rank: int, one: LaterMoment) -> tuple[dict[pulp.LpVariable, float], float]:
        """What a rank has besides its parts at a moment, as a share of the limit: terms and a constant."""
        unit = (1.0 + self.costs.allocator_slack) / self.limit_bytes
        if not self.x:
            return {}, unit * one.besides[None].total
        stage = self.costs.layout.stages_of(rank)[one.chunk]
        return {self.x[stage, choice]: unit * size.total for choice, size in one.besides.items()}, 0.0

    def optimizer_of_slowest(self) -> None:
        for q in range(self.costs.layout.pp):
            own, always = {self.optimizer: -1.0}, 0.0
            for s in self.costs.layout.stages_of(q):
                terms, constant = self.seconds(s, "optimizer")
                own, always = own | terms, always + constant
            self.problem += pulp.LpAffineExpression(own) <= -always, f"optimizer_{q}"

    def not_below_bound(self, bound_seconds: float) -> None:
        self.step.lowBound = (bound_seconds - self.costs.step_seconds) / self.scale * (1 - RELATIVE_TOLERANCE)

    def better_than(self, goal_seconds: float) -> None:
        """Only answers below the best so far are of interest: an upper bound on Z, lowered from solve to solve."""
        if goal_seconds != float("inf"):
            self.step.upBound = (goal_seconds - self.costs.step_seconds) / self.scale
            if self.relaxed is not None:
                self.relaxed.within(self.step, 0.0, self.step.upBound)

    def durations(self) -> None:
        for (phase, s), variable in self.phase.items():
            terms, constant = self.seconds(s, phase)
            self.problem += pulp.LpAffineExpression(terms | {variable: -1.0}) == -constant, f"duration_{phase}_{s}"
        for phase, total in self.whole.items():
            stages = range(self.costs.layout.stages)
            self.problem += _sum((self.phase[phase, s] for s in stages), [total]) == 0, f"whole_{phase}"

    def longer_than_path(self, path: Path) -> None:
        """Counts of 1 on most stages are written through the sum over all, which keeps the row short."""
        terms: dict[pulp.LpVariable, float] = {self.makespan: -1.0}
        for phase in PATH_PHASES:
            times = getattr(path, phase)
            base = 1 if times.count(1) > times.count(0) else 0
            if base:
                terms[self.whole[phase]] = base
            for s, number in enumerate(times):
                if number != base:
                    terms[self.phase[phase, s]] = number - base
        sent = path.sent_seconds(self.costs.hop_seconds) / self.scale
        constraint = pulp.LpAffineExpression(terms) <= -sent
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

    @property
    def impossible(self) -> bool:
        """Whether it is proven that no fractions of layers reach the goal and fit."""
        return self.relaxed is not None and self.relaxed.infeasible

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
            tuple(self._blocks(s, k) for k in range(len(self.costs.segments))) for s in range(self.costs.layout.stages)
        )
        objective = float(self.step.value() or 0.0)
        if model is None and self.problem.sol_status != pulp.LpSolutionOptimal:
            return counts, 0.0  # CBC ran out of time: an answer without a bound
        dual = model.getInfo().mip_dual_bound if model is not None else objective
        return counts, min(objective, dual) * self.scale

    def _blocks(self, stage: int, segment: int) -> Blocks:
        held = dict.fromkeys(self.modes, 0)
        for way in self._ways:
            held[way[0]] += round(self.n[stage, segment, way].value() or 0)
        return Blocks(**held)

    def as_chosen(self) -> LayoutCosts:
        """The layout with the choices of the last answer; a stage without layers has none to free."""
        if not self._choices:
            return self.costs
        chosen = list(self._choices[:1]) * self.costs.layout.stages
        for (s, _, way), n in self.n.items():
            if round(n.value() or 0):
                chosen[s] = way[1]
        return replace(self.costs, reshard=tuple(chosen))


def _sum(variables: Iterable[pulp.LpVariable], less: Iterable[pulp.LpVariable] = ()) -> pulp.LpAffineExpression:
    """Of variables that differ, less others. Written at once, where pulp's own sums copy and add."""
    return pulp.LpAffineExpression(dict.fromkeys(variables, 1.0) | dict.fromkeys(less, -1.0))


def _name(way: Way) -> tuple[str, ...]:
    mode, choice = way
    return (mode,) if choice is None else (mode, "freed" if choice else "kept")


def _of(part: PartSeconds, phase: str) -> float:
    return getattr(part, phase).total
