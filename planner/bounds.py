"""Closed-form lower bounds of a layout: seconds that no assignment can beat, and whether any can fit.

[Note: The bound]
Every path of the schedule is at most the step (`simulation.known_paths`). Two kinds of bound come of it.

*One segment, GPipe or 1F1B.* For stage s with n layers that recompute for R seconds, two paths hold whatever
the other stages do:

    round trip   W + (M-1)·b_s(n) + late_s·f_s(n) + M·R + (2(p-1) + blocked_s)·send + o_s(n)
    own work     e_f·[s>0] + M·(f_s(n) + b_s(n)) + M·R + (s + blocked_s)·send + reduce_s(n) + o_s(n)

W is one microbatch through the whole model without recomputation and with the first gathers of weights
(GPipe: of stage s alone), late_s the forwards that stage s runs after its first backward, blocked_s the
sends it waits for, o_s its optimizer. Memory gives the least R for each n. The larger of the two, c_s(n),
rises with n, so the least possible maximum over the stages with Σ n = layers is found by giving one layer at
a time to the stage where it costs least: exact for this relaxation, and the split it ends with is a good
first assignment.

*Chunks, several segments, split backward.* Rank r cannot start before the stages above its first have run a
forward, each with a layer at least, nor (where the backward is whole) end before they have run a backward; between
it works M microbatches on all it holds. The work of all ranks is the model's, so the least maximum is that of water
poured over the ranks' heads and tails; recomputation counts only where every layer must.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .layout_costs import Blocks, LayoutCosts, StageCount
from .part_seconds import PartSeconds
from .schedule import SPLIT_BACKWARD
from .simulation import blocked_sends, late_forwards

ROUNDING = 1e-9  # relative: sums of bytes in another order differ by less


@dataclass(frozen=True)
class Bound:
    """No assignment of the layout is faster than `seconds`; `counts` is a good first assignment."""

    seconds: float
    counts: tuple[StageCount, ...]


def lower_bound(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> Bound | None:
    """The bound above, or None when no assignment fits `limit_bytes`; `modes` are what a layer may recompute."""
    simple = costs.layout.virtual_stages == 1 and costs.layout.schedule in ("gpipe", "1f1b")
    if simple and len(costs.segments) == 1:
        return _bound_by_stages(costs, limit_bytes, modes)
    return _bound_by_ranks(costs, limit_bytes, modes)


def fits(costs: LayoutCosts, counts: Sequence[StageCount], limit_bytes: float) -> bool:
    """Whether every rank stays within the limit, up to the rounding of a sum."""
    return all(memory.total <= limit_bytes * (1 + ROUNDING) for memory in costs.memory(counts))


def empty_counts(costs: LayoutCosts) -> list[StageCount]:
    """An assignment without any layer."""
    return [tuple(Blocks() for _ in costs.segments)] * costs.layout.stages


# ---- one segment, one stage a rank -----------------------------------------------------------------------


class StageLimits:
    """What one stage allows: the least seconds that its layers must spend on recomputation to fit."""

    def __init__(
        self, costs: LayoutCosts, rank: int, empty_bytes: float, limit_bytes: float, modes: Sequence[str]
    ) -> None:
        slack = 1.0 + costs.allocator_slack
        segment, flight = costs.segments[0], costs.in_flight[rank][0].full[0]
        # A sum that rounds to a hair above the limit fits, here as in `fits`.
        self._free = limit_bytes * (1 + ROUNDING) - empty_bytes
        self._options = [
            (
                segment.seconds.recompute(mode).total,
                slack * (segment.memory.state.total + segment.memory.held_by(mode).total * flight),
                mode,
            )
            for mode in modes
        ]
        # Of modes that cost the same the one that keeps most comes first; those that save nothing are never needed.
        self._options.sort(key=lambda option: (option[0], -option[1]))
        kept = [self._options[0]] if self._options else []
        for option in self._options[1:]:
            if option[1] < kept[-1][1]:
                kept.append(option)
        self._options = kept

    def least(self, layers: int) -> tuple[Blocks, float] | None:
        """(modes, seconds) of `layers` layers: seconds that no fitting choice is below; None when none fits."""
        if not self._options:
            return None
        cheap_seconds, cheap_bytes, cheap = self._options[0]
        missing = layers * cheap_bytes - self._free
        if missing <= 0:
            return Blocks(**{cheap: layers}), layers * cheap_seconds
        best: tuple[Blocks, float] | None = None
        for seconds, size, mode in self._options[1:]:
            # Of each dearer mode alone so many that the rest may stay cheap.
            needed = math.ceil(missing / (cheap_bytes - size))
            if needed <= layers:
                spent = needed * seconds + (layers - needed) * cheap_seconds
                if best is None or spent < best[1]:
                    best = (Blocks(**{cheap: layers - needed, mode: needed}), spent)
        if best is None:
            return self._mixed(layers)
        if len(self._options) > 2:
            return best[0], min(best[1], self._relaxed(layers, missing))
        return best

    def _mixed(self, layers: int) -> tuple[Blocks, float] | None:
        """Where a dearer mode alone does not save enough: the two dearest mixed."""
        if len(self._options) < 2:
            return None
        (first_seconds, first_bytes, first), (last_seconds, last_bytes, last) = self._options[-2:]
        missing = layers * first_bytes - self._free
        needed = max(0, math.ceil(missing / (first_bytes - last_bytes)))
        if needed > layers:
            return None
        modes = {first: layers - needed, last: needed}
        relaxed = self._relaxed(layers, layers * self._options[0][1] - self._free)
        return Blocks(**modes), min(needed * last_seconds + (layers - needed) * first_seconds, relaxed)

    def _relaxed(self, layers: int, missing: float) -> float:
        """The least seconds with fractions of layers: along the lower hull of (bytes saved, seconds)."""
        base_seconds, base_bytes, _ = self._options[0]
        points = [(base_bytes - size, seconds - base_seconds) for seconds, size, _ in self._options]
        each = missing / layers if layers else 0.0
        least = float("inf")
        for saved, spent in points:
            for more, dearer in points:
                if saved <= each <= more and more > saved:
                    least = min(least, spent + (each - saved) / (more - saved) * (dearer - spent))
        return layers * (base_seconds + least)


def _bound_by_stages(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> Bound | None:
    stages, layers, count = costs.layout.pp, costs.layers, costs.microbatches
    layer = costs.segments[0].seconds
    ends = [costs.microbatch] * stages  # the stages between first and last are alike
    ends[0], ends[-1] = costs.ends_seconds(0), costs.ends_seconds(stages - 1)
    forward, backward = layer.forward.total, layer.backward.total
    whole = sum(e.forward.total + e.backward.total for e in ends) + layers * (forward + backward)
    gathers = sum(e.gather.total for e in ends) + layers * layer.gather.total
    nothing = empty_counts(costs)
    edges = {r: costs.rank_memory(r, nothing).total for r in {0, min(1, stages - 1), stages - 1}}
    middle = edges[min(1, stages - 1)]
    limits = [StageLimits(costs, r, edges.get(r, middle), limit_bytes, modes) for r in range(stages)]
    schedule, send = costs.layout.schedule, costs.send_seconds
    late = [late_forwards(schedule, s, stages, count) for s in range(stages)]
    blocked = [send * blocked_sends(schedule, s, stages, count) for s in range(stages)]
    first_forward = ends[0].forward.total

    def cost(stage: int, blocks: int, recompute_seconds: float) -> float:
        end = ends[stage]
        f = end.forward.total + blocks * forward
        b = end.backward.total + blocks * backward
        update = end.optimizer.total + blocks * layer.optimizer.total
        gather = end.gather.total + blocks * layer.gather.total
        trip = whole + (gathers if schedule == "1f1b" else gather)
        trip += (count - 1) * b + late[stage] * f + 2 * (stages - 1) * send + ends[0].reduce.total
        own = count * (f + b) + end.reduce.total + blocks * layer.reduce.total
        own += gather
        own += first_forward + stage * send if stage else 0.0
        return max(trip, own) + blocked[stage] + count * recompute_seconds + update

    counts = [0] * stages
    chosen = [Blocks()] * stages
    heap: list[tuple[float, int, Blocks]] = []

    def offer(stage: int) -> None:
        found = limits[stage].least(counts[stage] + 1)
        if found is not None:
            seconds = cost(stage, counts[stage] + 1, found[1])
            heapq.heappush(heap, (seconds, stage, found[0]))

    most, given = 0.0, 0
    for stage in range(stages):
        needed = 1 if 0 < stage < stages - 1 else 0
        found = limits[stage].least(needed)
        if found is None:
            return None
        counts[stage], chosen[stage] = needed, found[0]
        given += needed
        most = max(most, cost(stage, needed, found[1]))
        offer(stage)
    if given > layers:
        return None
    while given < layers:
        if not heap:
            return None
        seconds, stage, blocks = heapq.heappop(heap)
        most = max(most, seconds)
        counts[stage] += 1
        chosen[stage] = blocks
        given += 1
        offer(stage)
    return Bound(most + costs.step_seconds, tuple((blocks,) for blocks in chosen))


# ---- any pipeline ----------------------------------------------------------------------------------------


def _bound_by_ranks(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> Bound | None:
    layout, count = costs.layout, costs.microbatches
    if not modes or not _room_for_all(costs, limit_bytes, modes):
        return None
    whole = sum((costs.ends_seconds(s) for s in range(layout.stages)), PartSeconds())
    for segment in costs.segments:
        whole = whole + segment.seconds * segment.layers
    least = {mode: min(s.seconds.recompute(mode).total for s in costs.segments) for mode in modes}
    again = costs.layers * min(least.values())
    work = count * (whole.forward.total + whole.backward.total + again) + whole.gather.total
    heads, tails = _heads_and_tails(costs)
    seconds = max(
        _least_maximum([head + tail for head, tail in zip(heads, tails, strict=True)], work),
        _least_maximum(heads, work + whole.reduce.total),
    )
    seconds += whole.optimizer.total / layout.pp + costs.step_seconds
    return Bound(seconds, balanced_assignment(costs, limit_bytes, modes))


def _heads_and_tails(costs: LayoutCosts) -> tuple[list[float], list[float]]:
    """What passes before and after rank r works: the forwards down to its first stage, the backwards up from it."""
    each = min(s.seconds.forward.total for s in costs.segments) + costs.microbatch.forward.total
    back = min(s.seconds.backward.total for s in costs.segments) + costs.microbatch.backward.total
    first, send = costs.ends_seconds(0), costs.send_seconds
    ranks = range(1, costs.layout.pp)
    heads = [0.0] + [first.forward.total + (rank - 1) * each + rank * send for rank in ranks]
    if costs.layout.schedule in SPLIT_BACKWARD:
        return heads, [0.0] * len(heads)
    return heads, [0.0] + [first.backward.total + (rank - 1) * back + rank * send for rank in ranks]


def _least_maximum(heights: Sequence[float], volume: float) -> float:
    """The level of `volume` poured over floors of these heights: no way to share it has a lower maximum."""
    floors = sorted(heights)
    total = 0.0
    for number, height in enumerate(floors, start=1):
        total += height
        level = (total + volume) / number
        if number == len(floors) or level <= floors[number]:
            return max(level, floors[-1])
    raise AssertionError("there is a rank")


def _room_for_all(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> bool:
    """Necessary for any assignment: every rank holds its ends, and together they have room for all layers."""
    slack, nothing = 1.0 + costs.allocator_slack, empty_counts(costs)
    room = 0
    for rank in range(costs.layout.pp):
        free = limit_bytes * (1 + ROUNDING) - costs.rank_memory(rank, nothing).total
        if free < 0:
            return False
        flight = max(min(vector.full) for vector in costs.in_flight[rank])
        least = min(
            slack * (s.memory.state.total + flight * s.memory.held_by(mode).total)
            for s in costs.segments
            for mode in modes
        )
        room += math.floor(free / least) if least > 0 else costs.layers
    return room >= costs.layers


def balanced_assignment(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> tuple[StageCount, ...]:
    """Layers dealt out so that all stages work equally long; each rank recomputes as little as fits, if it can fit."""
    stages = costs.layout.stages
    chain = [k for k, segment in enumerate(costs.segments) for _ in range(segment.layers)]
    each = [s.seconds.forward.total + s.seconds.backward.total for s in costs.segments]
    ends = [costs.ends_seconds(s).forward.total + costs.ends_seconds(s).backward.total for s in range(stages)]
    cuts = _even_cuts([each[k] for k in chain], ends)
    held = [[chain[a:b].count(k) for k in range(len(each))] for a, b in cuts]
    ordered = sorted(modes, key=lambda mode: max(s.seconds.recompute(mode).total for s in costs.segments))
    counts = [tuple(Blocks(**{ordered[0]: n}) for n in stage) for stage in held]
    for rank in range(costs.layout.pp):
        _recompute_until_it_fits(costs, rank, counts, limit_bytes, ordered)
    return tuple(counts)


def _even_cuts(work: Sequence[float], ends: Sequence[float]) -> list[tuple[int, int]]:
    """[first, end) of each stage: each takes layers until it has its share of what is left, one at least inside."""
    cuts, first, left = [], 0, sum(work) + sum(ends)
    for stage, end in enumerate(ends):
        remaining = len(ends) - stage
        share, taken, last = left / remaining, end, first
        needed_later = max(0, remaining - 2) if stage < len(ends) - 1 else 0
        inner = 0 < stage < len(ends) - 1
        while last < len(work) - needed_later:
            if remaining > 1 and taken + work[last] / 2 > share and not (inner and last == first):
                break
            taken += work[last]
            last += 1
        cuts.append((first, last))
        left -= taken
        first = last
    return cuts


def _recompute_until_it_fits(
    costs: LayoutCosts, rank: int, counts: list[StageCount], limit_bytes: float, modes: Sequence[str]
) -> None:
    """Layer by layer to the next dearer mode, on the rank's own stages, until its bytes fit or all are at the last."""
    for cheap, dear in zip(modes, modes[1:], strict=False):
        for stage in costs.layout.stages_of(rank):
            for k in range(len(costs.segments)):
                high = counts[stage][k].of(cheap)
                if not high or costs.rank_memory(rank, counts).total <= limit_bytes:
                    continue
                original = counts[stage]
                low = 0
                moved = _moved(original, k, cheap, dear, high)
                counts[stage] = moved
                if costs.rank_memory(rank, counts).total > limit_bytes:
                    continue  # all of them, and then those of the next stage
                while high - low > 1:  # the least that fits, by halving
                    middle = (low + high) // 2
                    counts[stage] = _moved(original, k, cheap, dear, middle)
                    if costs.rank_memory(rank, counts).total <= limit_bytes:
                        high = middle
                    else:
                        low = middle
                counts[stage] = _moved(original, k, cheap, dear, high)


