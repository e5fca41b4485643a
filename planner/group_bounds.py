"""Bounds of layouts in groups: those that share degrees, state and schedule, whatever their chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .bounds import any_chunks_dealt, any_chunks_seconds, heads_and_tails, held_by_ends
from .layout import Layout
from .question import Question
from .rank_limits import ROUNDING, layers_held
from .rules import recompute_modes
from .schedule import SPLIT_BACKWARD
from .space import LayoutGroup
from .step_cost import CostModel


def one_state_each(group: LayoutGroup) -> Iterator[LayoutGroup]:
    """The same layouts in groups with one state and one schedule each."""
    for of_state in group.by_state():
        yield from of_state.by_schedule()


def states_too_large(prices: CostModel, group: LayoutGroup, question: Question) -> bool:
    """Whether weights, gradients and optimizer alone, of a group with one state, are more than its ranks hold."""
    return prices.least_memory.state_bytes(group) > group.base.pp * question.limit_bytes * (1 + ROUNDING)


def least_of_any_schedule(prices: CostModel, group: LayoutGroup, question: Question) -> float:
    """Seconds that no layout of a group with one state is below; no bytes are looked at.

    Schedules whose parts cost the same have one bound: with the fewest chunks, the most stages to share the backwards,
    no waits for messages, and backwards split if any of them splits them.
    """
    (group,) = group.by_state()  # with a base that is in this state
    numbers: dict[str, list[int]] = {}
    for schedule, chunks in group.pipelines:
        numbers.setdefault(schedule, []).append(chunks)
    alike: dict[object, list[Layout]] = {}
    for schedule, chunks in numbers.items():
        layout = group.base.but(schedule=schedule, virtual_stages=min(chunks))
        alike.setdefault((prices.parts_like(layout), layout.stages_choose), []).append(layout)
    least, rules, pace = math.inf, question.rules, prices.least_pace(group)
    for layouts in alike.values():
        one = max(layouts, key=lambda layout: layout.schedule in SPLIT_BACKWARD)
        most = max(max(numbers[layout.schedule]) for layout in layouts)
        modes = tuple({mode for layout in layouts for mode in recompute_modes(layout, rules)})
        fewest = one.but(virtual_stages=min(layout.virtual_stages for layout in layouts))
        costs = prices.price_seconds(fewest, waits=False, pace=pace)
        least = min(least, any_chunks_seconds(costs, heads_and_tails(costs), most, modes))
    return least


def least_of_one_state(
    prices: CostModel, group: LayoutGroup, question: Question, enough_seconds: float = math.inf
) -> float | None:
    """Seconds that no layout of a group with one state and schedule is below; above `enough_seconds` any such will do.
    None when none fits."""
    schedule, chunks = group.pipelines[0][0], [chunks for _, chunks in group.pipelines]
    of_schedule = group.base.but(schedule=schedule, virtual_stages=min(chunks))
    modes, limit = recompute_modes(of_schedule, question.rules), question.limit_bytes
    # Bytes first: they take a fraction of what seconds do, and rule out most groups where memory is short.
    sizes, slack = prices.least_memory.part_bytes(of_schedule, chunks), prices.slack
    held = held_by_ends(of_schedule.pipeline(of_schedule.microbatches(question.job.global_batch)), chunks, sizes, slack)
    if layers_held(sizes.layer, held, limit, slack, modes) < sizes.layers:
        return None
    fewest = prices.price_seconds(of_schedule, pace=prices.least_pace(group))
    around = heads_and_tails(fewest)
    least = any_chunks_seconds(fewest, around, max(chunks), modes)
    if least > enough_seconds:
        return least
    dealt = any_chunks_dealt(fewest, around, held, sizes.layer, limit, modes, enough_seconds)
    return None if dealt is None else max(least, dealt)
