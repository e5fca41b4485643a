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


class Room(NamedTuple):
    """Of a group with one state and schedule: its plainest layout, what layers may recompute, what each rank holds
    besides layers at least, a layer of the commonest kind, and how many of them more than the model has would have room
    at most."""

    layout: Layout
    modes: tuple[str, ...]
    held: list[Moment]
    layer: PartMemory
    spare: int


class GroupBounds:
    """Bounds of a question's groups, by what layouts cost at `prices`."""

    def __init__(self, prices: CostModel, question: Question) -> None:
        self._prices, self._question = prices, question
        self._rooms: dict[LayoutGroup, Room | None] = {}  # looked at before their seconds

    def states_too_large(self, group: LayoutGroup) -> bool:
        """Whether weights, gradients and optimizer alone, of a group with one state, are more than its ranks hold."""
        room_bytes = group.base.pp * self._question.limit_bytes * (1 + ROUNDING)
        return self._prices.least_memory.state_bytes(group) > room_bytes

    def has_room(self, group: LayoutGroup) -> bool:
        """Whether under some schedule a group with one state may have room for its layers."""
        return any(self._kept_room(one) is not None for one in one_state_each(group))

    def _kept_room(self, group: LayoutGroup) -> Room | None:
        if group not in self._rooms:
            self._rooms[group] = self.room(group)
        return self._rooms[group]

    def room(self, group: LayoutGroup) -> Room | None:
        """None where no layout of a group with one state and schedule has room for its layers."""
        question, slack = self._question, self._prices.slack
        schedule, chunks = group.pipelines[0][0], [chunks for _, chunks in group.pipelines]
        layout = group.base.but(schedule=schedule, virtual_stages=min(chunks))
        modes, sizes = recompute_modes(layout, question.rules), self._prices.least_memory.part_bytes(layout, chunks)
        held = held_by_ends(layout.pipeline(layout.microbatches(question.job.global_batch)), chunks, sizes, slack)
        spare = layers_held(sizes.layer, held, question.limit_bytes, slack, modes) - sizes.layers
        return Room(layout, modes, held, sizes.layer, spare) if spare >= 0 else None

    def least_of_any_schedule(self, group: LayoutGroup) -> float:
        """Seconds that no layout of a group with one state is below; no bytes are looked at.

        Schedules whose parts cost the same have one bound: with the fewest chunks, the most stages to share the
        backwards, no waits for messages, and backwards split if any of them splits them.
        """
        (group,) = group.by_state()  # with a base that is in this state
        prices = self._prices
        numbers: dict[str, list[int]] = {}
        for schedule, chunks in group.pipelines:
            numbers.setdefault(schedule, []).append(chunks)
        alike: dict[object, list[Layout]] = {}
        for schedule, chunks in numbers.items():
            layout = group.base.but(schedule=schedule, virtual_stages=min(chunks))
            alike.setdefault((prices.parts_like(layout), layout.stages_choose), []).append(layout)
        least, rules, pace = math.inf, self._question.rules, prices.least_pace(group)
        for layouts in alike.values():
            one = max(layouts, key=lambda layout: layout.schedule in SPLIT_BACKWARD)
            most = max(max(numbers[layout.schedule]) for layout in layouts)
            modes = tuple({mode for layout in layouts for mode in recompute_modes(layout, rules)})
            fewest = one.but(virtual_stages=min(layout.virtual_stages for layout in layouts))
            costs = prices.price_seconds(fewest, waits=False, pace=pace)
            least = min(least, any_chunks_seconds(costs, heads_and_tails(costs), most, modes))
        return least

    def least_of_one_state(self, group: LayoutGroup, enough_seconds: float = math.inf) -> float | None:
        """Seconds that no layout of a group with one state and schedule is below; above `enough_seconds` any such will
        do. None when none fits."""
        # Bytes first: they take a fraction of what seconds do, and rule out most groups where memory is short.
        room = self._kept_room(group)
        if room is None:
            return None
        prices, limit = self._prices, self._question.limit_bytes
        fewest = prices.price_seconds(room.layout, pace=prices.least_pace(group))
        around = heads_and_tails(fewest)
        least = any_chunks_seconds(fewest, around, max(chunks for _, chunks in group.pipelines), room.modes)
        if least > enough_seconds:
            return least
        dealt = any_chunks_dealt(fewest, around, room.held, room.layer, limit, room.modes, enough_seconds)
        return None if dealt is None else max(least, dealt)
