"""What memory allows a pipeline rank: the least seconds that its layers must spend on recomputation to fit."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .gradient_moments import least_phases
from .in_flight import SUMMED, least_in_flight
from .layout_costs import Blocks, LayoutCosts, SegmentCosts, StageCount
from .memory_bytes import PartTotals

ROUNDING = 1e-9  # relative: sums of bytes or seconds in another order differ by less


def empty_counts(costs: LayoutCosts) -> list[StageCount]:
    """An assignment without any layer."""
    return [tuple(Blocks() for _ in costs.segments)] * costs.layout.stages


class Moment(NamedTuple):
    """Bytes of a rank's ends, and what any layer has at the same time: microbatches in flight, gradients' phase.

    `held` has the microbatches in flight of those chunks that hold a layer whatever the cuts ([Note: Certain layers]).
    """

    used_bytes: float
    flight: int
    phase: str = SUMMED
    held: tuple[int, ...] = ()


class NoLimit:
    """A rank without a limit of memory: every layer recomputes as little as any mode does."""

    def __init__(self, segment: SegmentCosts, modes: Sequence[str]) -> None:
        self._least = min(segment.seconds.recompute(mode).total for mode in modes)

    def least_recompute(self, layers: int) -> float | None:
        return layers * self._least


class RankLimits:
    """What one rank allows: the least seconds that its layers must spend on recomputation to fit.

    Each of the `moments` must fit. A layer has the seconds of `segment` and its bytes, or those of `size`.
    """

    def __init__(
        self,
        costs: LayoutCosts,
        segment: SegmentCosts,
        moments: Sequence[Moment],
        limit_bytes: float,
        modes: Sequence[str],
        size: PartTotals | None = None,
    ) -> None:
        slack, totals = 1.0 + costs.allocator_slack, size or segment.memory.totals
        seconds = {mode: segment.seconds.recompute(mode).total for mode in modes}

        def bytes_by_mode(flight: int, phase: str) -> dict[str, float]:
            gradients = totals.gradients[phase]
            return {mode: slack * (totals.state + flight * totals.held[mode] + gradients[mode]) for mode in modes}

        self._found: dict[int, float | None] = {}
        self._moments: list[_Room] = []
        for used, flight, phase, held in moments:
            each = bytes_by_mode(flight, phase)
            quick, *dear = sorted(modes, key=lambda mode: (seconds[mode], each[mode]))
            certain = [bytes_by_mode(own, phase) for own in held]
            savings = []
            for mode in reversed(dear):
                least = max(0.0, each[quick] - each[mode])
                own = sorted((max(least, one[quick] - one[mode]) for one in certain), reverse=True)
                savings.append(_Mode(seconds[mode] - seconds[quick], least, tuple(accumulate(own, initial=0.0))))
            kept = [one for one in savings if one.each > 0 or one.certain[-1] > 0]
            certain_bytes = sum(one[quick] for one in certain)
            self._moments.append(_Room(limit_bytes - used, seconds[quick], each[quick], len(held), certain_bytes, kept))

    def least_recompute(self, layers: int) -> float | None:
        """Seconds a microbatch that no fitting choice of modes is below; None when no choice fits."""
        if layers not in self._found:  # ranks that hold the same besides their layers share this
            self._found[layers] = self._least_recompute(layers)
        return self._found[layers]

    def _least_recompute(self, layers: int) -> float | None:
        most = 0.0
        for room in self._moments:
            least = room.least_recompute(layers)
            if least == math.inf:
                return None
            most = max(most, least)
        return most


class _Mode(NamedTuple):
    """A dearer mode than the quickest: seconds more a layer, bytes less, and of the certain layers, which save no less
    each, those of the n that save most."""

    seconds: float
    each: float
    certain: tuple[float, ...]

    def saved(self, layers: int) -> float:
        """Bytes less at most with so many layers in this mode."""
        known = min(layers, len(self.certain) - 1)
        return self.certain[known] + (layers - known) * self.each

    def needed(self, missing: float) -> int:
        """The fewest layers that may save so much; as good as infinitely many where none do."""
        known = bisect_left(self.certain, missing)
        if known < len(self.certain):
            return known
        if self.each == 0:
            return sys.maxsize
        return known - 1 + math.ceil((missing - self.certain[-1]) / self.each)


class _Room(NamedTuple):
    """A moment of a rank: free bytes; seconds and bytes of a layer in the quickest mode; how many layers are certain,
    their bytes, and the dearer modes, dearest first."""

    free: float
    seconds: float
    each: float
    certain: int
    certain_bytes: float
    dearer: list[_Mode]

    def least_recompute(self, layers: int) -> float:
        """[Note: Certain layers]
        Between the first and the last stage none is empty, so of a rank's n layers some lie in chunks that are known,
        with those chunks' microbatches in flight; the others have the fewest of any chunk at the moment. That is never
        more bytes than the truth, in any mode. What k layers in a mode save is at most the k largest savings of
        that mode, so the least seconds over k of each mode whose savings reach what is missing are a lower bound: exact
        where all layers of the rank have as many microbatches in flight.
        """
        if self.free < 0:
            return math.inf
        number = max(layers, self.certain)  # the rank has no fewer
        missing = self.certain_bytes + (number - self.certain) * self.each - self.free
        return number * self.seconds + _least_more(missing, self.dearer, number)


def _least_more(missing: float, dearer: Sequence[_Mode], layers: int) -> float:
    """Seconds beyond those of the quickest mode; infinite where nothing saves so much."""
    if missing <= 0:
        return 0.0
    if not dearer:
        return math.inf
    mode, others = dearer[0], dearer[1:]
    most = mode.needed(missing)
    least = most * mode.seconds if most <= layers else math.inf
    most_of_others = sum(other.saved(layers) for other in others)
    for number in range(min(most - 1, layers), -1, -1):
        rest = missing - mode.saved(number)
        if rest > most_of_others:
            break
        least = min(least, number * mode.seconds + _least_more(rest, others, layers - number))
    return least


def layers_held(
    size: PartTotals, held: Sequence[Moment], limit_bytes: float, slack: float, modes: Sequence[str]
) -> int:
    """Layers of this size that ranks have room for, in the smallest of their modes; -1 where ends alone are too much.

    `held` has a moment of each rank. Where this is less than there are to place, `RankLimits` with these moments cannot
    place them either.
    """
    number = 0
    limit = limit_bytes * (1 + ROUNDING)
    for used, flight, phase, _ in held:
        if used > limit:
            return -1
        gradients = size.gradients[phase]
        each = slack * (size.state + min(flight * size.held[mode] + gradients[mode] for mode in modes))
        if each <= 0:
            return sys.maxsize
        number += int((limit - used) / each * (1 + ROUNDING))
    return number


def certain_chunks(costs: LayoutCosts, segment: SegmentCosts) -> list[list[int]]:
    """Of each rank, the chunks that hold a layer of the segment whatever the cuts.

    Stages between the first and the last are never empty: of stage s, s - 1 layers at least are before it and S - 2 - s
    after it. Those that are left for it are all of the segment, or it is not certain.
    """
    place = costs.segments.index(segment)
    before = sum(other.layers for other in costs.segments[:place])
    after = sum(other.layers for other in costs.segments[place + 1 :])
    stages = range(before + 1, costs.layout.stages - 1 - after)
    return [[c for c, s in enumerate(costs.layout.stages_of(r)) if s in stages] for r in range(costs.layout.pp)]


def _moments(
    costs: LayoutCosts, rank: int, least_flight: int, phase: str, used: Sequence[float], certain: Sequence[int]
) -> Sequence[Moment]:
    """Those of a rank that matter, with the bytes `used` at all or each; `phase` is of its chunks at all of them, where
    moments have none of their own."""
    if len(used) == 1 and costs.layout.virtual_stages == 1:
        return [Moment(used[0], least_flight, phase)]
    vectors = costs.in_flight[rank]
    every = used if len(used) > 1 else [*used] * len(vectors)
    found = {
        Moment(
            bytes_,
            min(vector.full),
            least_phases(((vector,),))[0] if vector.gradients else phase,
            tuple(sorted(vector.full[chunk] for chunk in certain)),
        )
        for bytes_, vector in zip(every, vectors, strict=True)
    }
    kept: list[Moment] = []
    # What one is within comes before it so, and is kept or within another that is.
    for one in sorted(found, key=lambda one: (one.used_bytes, one.flight, sum(one.held), one.phase), reverse=True):
        if not any(_within(one, other) for other in kept):
            kept.append(one)
    return kept


def _within(one: Moment, other: Moment) -> bool:
    """Whether whatever fits at the other moment fits at this one."""
    less = one.used_bytes <= other.used_bytes and one.flight <= other.flight and one.phase == other.phase
    return less and all(a <= b for a, b in zip(one.held, other.held, strict=True))


def rank_limits(
    costs: LayoutCosts, segment: SegmentCosts, limit_bytes: float, modes: Sequence[str]
) -> Sequence[RankLimits | NoLimit]:
    """Of every rank, for its layers of the segment; an infinite limit has no bytes looked at."""
    pp = costs.layout.pp
    if limit_bytes == math.inf:
        return [NoLimit(segment, modes)] * pp
    # A sum that rounds to a hair above the limit fits, here as in `fits`.
    limit, flights = limit_bytes * (1 + ROUNDING), least_in_flight(costs.pipeline)
    phases, certain = least_phases(costs.in_flight), certain_chunks(costs, segment)
    ends = {0, costs.last_rank, pp - 1}
    # The ranks between the first and the last hold the same besides their layers.
    between = [max(costs.end_moment_bytes(1))] if pp > 2 else []
    limits: dict[tuple[Moment, ...], RankLimits] = {}
    found = []
    for rank in range(pp):
        used = costs.end_moment_bytes(rank) if rank in ends else between
        key = tuple(_moments(costs, rank, flights[rank], phases[rank], used, certain[rank]))
        if key not in limits:
            limits[key] = RankLimits(costs, segment, key, limit, modes)
        found.append(limits[key])
    return found
