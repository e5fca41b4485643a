"""Layers to pipeline stages and their recomputation, as an integer linear program over critical-path cuts.

Sets       s in 0..S-1 stages, each on one of p ranks;  k segments of the model, runs of L_k layers alike;
           r in {none, selective, full} recompute modes;  v in-flight vectors of a rank;  P paths of the schedule
Variables  n[s,k,r]  whole number of layers of segment k on stage s that recompute as r
           f, i, w, g, d[s]  forward, input's and weights' backward, gather, reduce seconds of stage s
           N[q,r]    whole number of layers of the commonest segment on rank q;  N[s] on stage s
           u[q,k,r]  1 when rank q has a layer of segment k that recomputes as r;  y[q] its transient bytes
           z[k,s]    1 when a layer after segment k may lie on stage s (`segment_order`)
           x[s,c]    1 when stage s makes choice c, where stages choose ([Note: Resharding] in `layout_costs`): then
                     n, u are of each (r, c), and a layer's seconds and bytes are those of its stage's choice
           T       seconds up to the last gradient reduction;   O  seconds of the optimizer;   Z  their sum
Minimise   Z = T + O                                                         whole_step
Subject to
  (layers)     Σ_{s,r} n[s,k,r] = L_k                                         every_layer_once
  (stages)     Σ_{k,r} n[s,k,r] >= 1 for a stage without embedding and head   no_empty_stage
  (ranks)      N[q,r] = Σ_s n[s,k,r] <= the most whose least cost reaches the goal    layers_of_ranks
  (widths)     N[s] = Σ_r n[s,k,r], to branch on                              layers_of_stages
  (recompute)  Σ_{s,r} n[s,k,r]·recompute_r >= what N[q] whole layers must    layers_of_ranks
  (order)      no layer of segment k+1 on the stages up to s but where        segments_in_order
               z[k,s] and so all of segment k are; z[k,s] rises with s
  (choice)     Σ_c x[s,c] = 1,  Σ_{k,r} n[s,k,r,c] <= L·x[s,c];  some stage frees  one_choice_a_stage
  (transient)  n[s,k,r] <= L·u[q,k,r],  y[q] >= each transient in use,        transient_in_use
               but where one stage is a rank those of a segment's least r alone
  (memory)     fixed_q + y[q] + Σ n[s,k,r]·(state + v_s·held_r + gradients_v + ...) <= limit, every v   fits_memory
  (durations)  f_s, i_s, w_s, g_s, d_s linear in n; their sums over s         durations
  (path)       T >= Σ_s F_s·f_s + I_s·i_s + W_s·w_s + G_s·g_s + D_s·d_s + C_s·c_s, P      longer_than_path
                 F, I, W, G, D, C how often P passes them, c_s one send from s to s + 1
  (optimizer)  O >= o_q(n)                                                    optimizer_of_slowest
  (goal)       the bound known <= Z <= just below the best simulated step so far      better_than

[Note: Cuts]
A schedule with given durations is max-plus: its makespan is the longest of its paths, each linear in n. So start from
`simulation.known_paths`, solve, simulate the answer, and if the simulation is longer than T add its critical path as a
cut. Each cut is violated by the answer it came from, so no answer returns unless it is best, and the loop ends when the
relaxation's bound meets the best simulated step. First fractions of layers are allowed: such programs are solved at
once, their simulations give valid cuts too, and most layouts that cannot beat the goal are ruled out by them alone.
With chunks, whole layers on ranks and stages come next (`branches`). Bounds of fractions are ours (`dual_bound`); for
whole numbers HiGHS's branch and bound is believed.

Seconds are scaled by the bound and bytes by the limit, so that the solver sees numbers near 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pulp

from .bounds import largest_segment, most_layers_of_stage, recompute_of_ranks
from .counted import Counted, Held
from .in_flight import sums_nothing
from .layout import RECOMPUTE_MODES
from .layout_costs import Blocks, LayoutCosts, SegmentCosts, StageCount
from .linear_program import LinearProgram
from .memory_bytes import LaterMoment
from .part_seconds import PartSeconds
from .path_rows import PATH_PHASES, path_factors
from .rank_limits import empty_counts
from .recompute_rows import write_recompute
from .relaxed_program import RelaxedProgram
from .segment_order import stages_of_segments, write_order
from .simulation import Path, StageSeconds
from .whole_program import WholeProgram

# How a layer recomputes, and what its stage does with weights where it has a choice.
Way = tuple[str, bool | None]
# Two steps closer than this are one: the solver's own feasibility tolerance is 1e-6 to 1e-7.
RELATIVE_TOLERANCE = 1e-6


class RelaxedAnswer(NamedTuple):
    """Of fractions of layers: each stage's durations, T, and what no T + O is below; in seconds."""

    durations: list[StageSeconds]
    makespan_seconds: float
    step_seconds: float