def _moved(count: StageCount, segment: int, cheap: str, dear: str, number: int) -> StageCount:
    blocks = {mode: count[segment].of(mode) for mode in ("none", "selective", "full")}
    blocks[cheap] -= number
    blocks[dear] += number
    return (*count[:segment], Blocks(**blocks), *count[segment + 1 :])


def least_missing_bytes(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> tuple[int, float]:
    """(rank, bytes) missing on the tightest rank in the layout's best case, when nothing fits.

    With one stage a rank and all layers alike it is the least: layers go one at a time to the rank that is left with
    the most room, and a rank needs least with all its layers in one mode. Else it is that of a balanced assignment
    that recomputes all it may.
    """
    if costs.layout.virtual_stages == 1 and len(costs.segments) == 1:
        counts = _roomiest_assignment(costs, modes or ("none",))
    else:
        dearest = sorted(modes, key=lambda mode: min(s.memory.held_by(mode).total for s in costs.segments))[:1]
        counts = balanced_assignment(costs, limit_bytes, dearest or ("none",))
    missing = [memory.total - limit_bytes for memory in costs.memory(counts)]
    worst = max(range(len(missing)), key=missing.__getitem__)
    return worst, missing[worst]


def _roomiest_assignment(costs: LayoutCosts, modes: Sequence[str]) -> tuple[StageCount, ...]:
    """The assignment whose fullest rank holds least: bytes of a rank rise with its layers."""
    stages, nothing = costs.layout.pp, empty_counts(costs)

    def least(stage: int, layers: int) -> tuple[float, StageCount]:
        found = []
        for mode in modes:
            held: StageCount = (Blocks(**{mode: layers}),)
            counts = [*nothing[:stage], held, *nothing[stage + 1 :]]
            found.append((costs.rank_memory(stage, counts).total, held))
        return min(found, key=lambda option: option[0])

    numbers = [1 if 0 < stage < stages - 1 else 0 for stage in range(stages)]
    heap = [(least(stage, numbers[stage] + 1)[0], stage) for stage in range(stages)]
    heapq.heapify(heap)
    for _ in range(costs.layers - sum(numbers)):
        _, stage = heapq.heappop(heap)
        numbers[stage] += 1
        heapq.heappush(heap, (least(stage, numbers[stage] + 1)[0], stage))
    return tuple(least(stage, layers)[1] for stage, layers in enumerate(numbers))
