"""Of layouts that tie, the plainest: a search finds any of them, and whoever reads its plan should not wonder why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .bounds import fits
from .guesses import Solved
from .layout import RECOMPUTE_MODES, SCHEDULES
from .question import Question
from .rank_limits import ROUNDING
from .rules import recompute_modes, violations
from .step_cost import CostModel

_ORDER = ("1f1b", *(schedule for schedule in SCHEDULES if schedule != "1f1b"))


def plainest_first(best: Sequence[Solved], question: Question, prices: CostModel) -> list[Solved]:
    """The best first, under the plainest schedule that takes no longer with the same assignment; the others as they
    are, but for that layout among them, which changes places with the first."""
    first, plain = best[0], _plainest(best[0], question, prices)
    return [plain, *(first if other.costs.layout == plain.costs.layout else other for other in best[1:])]


def _plainest(solved: Solved, question: Question, prices: CostModel) -> Solved:
    own, rules = solved.costs.layout, question.rules
    used = {mode for count in solved.counts for blocks in count for mode in RECOMPUTE_MODES if blocks.of(mode)}
    for schedule in _ORDER[: _ORDER.index(own.schedule)]:
        layout = own.but(schedule=schedule)
        if not question.job.allows("schedule", schedule) or violations(layout, rules):
            continue
        if not used <= set(recompute_modes(layout, rules)):
            continue
        costs = prices.price(layout, solved.costs.reshard)
        seconds = costs.step(solved.counts)
        if seconds <= solved.step_seconds * (1 + ROUNDING) and fits(costs, solved.counts, question.limit_bytes):
            return replace(solved, costs=costs, step_seconds=seconds)
    return solved
