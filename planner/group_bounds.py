"""Bounds of layouts in groups: those that share degrees, state and schedule, whatever their chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from .bounds import any_chunks_dealt, any_chunks_seconds, heads_and_tails, largest_segment
from .question import Question
from .rank_limits import ROUNDING
from .rules import recompute_modes
from .space import LayoutGroup
from .step_cost import CostModel


def one_state_each(group: LayoutGroup) -> Iterator[LayoutGroup]:
    """The same layouts in groups with one state and one schedule each."""
    for of_state in group.by_state():
        yield from of_state.by_schedule()


def states_too_large(prices: CostModel, group: LayoutGroup, question: Question) -> bool:
    """Whether weights, gradients and optimizer alone, of a group with one state, are more than its ranks hold."""
    return prices.least_state_bytes(group) > group.base.pp * question.limit_bytes * (1 + ROUNDING)


def least_of_one_state(
    prices: CostModel, group: LayoutGroup, question: Question, enough_seconds: float = math.inf
) -> float | None:
    """Seconds that no layout of a group with one state and schedule is below; above `enough_seconds` any such will do.
    None when none fits."""
    schedule, chunks = group.pipelines[0][0], [chunks for _, chunks in group.pipelines]
    of_schedule = replace(group.base, schedule=schedule)
    modes = recompute_modes(of_schedule, question.rules)
    fewest = prices.price_seconds(replace(of_schedule, virtual_stages=min(chunks)))
    around = heads_and_tails(fewest)
    least = any_chunks_seconds(fewest, around, max(chunks), modes)
    if least > enough_seconds:
        return least  # no byte was looked at
    sizes = prices.least_bytes(replace(of_schedule, virtual_stages=max(chunks)), largest_segment(fewest).kind)
    dealt = any_chunks_dealt(fewest, around, chunks, sizes, question.limit_bytes, modes, enough_seconds)
    return None if dealt is None else max(least, dealt)
