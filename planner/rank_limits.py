"""What memory allows a pipeline rank: the least seconds that its layers must spend on recomputation to fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .in_flight import SUMMED, least_in_flight, least_phases
from .layout_costs import Blocks, LayoutCosts, SegmentCosts, StageCount
from .memory_bytes import PartMemory

ROUNDING = 1e-9  # relative: sums of bytes in another order differ by less


def empty_counts(costs: LayoutCosts) -> list[StageCount]:
    """An assignment without any layer."""
    return [tuple(Blocks() for _ in costs.segments)] * costs.layout.stages


class Moment(NamedTuple):
    """Bytes of a rank's ends, and what any layer has at the same time: microbatches in flight, gradients' phase."""

    used_bytes: float
    flight: int
    phase: str = SUMMED


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
        size: PartMemory | None = None,
    ) -> None:
        slack = 1.0 + costs.allocator_slack
        totals = (size or segment.memory).totals
        self._moments: list[tuple[float, list[tuple[float, float]]]] = []
        for used, flight, phase in moments:
            options = sorted(
                (
                    segment.seconds.recompute(mode).total,
                    slack * (totals.state + flight * totals.held[mode] + totals.gradients[phase][mode]),
                )
                for mode in modes
            )
            # Modes that cost more and save nothing are never needed.
            kept = options[:1]
            for option in options[1:]:
                if option[1] < kept[-1][1]:
                    kept.append(option)
            self._moments.append((limit_bytes - used, kept))

    def least_recompute(self, layers: int) -> float | None:
        """Seconds a microbatch that no fitting choice of modes is below; None when no choice fits."""
        most = 0.0
        for free, options in self._moments:
            least = _least_recompute(layers, free, options)
            if least is None:
                return None
            most = max(most, least)
        return most


def _least_recompute(layers: int, free: float, options: Sequence[tuple[float, float]]) -> float | None:
    """The same at one moment; `options` are (seconds, bytes) of a layer by mode, dearer and smaller."""
    if free < 0:
        return None
    if layers == 0:
        return 0.0
    base_seconds, base_bytes = options[0]
    missing = layers * base_bytes - free
    if missing <= 0:
        return layers * base_seconds
    if len(options) == 2:
        seconds, size = options[1]
        needed = math.ceil(missing / (base_bytes - size))
        return None if needed > layers else needed * seconds + (layers - needed) * base_seconds
    # Fractions of layers, along the lower hull of (bytes saved, seconds).
    each, least = missing / layers, math.inf
    points = [(base_bytes - size, seconds - base_seconds) for seconds, size in options]
    for saved, spent in points:
        for more, dearer in points:
            if saved < each <= more:
                least = min(least, spent + (each - saved) / (more - saved) * (dearer - spent))
    return None if least == math.inf else layers * (base_seconds + least)


def layers_held(
    size: PartMemory, held: Sequence[Moment], limit_bytes: float, slack: float, modes: Sequence[str]
) -> int:
    """Layers of this size that ranks have room for, in the smallest of their modes; -1 where ends alone are too much.

    `held` has a moment of each rank. Where this is less than there are to place, `RankLimits` with these moments cannot
    place them either.
    """
    totals, number = size.totals, 0
    limit = limit_bytes * (1 + ROUNDING)
    for used, flight, phase in held:
        if used > limit:
            return -1
        gradients = totals.gradients[phase]
        each = slack * (totals.state + min(flight * totals.held[mode] + gradients[mode] for mode in modes))
        if each <= 0:
            return sys.maxsize
        number += int((limit - used) / each * (1 + ROUNDING))
    return number


def _moments(costs: LayoutCosts, rank: int, least_flight: int, phase: str) -> list[Moment]:
    """Those of a rank that matter; `phase` is the one of its chunks at all of them, unless each moment has its own."""
    used = costs.end_moment_bytes(rank)
    if len(used) == 1:
        return [Moment(used[0], least_flight, phase)]
    flights = [min(vector.full) for vector in costs.in_flight[rank]]
    if costs.in_flight[rank][0].gradients:
        phases = [least_phases(((vector,),))[0] for vector in costs.in_flight[rank]]
        return list(map(Moment, used, flights, phases))
    found = {Moment(bytes_, flight, phase) for bytes_, flight in zip(used, flights, strict=True)}
    return [one for one in found if not any(one != o and one[0] <= o[0] and one[1] <= o[1] for o in found)]


def rank_limits(
    costs: LayoutCosts, segment: SegmentCosts, limit_bytes: float, modes: Sequence[str]
) -> Sequence[RankLimits | NoLimit]:
    """Of every rank, for its layers of the segment; an infinite limit has no bytes looked at."""
    pp = costs.layout.pp
    if limit_bytes == math.inf:
        return [NoLimit(segment, modes)] * pp
    # A sum that rounds to a hair above the limit fits, here as in `fits`.
    limit, flights = limit_bytes * (1 + ROUNDING), least_in_flight(costs.pipeline)
    phases = least_phases(costs.in_flight)
    ends = {
        rank: RankLimits(costs, segment, _moments(costs, rank, flights[rank], phases[rank]), limit, modes)
        for rank in {0, costs.last_rank, pp - 1}
    }
    if pp <= 2:
        return [ends[rank] for rank in range(pp)]
    # The ranks between the first and the last hold the same besides their layers.
    used = max(costs.end_moment_bytes(1))
    held = list(zip(flights, phases, strict=True))
    between = {one: RankLimits(costs, segment, [Moment(used, *one)], limit, modes) for one in set(held[1:-1])}
    return [ends.get(rank) or between[held[rank]] for rank in range(pp)]
