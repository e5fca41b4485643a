"""Layouts priced without an ILP: what the search starts from, and what lets it stop early."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from .bounds import fits, lower_bound
from .first_assignment import first_assignment
from .layout_costs import LayoutCosts, StageCount
from .question import Question
from .rules import recompute_modes
from .schedule import SPLIT_BACKWARD
from .space import LayoutGroup
from .step_cost import CostModel

_MOST_GUESSES = 24
# Microbatches through stages that are simulated for a guess: a tenth of a second.
_MOST_VISITS = 20_000


@dataclass(frozen=True)
class Solved:
    """A layout with its best assignment."""

    costs: LayoutCosts
    counts: tuple[StageCount, ...]
    step_seconds: float

    @property
    def peak_memory_bytes(self) -> float:
        return max(memory.total for memory in self.costs.memory(self.counts))


class Guesses:
    """Layouts dealt out evenly: what the search starts from, and what it can stop at early."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._tightness: dict[str, float] = {}  # the highest bound / step seen of a schedule

    def first(self, groups: Sequence[LayoutGroup], prices: CostModel) -> Solved | None:
        """The best of the layouts that an estimate of their even assignment names first; None where none of them fits.

        As the search goes, from groups to states to schedules, but in the order of the estimates: what ranks work on
        average, a textbook bubble (arXiv 2104.04473, section 2.2) and the layers of the fullest stage on top.
        """
        ties, limit = count(), self._question.limit_bytes
        left = [(prices.least_work(group) * self._uneven(group), next(ties), group) for group in groups]
        heapq.heapify(left)
        best: Solved | None = None
        looks = 0
        while left and looks < _MOST_GUESSES:
            estimate, _, group = heapq.heappop(left)
            if best is not None and estimate >= best.step_seconds:
                break
            if len(group.states) > 1 or len(group.pipelines) > 1:
                by_state = len(group.states) > 1
                for part in group.by_state() if by_state else group.by_pipeline():
                    if not by_state or prices.least_state_bytes(part) <= part.base.pp * limit:
                        heapq.heappush(left, (prices.least_step(part) * self._uneven(part), next(ties), part))
                continue
            for layout in group:
                modes = recompute_modes(layout, self._question.rules)
                visits = layout.stages * layout.microbatches(self._question.job.global_batch)
                if visits > _MOST_VISITS or prices.is_too_big(layout, limit, modes):
                    continue
                costs = prices.price(layout)
                if lower_bound(costs, limit, modes) is not None:
                    best = self._better(costs, best)
                    looks += 1
        return best

    def _uneven(self, group: LayoutGroup) -> float:
        """By how much the estimate is above the mean work, of the group's best pipeline."""
        ranks, layers = group.base.pp, self._question.model.layers
        microbatches = group.base.microbatches(self._question.job.global_batch)
        factors = []
        for schedule, chunks in group.pipelines:
            bubble = (ranks - 1) / (microbatches * chunks) / (2 if schedule in SPLIT_BACKWARD else 1)
            stages = ranks * chunks
            factors.append((1 + bubble) * -(-layers // stages) * stages / layers)
        return min(factors)

    def look_at(self, costs: LayoutCosts, bound: float, cutoff: float, best: Solved | None) -> Solved | None:
        """The better of `best` and this layout, tried where bounds as tight as seen before promise something."""
        schedule = costs.layout.schedule
        cutoff = min(cutoff, best.step_seconds) if best is not None else cutoff
        visits = costs.layout.stages * costs.microbatches
        if bound / self._tightness.get(schedule, 1.0) >= cutoff or visits > _MOST_VISITS:
            return best
        found = self._better(costs, None)
        if found is None:
            return best
        self._tightness[schedule] = max(bound / found.step_seconds, self._tightness.get(schedule, 0.0))
        return found if best is None or found.step_seconds < best.step_seconds else best

    def _better(self, costs: LayoutCosts, best: Solved | None) -> Solved | None:
        counts = first_assignment(
            costs, self._question.limit_bytes, recompute_modes(costs.layout, self._question.rules)
        )
        if not fits(costs, counts, self._question.limit_bytes):
            return best
        solved = Solved(costs, counts, costs.step(counts))
        return solved if best is None or solved.step_seconds < best.step_seconds else best
