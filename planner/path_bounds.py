"""Bounds of layouts from paths of their pipeline: a linear program over layers per stage, its duals kept as forms.

[Note: Forms]
Every path of a schedule is at most its makespan, whatever the durations (`simulation.Path`), so any mean of paths is
too: a form, how often on average each stage's forward, backwards, gather and reduction are passed, and how many sends.
With n layers on the stages a form is linear in n, and its least value over all n that are possible is a bound. The
best weights of the paths are the duals of

    minimise T   subject to   T >= path · n  for the paths known,   Σ n = layers,   layers of rank r <= U_r

whose paths are found as in the ILP: solve, simulate the (fractional) answer, add its critical path. U_r are the layers
that a rank may hold without taking longer by itself than the step that is to be beaten, so what comes out says that no
step is below the smaller of the two. A form holds for every layout with the same pipeline: it is found once and costs
a few products afterwards. The program only proposes; what is believed is the form's value, summed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np

from .bounds import RankCosts
from .layout_seconds import LayoutSeconds
from .part_seconds import PartSeconds
from .schedule import Pipeline
from .simulation import Path, StageSeconds, known_paths, simulate

PHASES = ("forward", "backward_input", "backward_weight", "gather", "reduce")
_MOST_ROUNDS = 60
_MOST_FORMS = 8
# Of the answer's simulation to the program's own value: closer than this, more paths add nothing.
_CLOSE = 1e-3
# How far from the best point so far towards the program's answer the schedule is simulated.
_STEPS = (1.0, 0.3)


@dataclass(frozen=True)
class Form:
    """A mean of paths: `passes` has a row a phase of PHASES and a column a stage."""

    passes: np.ndarray
    sends: float

    @classmethod
    def mean(cls, paths: Sequence[Path], weights: Sequence[float]) -> Form:
        total = math.fsum(weights)
        shares = [weight / total for weight in weights]
        rows = [sum(w * _passes(path) for w, path in zip(shares, paths, strict=True))]
        return cls(rows[0], math.fsum(w * path.sends for w, path in zip(shares, paths, strict=True)))

    def least(self, timed: LayoutSeconds, ranks: RankCosts, below_seconds: float) -> float:
        """Seconds that no assignment is below, if none of those that take less than `below_seconds` is."""
        layout, parts = timed.layout, _StageParts(timed)
        below = below_seconds - timed.step_seconds
        update = 1.0 / layout.pp  # the slowest rank's is at least the mean
        fixed = self.sends * timed.send_seconds + float((self.passes * parts.ends).sum())
        fixed += update * (timed.embedding.optimizer.total + timed.head.optimizer.total)
        again = self.passes[1]
        dealt = 0.0
        for segment in timed.segments:
            each = parts.layer(segment.seconds) @ self.passes + update * segment.seconds.optimizer.total
            if segment is ranks.segment:
                dealt = self._dealt(timed, ranks, each, again, below)
            else:
                fixed += segment.layers * float((each + ranks.least_again(segment) * again).min())
        return min(below_seconds, fixed + dealt + timed.step_seconds)

    def _dealt(
        self, timed: LayoutSeconds, ranks: RankCosts, each: np.ndarray, again: np.ndarray, below: float
    ) -> float:
        """The least sum over the ranks of what their layers of the commonest segment add."""
        layout, layers = timed.layout, ranks.segment.layers
        sums = np.full(layers + 1, math.inf)
        sums[0] = 0.0
        for rank in range(layout.pp):
            stages = list(layout.stages_of(rank))
            least, most = ranks.inner[rank], ranks.most_layers(rank, below)
            inner = [s for s in stages if 0 < s < layout.stages - 1] if least else []
            start = float(each[inner].sum())
            added, cheapest = float(each[stages].min()), float(again[stages].min())
            found = np.full(layers + 1, math.inf)
            for number in range(least, most + 1):
                spent = ranks.recompute[rank](number)
                if spent is None:
                    break
                seconds = start + (number - least) * added + cheapest * spent
                np.minimum(found[number:], sums[: layers + 1 - number] + seconds, out=found[number:])
            sums = found
        return float(sums[layers])


class _StageParts:
    """Seconds of stages without layers, and of a layer, by phase, as arrays."""

    def __init__(self, timed: LayoutSeconds) -> None:
        self.ends = np.array([self.layer(end) for end in timed.stage_ends]).T

    @staticmethod
    def layer(part: PartSeconds) -> np.ndarray:
        return np.array([getattr(part, phase).total for phase in PHASES])


def _passes(path: Path) -> np.ndarray:
    return np.array([getattr(path, phase) for phase in PHASES], dtype=float)


@dataclass
class _Pool:
    """What is known of one pipeline."""

    paths: dict[Path, None] = field(default_factory=dict)
    forms: list[Form] = field(default_factory=list)


class PathBounds:
    """Paths and forms by pipeline, found as they are needed."""

    def __init__(self) -> None:
        self._pools: dict[Pipeline, _Pool] = {}

    def paths(self, pipeline: Pipeline) -> list[Path]:
        """Paths worth having as cuts of the pipeline."""
        return list(self._pool(pipeline).paths)

    def known(self, timed: LayoutSeconds, ranks: RankCosts, below_seconds: float) -> float:
        """The bound of the forms found so far; see `Form.least`."""
        forms = self._pool(timed.pipeline).forms
        return max((form.least(timed, ranks, below_seconds) for form in forms), default=0.0)

    def improve(self, timed: LayoutSeconds, ranks: RankCosts, below_seconds: float) -> tuple[float, list[float]]:
        """The bound of a form found for this layout, and layers by stage, in fractions, that come close to it."""
        pool = self._pool(timed.pipeline)
        program = _Program(timed, ranks, below_seconds)
        for path in pool.paths:
            program.add(path)
        weights, point = program.run(below_seconds - timed.step_seconds)
        for path in program.paths:
            pool.paths[path] = None
        if not any(weights):
            return (0.0 if program.possible else below_seconds), point
        chosen = [(path, weight) for path, weight in zip(program.paths, weights, strict=True) if weight > 0]
        form = Form.mean([path for path, _ in chosen], [weight for _, weight in chosen])
        pool.forms = [*pool.forms[-_MOST_FORMS + 1 :], form]
        return form.least(timed, ranks, below_seconds), point

    def _pool(self, pipeline: Pipeline) -> _Pool:
        if pipeline not in self._pools:
            self._pools[pipeline] = _Pool(dict.fromkeys(known_paths(pipeline)))
        return self._pools[pipeline]


class _Program:
    """The linear program of one layout: layers of each segment on each stage, in fractions, and T, in mean steps."""

    def __init__(self, timed: LayoutSeconds, ranks: RankCosts, below_seconds: float) -> None:
        self._timed, self._ranks = timed, ranks
        self.paths: list[Path] = []
        self._parts = _StageParts(timed)
        layout, stages = timed.layout, timed.layout.stages
        self._scale = below_seconds if below_seconds < math.inf else 1.0
        below = below_seconds - timed.step_seconds
        most = [ranks.most_layers(rank, below) for rank in range(layout.pp)]
        self.possible = sum(most) >= ranks.segment.layers
        self._each = []  # of each segment, seconds by phase and stage
        for segment in timed.segments:
            each = np.repeat(self._parts.layer(segment.seconds)[:, None], stages, axis=1)
            for rank in range(layout.pp):
                share = segment.layers / layout.pp
                spent = ranks.recompute[rank](min(most[rank], math.ceil(share))) if segment is ranks.segment else None
                again = spent / math.ceil(share) if spent else ranks.least_again(segment)
                each[1, list(layout.stages_of(rank))] += again
            self._each.append(each)
        self._solver = solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.addVar(0.0, highspy.kHighsInf)
        solver.changeColCost(0, 1.0)
        alone = len(timed.segments) == 1
        for segment in timed.segments:
            for stage in range(stages):
                inner = alone and 0 < stage < stages - 1
                solver.addVar(1.0 if inner else 0.0, float(segment.layers))
        for k, segment in enumerate(timed.segments):
            columns = np.arange(1 + k * stages, 1 + (k + 1) * stages, dtype=np.int32)
            solver.addRow(segment.layers, segment.layers, stages, columns, np.ones(stages))
            if segment is ranks.segment:
                for rank in range(layout.pp):
                    own = np.array([1 + k * stages + s for s in layout.stages_of(rank)], dtype=np.int32)
                    solver.addRow(0.0, float(most[rank]), len(own), own, np.ones(len(own)))
        self._first = solver.getNumRow()

    def add(self, path: Path) -> None:
        """T >= path · n."""
        passes = _passes(path)
        fixed = path.sends * self._timed.send_seconds + float((passes * self._parts.ends).sum())
        row = np.concatenate([[1.0], *(-(passes * each).sum(axis=0) / self._scale for each in self._each)])
        columns = np.arange(len(row), dtype=np.int32)
        self._solver.addRow(fixed / self._scale, highspy.kHighsInf, len(row), columns, row)
        self.paths.append(path)

    def run(self, below: float) -> tuple[list[float], list[float]]:
        """(weights of the paths, layers by stage); stops once no step below `below` is left."""
        best, centre = math.inf, None
        weights: list[float] = [0.0] * len(self.paths)
        stages = self._timed.layout.stages
        if not self.possible:
            return weights, [0.0] * stages
        for _ in range(_MOST_ROUNDS):
            self._solver.run()
            if self._solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                break
            solution = self._solver.getSolution()
            value, point = solution.col_value[0] * self._scale, np.array(solution.col_value[1:])
            weights = [max(0.0, dual) for dual in solution.row_dual[self._first :]]
            if value >= below or value >= best * (1 - _CLOSE):
                break
            middle = point if centre is None else centre
            for step in _STEPS if centre is not None else _STEPS[:1]:
                tried = step * point + (1 - step) * middle
                simulation = simulate(self._timed.pipeline, self._durations(tried), self._timed.send_seconds)
                if simulation.seconds < best:
                    best, centre = simulation.seconds, tried
                self.add(simulation.critical_path)
        chosen = (centre if centre is not None else np.zeros(stages * len(self._each))).reshape(-1, stages).sum(axis=0)
        return [*weights, *[0.0] * (len(self.paths) - len(weights))], chosen.tolist()

    def _durations(self, point: np.ndarray) -> list[StageSeconds]:
        layers = point.reshape(-1, self._timed.layout.stages)
        seconds = self._parts.ends + sum(each * n for each, n in zip(self._each, layers, strict=True))
        return [StageSeconds(*column) for column in seconds.T.tolist()]
