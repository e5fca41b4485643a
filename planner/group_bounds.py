"""Bounds of layouts in groups: those that share degrees, state and schedule, whatever their chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from .bounds import any_chunks_dealt, any_chunks_seconds, heads_and_tails, held_by_ends
from .layout import Layout
from .memory_bytes import PartMemory
from .question import Question
from .rank_limits import ROUNDING, Moment, layers_held
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


class Room(NamedTuple):
    """Of a group with one state and schedule: its plainest layout, what layers may recompute, what each rank holds
    besides layers at least, a layer of the commonest kind, and how many of them more than the model has would have room
    at most."""

    layout: Layout
    modes: tuple[str, ...]
    held: list[Moment]
    layer: PartMemory
    spare: int


def room_of_one_state(prices: CostModel, group: LayoutGroup, question: Question) -> Room | None:
    """None where no layout of a group with one state and schedule has room for its layers."""
    schedule, chunks = group.pipelines[0][0], [chunks for _, chunks in group.pipelines]
    layout = group.base.but(schedule=schedule, virtual_stages=min(chunks))
    modes, slack = recompute_modes(layout, question.rules), prices.slack
    sizes = prices.least_memory.part_bytes(layout, chunks)
    held = held_by_ends(layout.pipeline(layout.microbatches(question.job.global_batch)), chunks, sizes, slack)
    spare = layers_held(sizes.layer, held, question.limit_bytes, slack, modes) - sizes.layers
    return Room(layout, modes, held, sizes.layer, spare) if spare >= 0 else None


def least_of_one_state(
    prices: CostModel, group: LayoutGroup, question: Question, enough_seconds: float = math.inf
) -> float | None:
    """Seconds that no layout of a group with one state and schedule is below; above `enough_seconds` any such will do.
    None when none fits."""
    # Bytes first: they take a fraction of what seconds do, and rule out most groups where memory is short.
    room = room_of_one_state(prices, group, question)
    if room is None:
        return None
    of_schedule, modes, limit = room.layout, room.modes, question.limit_bytes
    fewest = prices.price_seconds(of_schedule, pace=prices.least_pace(group))
    around = heads_and_tails(fewest)
    least = any_chunks_seconds(fewest, around, max(chunks for _, chunks in group.pipelines), modes)
    if least > enough_seconds:
        return least
    dealt = any_chunks_dealt(fewest, around, room.held, room.layer, limit, modes, enough_seconds)
    return None if dealt is None else max(least, dealt)
