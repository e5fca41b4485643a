"""Bounds of layouts in groups: those that share degrees and state, whatever their schedules and chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from .bounds import Around, any_chunks_dealt, any_chunks_seconds, heads_and_tails, held_by_ends
from .in_flight import least_of_any
from .layout import Layout
from .layout_costs import LayoutCosts
from .memory_bytes import PartTotals
from .question import Question
from .rank_limits import ROUNDING, Moment, layers_held
from .rules import recompute_modes
from .schedule import SPLIT_BACKWARD, V_SHAPED
from .space import LayoutGroup, pipelines_by_schedule
from .step_cost import CostModel


def one_state_each(group: LayoutGroup) -> Iterator[LayoutGroup]:
    """The same layouts in groups with one state and one schedule each."""
    for of_state in group.by_state():
        yield from of_state.by_schedule()


class Room(NamedTuple):
    """Of layouts with one state: what each rank holds besides layers at least, a layer of the commonest kind, and how
    many of them more than the model has would have room at most."""

    held: list[Moment]
    layer: PartTotals
    spare: int


class _Schedule(NamedTuple):
    """Of a group with one state: its layout with the fewest chunks, the most, and all its (schedule, chunks)."""

    layout: Layout
    most_chunks: int
    pipelines: tuple[tuple[str, int], ...]


class Alike(NamedTuple):
    """Layouts of one state under schedules whose parts cost the same and whose head is on the same rank, with seconds
    that none of them is below whatever its bytes. `costs` are those of the plainest, with the fewest chunks; `room` is
    None where bytes have not been looked at."""

    group: LayoutGroup
    schedules: Sequence[_Schedule]
    costs: LayoutCosts
    around: Around
    modes: tuple[str, ...]
    least_seconds: float
    room: Room | None


class GroupBounds:
    """Bounds of a question's groups, by what layouts cost at `prices`."""

    def __init__(self, prices: CostModel, question: Question) -> None:
        self._prices, self._question = prices, question
        self._modes: dict[str, tuple[str, ...]] = {}  # what layers may recompute by schedule, all that it depends on
        self._looked_at = self._too_large = 1  # for bytes, and those of them without room

    def states_too_large(self, group: LayoutGroup) -> bool:
        """Whether weights, gradients and optimizer alone, of a group with one state, are more than its ranks hold."""
        room_bytes = group.base.pp * self._question.limit_bytes * (1 + ROUNDING)
        return self._prices.least_memory.state_bytes(group) > room_bytes

    def alike(self, group: LayoutGroup) -> list[Alike]:
        """The layouts of a group with one state, less some that have no room for their layers.

        One bound holds for all that are alike: with the fewest chunks, the most stages to share the backwards, the
        fewest microbatches in flight, no waits for messages, and backwards split if any of them splits them.
        """
        (group,) = group.by_state()  # with a base that is in this state
        found: dict[object, list[_Schedule]] = {}
        for one in _schedules(group):
            key = (self._prices.parts_like(one.layout), one.layout.stages_choose, one.layout.schedule in V_SHAPED)
            found.setdefault(key, []).append(one)
        each = (self._seconds(group, schedules, waits=False) for schedules in found.values())
        return [one for one in each if one is not None]

    def least_of(self, alike: Alike, enough_seconds: float = math.inf) -> float | None:
        """Seconds that none of these layouts is below, whose bytes are looked at; above `enough_seconds` any such will
        do. None when none fits."""
        if alike.least_seconds > enough_seconds:
            return alike.least_seconds
        room = alike.room or self._room(alike.schedules, alike.modes)
        if room is None:
            return None
        limit = self._question.limit_bytes
        dealt = any_chunks_dealt(alike.costs, alike.around, room.held, room.layer, limit, alike.modes, enough_seconds)
        return None if dealt is None else max(alike.least_seconds, dealt)

    def least_of_one_state(self, group: LayoutGroup, enough_seconds: float = math.inf) -> float | None:
        """The same of a group with one state and schedule, whose waits for messages are known."""
        alike = self._seconds(group, _schedules(group), waits=True)
        return None if alike is None else self.least_of(alike, enough_seconds)

    def least_of_layout(self, layout: Layout, enough_seconds: float = math.inf) -> float | None:
        """The same of one layout, which takes a fraction of what its price does."""
        state = (layout.zero, layout.dp_shard, layout.ep, layout.etp)
        one = LayoutGroup(layout, ((layout.schedule, layout.virtual_stages),), (state,))
        return self.least_of_one_state(one, enough_seconds)

    def room(self, group: LayoutGroup) -> tuple[Layout, Room] | None:
        """The plainest layout of a group with one state and schedule; None where none has room for its layers."""
        (one,) = _schedules(group)
        room = self._room([one], self._modes_of([one]))
        return None if room is None else (one.layout, room)

    def _seconds(self, group: LayoutGroup, schedules: Sequence[_Schedule], waits: bool) -> Alike | None:
        """Bytes come first where most that were looked at had no room: they take less time than seconds."""
        modes, room = self._modes_of(schedules), None
        if 2 * self._too_large > self._looked_at:
            room = self._room(schedules, modes)
            if room is None:
                return None
        prices = self._prices
        costs = prices.price_seconds(_plainest(schedules), waits=waits, pace=prices.least_pace(group))
        around = heads_and_tails(costs)
        least = any_chunks_seconds(costs, around, max(one.most_chunks for one in schedules), modes)
        pipelines = tuple(pipeline for one in schedules for pipeline in one.pipelines)
        return Alike(replace(group, pipelines=pipelines), schedules, costs, around, modes, least, room)

    def _room(self, schedules: Sequence[_Schedule], modes: Sequence[str]) -> Room | None:
        """Of layouts that are alike but for schedule and chunks, with the head on the same rank."""
        layout, slack = _plainest(schedules), self._prices.slack
        pipeline = layout.pipeline(layout.microbatches(self._question.job.global_batch))
        sizes = self._prices.least_memory.part_bytes([(one.layout, one.most_chunks) for one in schedules])
        every = tuple(pipeline for one in schedules for pipeline in one.pipelines)
        flights = least_of_any(every, layout.pp, pipeline.microbatches)
        held = held_by_ends(flights, pipeline.rank_of(pipeline.stages - 1), sizes, slack)
        spare = layers_held(sizes.layer, held, self._question.limit_bytes, slack, modes) - sizes.layers
        self._looked_at += 1
        self._too_large += spare < 0
        return Room(held, sizes.layer, spare) if spare >= 0 else None

    def _modes_of(self, schedules: Sequence[_Schedule]) -> tuple[str, ...]:
        """What layers may recompute under any of them."""
        for one in schedules:
            if one.layout.schedule not in self._modes:
                self._modes[one.layout.schedule] = recompute_modes(one.layout, self._question.rules)
        return tuple(dict.fromkeys(mode for one in schedules for mode in self._modes[one.layout.schedule]))


def _schedules(group: LayoutGroup) -> list[_Schedule]:
    """Of a group with one state."""
    base, found = group.base, list[_Schedule]()
    for pipelines in pipelines_by_schedule(group.pipelines):
        (schedule, fewest), (_, most) = pipelines[0], pipelines[-1]
        found.append(_Schedule(base.but(schedule=schedule, virtual_stages=fewest), most, pipelines))
    return found


def _plainest(schedules: Sequence[_Schedule]) -> Layout:
    """The layout that is bounded for all of them."""
    layout = max((one.layout for one in schedules), key=lambda layout: layout.schedule in SPLIT_BACKWARD)
    return layout.but(virtual_stages=min(one.layout.virtual_stages for one in schedules))
