"""Bounds of layouts in groups: those that share degrees and state, whatever their schedules and chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from .bounds import any_chunks_dealt, any_chunks_seconds, heads_and_tails, held_by_ends
from .in_flight import least_of_any
from .layout import Layout
from .memory_bytes import PartTotals
from .question import Question
from .rank_limits import ROUNDING, Moment, layers_held
from .rules import recompute_modes
from .schedule import SPLIT_BACKWARD, V_SHAPED
from .space import LayoutGroup
from .step_cost import CostModel


def one_state_each(group: LayoutGroup) -> Iterator[LayoutGroup]:
    """The same layouts in groups with one state and one schedule each."""
    for of_state in group.by_state():
        yield from of_state.by_schedule()


class Room(NamedTuple):
    """Of a group with one state: its plainest layout, what layers may recompute, what each rank holds besides layers at
    least, a layer of the commonest kind, and how many of them more than the model has would have room at most."""

    layout: Layout
    modes: tuple[str, ...]
    held: list[Moment]
    layer: PartTotals
    spare: int


class GroupBounds:
    """Bounds of a question's groups, by what layouts cost at `prices`."""

    def __init__(self, prices: CostModel, question: Question) -> None:
        self._prices, self._question = prices, question

    def states_too_large(self, group: LayoutGroup) -> bool:
        """Whether weights, gradients and optimizer alone, of a group with one state, are more than its ranks hold."""
        room_bytes = group.base.pp * self._question.limit_bytes * (1 + ROUNDING)
        return self._prices.least_memory.state_bytes(group) > room_bytes

    def least_of_any_schedule(self, group: LayoutGroup, enough_seconds: float = math.inf) -> float | None:
        """Seconds that no layout of a group with one state is below; above `enough_seconds` any such will do. None when
        none fits.

        Schedules whose parts cost the same, and whose head is on the same rank, have one bound: with the fewest chunks,
        the most stages to share the backwards, the fewest microbatches in flight, no waits for messages, and backwards
        split if any of them splits them.
        """
        (group,) = group.by_state()  # with a base that is in this state
        alike: dict[object, list[tuple[str, int]]] = {}
        for schedule, chunks in group.pipelines:
            layout = group.base.but(schedule=schedule, virtual_stages=chunks)
            key = (self._prices.parts_like(layout), layout.stages_choose, schedule in V_SHAPED)
            alike.setdefault(key, []).append((schedule, chunks))
        of_all = (replace(group, pipelines=tuple(pipelines)) for pipelines in alike.values())
        return min(
            (one for one in (self._least(each, enough_seconds, waits=False) for each in of_all) if one), default=None
        )

    def least_of_one_state(self, group: LayoutGroup, enough_seconds: float = math.inf) -> float | None:
        """The same of a group with one state and schedule, whose waits for messages are known."""
        return self._least(group, enough_seconds, waits=True)

    def _least(self, group: LayoutGroup, enough_seconds: float, waits: bool) -> float | None:
        # Bytes first: they take a fraction of what seconds do, and rule out most groups where memory is short.
        room = self.room(group)
        if room is None:
            return None
        prices, limit = self._prices, self._question.limit_bytes
        fewest = prices.price_seconds(room.layout, waits=waits, pace=prices.least_pace(group))
        around = heads_and_tails(fewest)
        least = any_chunks_seconds(fewest, around, max(chunks for _, chunks in group.pipelines), room.modes)
        if least > enough_seconds:
            return least
        dealt = any_chunks_dealt(fewest, around, room.held, room.layer, limit, room.modes, enough_seconds)
        return None if dealt is None else max(least, dealt)

    def room(self, group: LayoutGroup) -> Room | None:
        """Of a group with one state, whose schedules have the head on the same rank. None where none of its layouts has
        room for its layers."""
        rules, slack, base = self._question.rules, self._prices.slack, group.base
        schedules = dict.fromkeys(schedule for schedule, _ in group.pipelines)
        modes = {mode: None for one in schedules for mode in recompute_modes(base.but(schedule=one), rules)}
        plainest = max(schedules, key=SPLIT_BACKWARD.__contains__)
        layout = base.but(schedule=plainest, virtual_stages=min(chunks for _, chunks in group.pipelines))
        pipeline = layout.pipeline(layout.microbatches(self._question.job.global_batch))
        sizes = self._prices.least_memory.part_bytes(group)
        flights = least_of_any(group.pipelines, base.pp, pipeline.microbatches)
        held = held_by_ends(flights, pipeline.rank_of(pipeline.stages - 1), sizes, slack)
        spare = layers_held(sizes.layer, held, self._question.limit_bytes, slack, tuple(modes)) - sizes.layers
        return Room(layout, tuple(modes), held, sizes.layer, spare) if spare >= 0 else None
