"""Layouts priced without an ILP: what the search starts from, and what lets it stop early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .first_assignment import quickest_start
from .layout_costs import LayoutCosts, StageCount
from .question import Question
from .rules import recompute_modes
from .space import LayoutGroup
from .step_cost import CostModel

_MOST_GUESSES = 12


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

    def plain(self, groups: Sequence[tuple[float, LayoutGroup]], prices: CostModel) -> Solved | None:
        """The best of a few plain layouts that fit, of the pairs of tp and pp that promise most; `groups` with the
        least seconds of each."""
        plain: dict[tuple[int, int], tuple[float, LayoutGroup]] = {}
        for least, group in groups:
            key = (group.base.tp, group.base.pp)
            if group.base.cp == 1 and (key not in plain or least < plain[key][0]):
                plain[key] = (least, group)
        best: Solved | None = None
        for least, group in sorted(plain.values(), key=lambda pair: pair[0])[:_MOST_GUESSES]:
            if best is not None and least >= best.step_seconds:
                break
            schedule, chunks = next((p for p in group.pipelines if p[0] == "1f1b"), group.pipelines[0])
            zero, shard, ep, etp = group.states[-1]  # the most sharded
            layout = replace(
                group.base, schedule=schedule, virtual_stages=chunks, zero=zero, dp_shard=shard, ep=ep, etp=etp
            )
            best = self._better(prices.price(layout), best)
        return best

    def look_at(self, costs: LayoutCosts, bound: float, cutoff: float, best: Solved | None) -> Solved | None:
        """The better of `best` and this layout, tried where bounds as tight as seen before promise something."""
        schedule = costs.layout.schedule
        cutoff = min(cutoff, best.step_seconds) if best is not None else cutoff
        if bound / self._tightness.get(schedule, 1.0) >= cutoff:
            return best
        found = self._better(costs, None)
        if found is None:
            return best
        self._tightness[schedule] = max(bound / found.step_seconds, self._tightness.get(schedule, 0.0))
        return found if best is None or found.step_seconds < best.step_seconds else best

    def _better(self, costs: LayoutCosts, best: Solved | None) -> Solved | None:
        modes = recompute_modes(costs.layout, self._question.rules)
        start = quickest_start(costs, self._question.limit_bytes, modes)
        if start is None:
            return best
        costs, counts = start
        solved = Solved(costs, counts, costs.step(counts))
        return solved if best is None or solved.step_seconds < best.step_seconds else best