@dataclass
class Program:
    """The program and its columns; `scale` is one unit of time in seconds."""

    costs: LayoutCosts
    limit_bytes: float
    scale: float
    modes: tuple[str, ...]
    goal_seconds: float
    linear: LinearProgram = field(init=False, default_factory=LinearProgram)
    relaxed: RelaxedProgram | None = field(init=False, default=None)
    whole: WholeProgram | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        stages, segments = range(self.costs.layout.stages), self.costs.segments
        self._choices = tuple(choice for choice, _ in self.costs.choices)
        self._seconds: dict[str, list[tuple[int, Way, float]]] = {}
        self._ways = [(r, choice) for r in self.modes for choice in self._choices or (None,)]
        most = self._most = most_layers_of_stage(self.costs, self.goal_seconds)
        on = stages_of_segments(self.costs)
        new = self.linear.column
        # First what paths are made of, in the order in which `path_factors` counts.
        self.phase = {(p, s): new(f"{p}_{s}") for p in PATH_PHASES for s in stages}
        self.summed = {p: new(f"{p}_summed") for p in PATH_PHASES}
        self.makespan, self.optimizer, self.step = new("T"), new("O"), new("Z")
        self.n = {
            (s, k, way): new("_".join(("n", str(s), str(k), *_name(way))), 0, most[k] * (s in on[k]), whole=True)
            for s in stages
            for k in range(len(segments))
            for way in self._ways
        }
        self.x: dict[tuple[int, bool | None], int] = {}
        self.counted: dict[str, Counted] = {}
        self._narrowed: dict[str, tuple[int, int]] = {}  # in any branch, since bounds stay in the solvers
        self._most_step = math.inf
        self._whole: dict[tuple[int, int, Way], int] = {}  # layers of the last answer
        self.linear.objective = self.step

    # ---- linear expressions ----------------------------------------------------------------------------

    def seconds(self, stage: int, phase: str) -> tuple[dict[int, float], float]:
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
            self.linear.row(f"every_layer_once_{k}", placed, segment.layers, segment.layers)

    def no_empty_stage(self) -> None:
        kinds = range(len(self.costs.segments))
        for s in range(1, self.costs.layout.stages - 1):
            held = _sum(n for k in kinds for n in self._layers_on(s, k))
            self.linear.row(f"no_empty_stage_{s}", held, least=1.0)

    def layers_of_ranks(self) -> None:
        """Layers of each rank, in all and by mode: no more than can reach the goal; the solver splits these first. What
        they recompute is what so many whole layers must."""
        commonest, again = recompute_of_ranks(self.costs, self.limit_bytes, self.modes, self.goal_seconds)
        layout, each = self.costs.layout, self.costs.segments[commonest].seconds.recompute
        chosen = [(), *((r,) for r in self.modes)] if layout.virtual_stages > 1 and len(self.modes) > 1 else [()]
        for q in range(layout.pp):
            for modes in chosen:
                ways = [way for way in self._ways if way[0] in (modes or self.modes)]
                held = [self.n[s, commonest, way] for s in layout.stages_of(q) for way in ways]
                self._count("_".join((f"rank_{q}", *modes)), held, len(again[q]) - 1, turn=3 if modes else 1)
            spent = {self.n[s, commonest, w]: each(w[0]).total for s in layout.stages_of(q) for w in self._ways}
            write_recompute(self.linear, f"{q}", self.counted[f"rank_{q}"].column, spent, again[q])

    def layers_of_stages(self) -> None:
        """The same of each stage, and its layers of each segment and way, where ranks have several stages."""
        if self.costs.layout.virtual_stages == 1:
            return
        commonest = self.costs.segments.index(largest_segment(self.costs))
        for s in range(self.costs.layout.stages):
            held = self._layers_on(s, commonest)
            self._count(f"stage_{s}", held, self._most[commonest], turn=2)
        for (s, k, way), column in self.n.items():
            self.counted["_".join((f"stage_{s}", str(k), *_name(way)))] = Counted(column, self._most[k], 4)

    def _count(self, name: str, layers: Iterable[int], most: int, turn: int) -> None:
        column = self.linear.column(f"N_{name}", 0, most, whole=turn != 2)
        self.linear.row(f"layers_of_{name}", _sum(layers) | {column: -1.0}, 0.0, 0.0)
        self.counted[name] = Counted(column, most, turn)

    def segments_in_order(self) -> None:
        self.counted |= write_order(self.linear, self.costs, self._layers_on, self._most)

    def _layers_on(self, stage: int, segment: int) -> list[int]:
        return [self.n[stage, segment, way] for way in self._ways]

    def one_choice_a_stage(self) -> None:
        """Where stages choose. Not all keep their weights, unless a pin says so: that is zero 1."""
        if not self._choices:
            return
        stages = range(self.costs.layout.stages)
        self.x = {(s, one): self.linear.binary(f"x_{s}_{one}") for s in stages for one in self._choices}
        for s in stages:
            self.linear.row(f"one_choice_{s}", _sum(self.x[s, choice] for choice in self._choices), 1.0, 1.0)
            for choice in self._choices:
                held = _sum(n for (of, _, way), n in self.n.items() if of == s and way[1] == choice)
                self.linear.row(f"choice_{s}_{choice}", held | {self.x[s, choice]: -self.costs.layers}, most=0.0)
        if self._choices != (False,):
            freed = _sum(n for (_, _, way), n in self.n.items() if way[1] is not False)
            self.linear.row("some_stage_frees", freed, least=1.0)

    def transient_in_use(self, first: bool) -> dict[int, int]:
        """y of each rank, as a share of the limit: at least what its ends need, and each kind of layer it has. `first`:
        in backwards that sum no gradients."""
        slack, y = 1.0 + self.costs.allocator_slack, dict[int, int]()
        for q in range(self.costs.layout.pp):
            # Of its ends alone: what passes whatever a rank holds is among its fixed bytes.
            ends = [end.transient_by(mode, never_summed=first) for _, end, _, mode in self.costs.end_parts(q)]
            least = max(ends, default=0.0)
            if any(0 < s < self.costs.layout.stages - 1 for s in self.costs.layout.stages_of(q)):  # never empty
                each = [segment.memory.transient_by(way[0], never_summed=first) for _, way, segment in self._layers()]
                least = max(least, min(each))
            share = slack * least / self.limit_bytes
            y[q] = self.linear.column(f"y_{q}_{first}", share, max(1.0, share))  # all that passes is within the limit
            for k, way, segment in self._layers():
                transient = segment.memory.transient_by(way[0], never_summed=first)
                if transient <= least:
                    continue
                name = "_".join((str(q), str(k), *_name(way), str(first)))
                u = self.linear.binary(f"u_{name}")
                held = _sum(self.n[s, k, way] for s in self.costs.layout.stages_of(q))
                most = min(segment.layers, self._most[k] * len(held))
                self.linear.row(f"used_{name}", held | {u: -most}, most=0.0)
                others = self._lesser_in_use(q, k, way, name) if self.costs.last_recompute_least else ()
                share = slack * transient / self.limit_bytes
                passing = {y[q]: 1.0, u: -share} | dict.fromkeys(others, share)
                self.linear.row(f"transient_{name}", passing, least=0.0)
        return y

    def _lesser_in_use(self, rank: int, k: int, way: Way, name: str) -> list[int]:
        """For each mode that recomputes less, 1 at most, and where the rank's stage has a layer so."""
        found, (stage,) = [], self.costs.layout.stages_of(rank)
        for lesser in RECOMPUTE_MODES[: RECOMPUTE_MODES.index(way[0])]:
            if (lesser_n := self.n.get((stage, k, (lesser, way[1])))) is None:
                continue
            w = self.linear.column(f"w_{name}_{lesser}", 0.0, 1.0)
            self.linear.row(f"lesser_{name}_{lesser}", {w: 1.0, lesser_n: -1.0}, most=0.0)
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
        unit = slack / self.limit_bytes
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
                        terms[self.n[s, k, way]] = unit * each
                free = 1.0 - always - (kept + slack * held) / self.limit_bytes
                self.linear.row(f"fits_memory_{q}_{number}", terms, most=free)

    def _besides(self, rank: int, one: LaterMoment) -> tuple[dict[int, float], float]:
        """What a rank has besides its parts at a moment, as a share of the limit: terms and a constant."""
        unit = (1.0 + self.costs.allocator_slack) / self.limit_bytes
        if not self.x:
            return {}, unit * one.besides[None].total
        stage = self.costs.layout.stages_of(rank)[one.chunk]
        return {self.x[stage, choice]: unit * size.total for choice, size in one.besides.items()}, 0.0

    def optimizer_of_slowest(self) -> None:
        slowest = 0.0
        for q in range(self.costs.layout.pp):
            own, always = dict[int, float](), 0.0
            for s in self.costs.layout.stages_of(q):
                terms, constant = self.seconds(s, "optimizer")
                own, always = own | terms, always + constant
            self.linear.row(f"optimizer_{q}", own | {self.optimizer: -1.0}, most=-always)
            slowest = max(slowest, self.linear.most_of(own, always))
        self.linear.at_most(self.optimizer, slowest)

    def durations(self) -> None:
        for (phase, s), column in self.phase.items():
            self.linear.equals(f"duration_{phase}_{s}", column, *self.seconds(s, phase))
        for phase, column in self.summed.items():
            of_stages = _sum(self.phase[phase, s] for s in range(self.costs.layout.stages))
            self.linear.equals(f"summed_{phase}", column, of_stages, 0.0)

    def whole_step(self) -> None:
        """Z; and an end of T, as if all actions and sends came one after the other."""
        once = self.linear.most_of(_sum(self.summed.values()), 2.0 * self.costs.sent_before[-1] / self.scale)
        self.linear.at_most(self.makespan, self.costs.microbatches * once)
        self.linear.equals("step", self.step, {self.makespan: 1.0, self.optimizer: 1.0}, 0.0)

    def longer_than_path(self, path: Path) -> None:
        sent = path.sent_seconds(self.costs.hop_seconds) / self.scale
        self.linear.row(f"path_{self.linear.number_of_rows}", path_factors(path), most=-sent)

    # ---- solving ---------------------------------------------------------------------------------------

    def better_than(self, goal_seconds: float) -> None:
        """Only answers below the best so far are of interest: an upper bound on Z, lowered from solve to solve."""
        self._most_step = (goal_seconds - self.costs.step_seconds) / self.scale

    def _hold(self, solver: RelaxedProgram | WholeProgram, held: Held, least_seconds: float) -> None:
        least = (least_seconds - self.costs.step_seconds) / self.scale * (1 - RELATIVE_TOLERANCE)
        solver.within(self.step, max(0.0, least), min(self._most_step, self.linear.columns[self.step].most))
        narrowed = {name: (fewest, most) for name, fewest, most in held}
        self._narrowed |= narrowed
        for name in self._narrowed:
            solver.within(self.counted[name].column, *narrowed.get(name, (0, self.counted[name].most)))

    def relax(self, held: Held = ()) -> RelaxedAnswer | None:
        """The best fractions of layers on ranks that hold what is `held`; None where there are none, proven or not
        (`impossible`), and where HiGHS is missing."""
        if not pulp.HiGHS().available():
            return None
        if self.relaxed is None:
            self.relaxed = RelaxedProgram(self.linear)
        self._hold(self.relaxed, held, 0.0)
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
            self.relaxed.bound * scale,
        )

    @property
    def impossible(self) -> bool:
        """Whether it is proven that no fractions of layers reach the goal and fit."""
        return self.relaxed is not None and self.relaxed.infeasible

    def solve(self, solver: Any, held: Held, least_seconds: float) -> tuple[tuple[StageCount, ...] | None, float]:
        """(best assignment of whole layers to ranks that hold what is `held`, or None; lower bound of T + O in seconds)
        by one of pulp's solvers. No such assignment is below `least_seconds`; the bound is infinite when there is none.
        """
        if self.whole is None:
            self.whole = WholeProgram(self.linear)
        self._hold(self.whole, held, least_seconds)
        values, bound = self.whole.solve(solver)
        if values is None:
            return None, bound * self.scale
        self._whole = {place: round(values[column]) for place, column in self.n.items()}
        stages, kinds = range(self.costs.layout.stages), range(len(self.costs.segments))
        return tuple(tuple(self._blocks(s, k) for k in kinds) for s in stages), bound * self.scale

    def _blocks(self, stage: int, segment: int) -> Blocks:
        held = dict.fromkeys(self.modes, 0)
        for way in self._ways:
            held[way[0]] += self._whole[stage, segment, way]
        return Blocks(**held)

    def as_chosen(self) -> LayoutCosts:
        """The layout with the choices of the last answer; a stage without layers has none to free."""
        if not self._choices:
            return self.costs
        chosen = list(self._choices[:1]) * self.costs.layout.stages
        for (s, _, way), layers in self._whole.items():
            if layers:
                chosen[s] = way[1]
        return replace(self.costs, reshard=tuple(chosen))


def _sum(columns: Iterable[int]) -> dict[int, float]:
    """Of columns that differ."""
    return dict.fromkeys(columns, 1.0)


def _name(way: Way) -> tuple[str, ...]:
    return way[:1] if way[1] is None else (way[0], "freed" if way[1] else "kept")


def _of(part: PartSeconds, phase: str) -> float:
    return getattr(part, phase).total
