"""Closed-form lower bounds of a layout: seconds that no assignment can beat, and whether any can fit.

[Note: The bound]
Every path of the schedule is at most the step (`simulation.known_paths`). Let rank r hold n layers that recompute for R
seconds in all, f and b its forward and backward of one microbatch, o its optimizer. Whatever the others do,

    own work     head_r + M·(f(n) + b(n) + R) + reduce_r(n) + o_r(n)
    and back     head_r + M·(f(n) + b(n) + R) + tail_r + o_r(n)
    backwards    W_r + M·(b(n) + R) + max(tail_r, reduce_r(n)) + o_r(n)

head_r is the forwards above its first stage, tail_r, where the backward is whole, the backwards up from it, each of
those stages with a layer at least. Of GPipe and 1F1B, with a stage a rank and layers of one kind, more is known:

    round trip   W + (M-1)·b(n) + late_s·f(n) + M·R + 2·Σ hops + blocked_s·(hop_s-1 + hop_s) + o_s(n)

W is one microbatch through the whole model without recomputation and with the first gathers of weights
(GPipe: of stage s alone), late_s the forwards that stage s runs after its first backward, hop_s a message between s and
the next stage, blocked_s the sends to either neighbour that s waits for. Memory gives the least R for each n. The
largest, c_r(n), rises with n, so the least possible maximum over the ranks with Σ n = layers is found by giving one
layer at a time to the rank where it costs least: exact for this relaxation.

Of others a rank's known paths are looked at as they are where all else has not ruled a layout out (`path_bounds`). Of
any schedule too: one microbatch all the way, and M - 1 backwards more on the stage that has most.

Where layers are of several kinds, those of the commonest are dealt out so, the others left out; and all work poured
over the ranks' heads and tails as water, without recomputation, is a second bound.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Callable, Sequence

from .layout_costs import LayoutCosts, SegmentCosts, StageCount
from .least_memory import LeastBytes
from .memory_bytes import PartTotals
from .part_seconds import PartSeconds
from .path_bounds import seconds_of_paths
from .rank_limits import ROUNDING, Moment, NoLimit, RankLimits, certain_chunks, rank_limits
from .schedule import BLOCKING, SPLIT_BACKWARD
from .simulation import blocked_sends, late_forwards

_MANY_LAYERS = 3  # of a rank
# What passes before and after each rank works.
Around = tuple[list[float], list[float]]


def fits(costs: LayoutCosts, counts: Sequence[StageCount], limit_bytes: float) -> bool:
    """Whether every rank stays within the limit, up to the rounding of a sum."""
    return all(costs.rank_bytes(rank, counts) <= limit_bytes * (1 + ROUNDING) for rank in range(costs.layout.pp))


def lower_bound(
    costs: LayoutCosts, limit_bytes: float, modes: Sequence[str], enough_seconds: float = math.inf
) -> float | None:
    """Seconds that no assignment of the layout is below, None when none fits `limit_bytes`.

    `modes` are what a layer may recompute. Above `enough_seconds` the bound need not be the best one known. With
    an infinite limit no bytes are looked at, which is much sooner.
    """
    if not modes:
        return None
    around, split = heads_and_tails(costs), costs.layout.schedule in SPLIT_BACKWARD
    least = _one_stage(costs, modes, costs.layout.stages, split)
    if not _is_simple(costs):
        least = max(least, _poured(costs, modes, *around))
    if limit_bytes == math.inf and least + costs.step_seconds > enough_seconds:
        return least + costs.step_seconds
    commonest, cost = _commonest(costs, around)
    limits = rank_limits(costs, commonest, limit_bytes, modes)
    dealt = _deal(costs, commonest, limits, cost, enough_seconds)
    if dealt is None:
        return None
    least = max(least, dealt)
    if limit_bytes != math.inf and least + costs.step_seconds <= enough_seconds:
        least = max(least, _deal(costs, commonest, limits, _by_paths(costs, commonest), enough_seconds) or 0.0)
    return least + costs.step_seconds


def any_chunks_seconds(fewest: LayoutCosts, around: Around, most_chunks: int, modes: Sequence[str]) -> float:
    """Seconds that no layout with `most_chunks` or fewer is below. `fewest` are the costs with fewest chunks: more only
    add to every number. `around` are their heads and tails."""
    layout, split = fewest.layout, fewest.layout.schedule in SPLIT_BACKWARD
    least = _one_stage(fewest, modes, layout.pp * most_chunks, split)
    return max(_poured(fewest, modes, *around), least) + fewest.step_seconds


def held_by_ends(flights: Sequence[int], head_rank: int, sizes: LeastBytes, slack: float) -> list[Moment]:
    """A moment of each rank, of the least bytes; `slack` is what bytes are multiplied by."""
    ends = [0.0] * len(flights)
    for rank, part in ((0, sizes.embedding), (head_rank, sizes.head)):
        ends[rank] += slack * (part.state + part.gradients[sizes.phases[rank]]["none"])
    return [Moment(*one) for one in zip(ends, flights, sizes.phases, strict=True)]


def any_chunks_dealt(
    fewest: LayoutCosts,
    around: Around,
    held: Sequence[Moment],
    size: PartTotals,
    limit_bytes: float,
    modes: Sequence[str],
    enough_seconds: float = math.inf,
) -> float | None:
    """The same with layers of this `size` dealt out to ranks that have memory for them, with what `held_by_ends` says;
    None when none of these layouts fits. Above `enough_seconds` the bound need not be the best one known."""
    layout, segment = fewest.layout, largest_segment(fewest)
    of_held = {one: RankLimits(fewest, segment, [one], limit_bytes * (1 + ROUNDING), modes, size) for one in set(held)}
    limits = [of_held[one] for one in held]
    cost = _around(fewest, segment, *around, split=layout.schedule in SPLIT_BACKWARD)
    if not _has_room(segment.layers, limits, cost, enough_seconds):
        return math.nextafter(enough_seconds, math.inf) + fewest.step_seconds
    dealt = _deal(fewest, segment, limits, cost, enough_seconds)
    return None if dealt is None else dealt + fewest.step_seconds


def recompute_of_ranks(
    costs: LayoutCosts, limit_bytes: float, modes: Sequence[str], goal_seconds: float
) -> tuple[int, list[list[float]]]:
    """(segment, of each rank the least seconds a microbatch that 0, 1, … layers of it recompute). They end where with
    more layers no step is below `goal_seconds`, or none fits."""
    segment, cost = _commonest(costs, heads_and_tails(costs))
    found = []
    for rank, limit in enumerate(rank_limits(costs, segment, limit_bytes, modes)):
        seconds = [limit.least_recompute(0) or 0.0]
        while (layers := len(seconds)) <= segment.layers:
            again = limit.least_recompute(layers)
            if again is None or cost(rank, layers, again) + costs.step_seconds > goal_seconds * (1 + ROUNDING):
                break
            seconds.append(again)
        found.append(seconds)
    return costs.segments.index(segment), found


def most_layers_of_stage(costs: LayoutCosts, goal_seconds: float) -> list[int]:
    """Layers of each segment that a stage may hold: more of them alone would take longer than the goal."""
    most = []
    for segment in costs.segments:
        each = costs.microbatches * (segment.seconds.forward.total + segment.seconds.backward.total)
        allowed = (goal_seconds - costs.step_seconds) / each if each > 0 else math.inf
        most.append(segment.layers if allowed >= segment.layers else int(allowed))
    return most


def _commonest(costs: LayoutCosts, around: Around) -> tuple[SegmentCosts, RankCost]:
    """The segment with most layers, and what those cost a rank at least."""
    segment = largest_segment(costs)
    if _is_simple(costs):
        return segment, _round_trip(costs, segment)
    return segment, _around(costs, segment, *around, split=costs.layout.schedule in SPLIT_BACKWARD)


def largest_segment(costs: LayoutCosts) -> SegmentCosts:
    """The segment with most layers, whose kind bounds count as the commonest."""
    return max(costs.segments, key=lambda segment: segment.layers)


def _is_simple(costs: LayoutCosts) -> bool:
    return costs.layout.schedule in BLOCKING and len(costs.segments) == 1


# ---- dealing out layers of one kind --------------------------------------------------------------------------

# (rank, layers, seconds of recomputation a microbatch) -> seconds of the step at least
RankCost = Callable[[int, int, float], float]


def _deal(
    costs: LayoutCosts, segment: SegmentCosts, limits: Sequence[RankLimits | NoLimit], cost: RankCost, enough: float
) -> float | None:
    """The least possible maximum over the ranks, or None when the layers of the segment do not fit.

    Once it is above `enough` it may be given as it is.
    """
    layout, certain = costs.layout, [len(chunks) for chunks in certain_chunks(costs, segment)]
    heap: list[tuple[float, int]] = []
    counts, most = [0] * layout.pp, 0.0

    def offer(rank: int) -> None:
        again = limits[rank].least_recompute(counts[rank] + 1)
        if again is not None:
            heapq.heappush(heap, (cost(rank, counts[rank] + 1, again), rank))

    for rank in range(layout.pp):
        counts[rank] = certain[rank]
        again = limits[rank].least_recompute(counts[rank])
        if again is None:
            return None
        most = max(most, cost(rank, counts[rank], again))
        offer(rank)
    given = sum(counts)
    if given > segment.layers:
        return None
    while given < segment.layers:
        if not heap:
            return None
        seconds, rank = heapq.heappop(heap)
        most = max(most, seconds)
        if most > enough:
            break
        counts[rank] += 1
        given += 1
        offer(rank)
    return most


def _has_room(layers: int, limits: Sequence[RankLimits | NoLimit], cost: RankCost, enough: float) -> bool:
    """Whether ranks that each take no longer than `enough` have room for the layers; where a rank has many, sooner to
    say than how they are dealt. Without an end to the seconds, or with few layers a rank, nothing is looked at."""
    if enough == math.inf or layers < _MANY_LAYERS * len(limits):
        return True

    def has(rank: int, number: int) -> bool:
        again = limits[rank].least_recompute(number)
        return again is not None and cost(rank, number, again) <= enough

    left, most = layers, -(-layers // len(limits))
    for rank in range(len(limits)):
        most = min(most, left)
        while most > 0 and not has(rank, most):
            most -= 1
        while most < left and has(rank, most + 1):
            most += 1
        left -= most
        if left <= 0:
            return True
    return False


def _round_trip(costs: LayoutCosts, segment: SegmentCosts) -> RankCost:
    """Of GPipe and 1F1B with layers of one kind."""
    stages, count, layer = costs.layout.pp, costs.microbatches, segment.seconds
    ends = costs.stage_ends
    forward, backward = layer.forward.total, layer.backward_total
    whole = sum(e.forward.total + e.backward_total for e in ends) + segment.layers * (forward + backward)
    gathers = sum(e.gather.total for e in ends) + segment.layers * layer.gather.total
    schedule, sent = costs.layout.schedule, costs.sent_before
    trips, beside = 2 * sent[-1], list(map(operator.add, (0.0, *costs.hop_seconds), (*costs.hop_seconds, 0.0)))
    late = [late_forwards(schedule, s, stages, count) for s in range(stages)]
    blocked = [beside[s] * blocked_sends(schedule, s, stages, count) for s in range(stages)]
    first_forward = ends[0].forward.total

    def cost(stage: int, layers: int, again: float) -> float:
        end = ends[stage]
        f = end.forward.total + layers * forward
        b = end.backward_total + layers * backward
        update = end.optimizer.total + layers * layer.optimizer.total
        gather = end.gather.total + layers * layer.gather.total
        trip = whole + (gathers if schedule == "1f1b" else gather)
        trip += (count - 1) * b + late[stage] * f + trips + ends[0].reduce.total
        own = count * (f + b) + end.reduce.total + layers * layer.reduce.total
        own += gather
        own += first_forward + sent[stage] if stage else 0.0
        return max(trip, own) + blocked[stage] + count * again + update

    return cost


def _around(
    costs: LayoutCosts, segment: SegmentCosts, heads: Sequence[float], tails: Sequence[float], split: bool
) -> RankCost:
    """Of any schedule: what passes before and after a rank's own work, or before and after its backwards."""
    layout, count, layer = costs.layout, costs.microbatches, segment.seconds
    first, last, bare = costs.stage_ends[0], costs.stage_ends[-1], costs.microbatch
    plain = layout.virtual_stages * count * (bare.forward.total + bare.backward_total)
    own, reduce, update = [plain] * layout.pp, [0.0] * layout.pp, _update_of_ends(costs)
    for end, rank in ((first, 0), (last, costs.last_rank)):
        own[rank] += count * (end.forward.total + end.backward_total - bare.forward.total - bare.backward_total)
        own[rank] += end.gather.total
        reduce[rank] += end.reduce.total
    if layout.stages == 1:  # one stage is both ends, and its seconds hold both
        own, reduce = [plain + (own[0] - plain) / 2], [reduce[0] / 2]
    each = count * (layer.forward.total + layer.backward_total) + layer.gather.total
    reduce_each, update_each = layer.reduce.total, layer.optimizer.total

    before, backward_each = _to_first_backwards(costs, split), count * layer.backward_total
    backward = [layout.virtual_stages * count * bare.backward_total] * layout.pp
    for end, rank in ((costs.embedding, 0), (costs.head, costs.last_rank)):
        backward[rank] += count * end.backward_total

    def cost(rank: int, layers: int, again: float) -> float:
        after = max(tails[rank], reduce[rank] + layers * reduce_each) + update[rank] + layers * update_each
        through = heads[rank] + own[rank] + layers * each
        return max(through, before[rank] + backward[rank] + layers * backward_each) + count * again + after

    return cost


def _by_paths(costs: LayoutCosts, segment: SegmentCosts) -> RankCost:
    """Of any schedule the longest of a rank's known paths; where `_round_trip` says as much, nothing."""
    if _is_simple(costs):
        return lambda rank, layers, again: 0.0
    seconds, count, each = seconds_of_paths(costs, segment), costs.microbatches, segment.seconds.optimizer.total
    update = _update_of_ends(costs)

    def cost(rank: int, layers: int, again: float) -> float:
        return seconds(rank, layers) + count * again + update[rank] + layers * each

    return cost


def _update_of_ends(costs: LayoutCosts) -> list[float]:
    """The optimizer's seconds of embedding and head, on each rank."""
    update = [0.0] * costs.layout.pp
    for end, rank in ((costs.embedding, 0), (costs.head, costs.last_rank)):
        update[rank] += end.optimizer.total
    return update


def _to_first_backwards(costs: LayoutCosts, split: bool) -> list[float]:
    """What passes before each rank's first backward, of its deepest stage t.

    Microbatch 0's forwards through all stages, which gather their weights, and a microbatch's backwards (where they are
    split, the halves for the inputs) up from the last stage to t + 1, each inner one with a layer at least.
    """
    layout, bare, sent = costs.layout, costs.microbatch, costs.sent_before
    stages = layout.stages
    forward = stages * bare.forward.total + costs.embedding.forward.total + costs.head.forward.total + sent[-1]
    forward += costs.embedding.gather.total + costs.head.gather.total
    for segment in costs.segments:
        forward += segment.layers * (segment.seconds.forward.total + segment.seconds.gather.total)

    def back(part: PartSeconds) -> float:
        return part.backward_input.total if split else part.backward_total

    each = min(back(segment.seconds) for segment in costs.segments) + back(bare)
    pipeline, last = costs.pipeline, back(costs.head)
    below = [stages - 1 - max(pipeline.stages_of(rank)) for rank in range(layout.pp)]
    return [forward + (last + (n - 1) * each + sent[-1] - sent[-1 - n] if n else 0.0) for n in below]


# ---- heads, tails and water ----------------------------------------------------------------------------------


def heads_and_tails(costs: LayoutCosts) -> Around:
    """What passes before and after rank r works: the forwards down to its first stage, the backwards up from it."""
    each = min(s.seconds.forward.total for s in costs.segments) + costs.microbatch.forward.total
    back = min(s.seconds.backward_total for s in costs.segments) + costs.microbatch.backward_total
    first, sent = costs.stage_ends[0], costs.sent_before
    ranks = range(1, costs.layout.pp)
    ahead = first.forward.total
    heads = [0.0] + [ahead + (rank - 1) * each + sent[rank] for rank in ranks]
    if costs.layout.schedule in SPLIT_BACKWARD:
        return heads, [0.0] * len(heads)
    first_back = first.backward_total
    return heads, [0.0] + [first_back + (rank - 1) * back + sent[rank] for rank in ranks]


def _poured(costs: LayoutCosts, modes: Sequence[str], heads: Sequence[float], tails: Sequence[float]) -> float:
    layout, count = costs.layout, costs.microbatches
    bare = costs.microbatch.forward.total + costs.microbatch.backward_total
    each, reduce, update, work = layout.stages * bare, 0.0, 0.0, 0.0
    again = [min(segment.seconds.recompute(mode).total for mode in modes) for segment in costs.segments]
    parts = [(costs.embedding, 1, 0.0), (costs.head, 1, 0.0)]
    parts += [(s.seconds, s.layers, more) for s, more in zip(costs.segments, again, strict=True)]
    for seconds, number, more in parts:
        each += number * (seconds.forward.total + seconds.backward_total + more)
        work += number * seconds.gather.total
        reduce += number * seconds.reduce.total
        update += number * seconds.optimizer.total
    work += count * each
    around = [head + tail for head, tail in zip(heads, tails, strict=True)]
    return max(_least_maximum(around, work), _least_maximum(heads, work + reduce)) + update / layout.pp


def _one_stage(costs: LayoutCosts, modes: Sequence[str], most_stages: int, split: bool) -> float:
    """One microbatch all the way, and on some stage of `most_stages` the backwards of all the others.

    A stage runs its M backwards one after the other, between the first microbatch's way down and back to it and the
    last one's way up; some stage has at least its share of the whole. Where backwards are `split` only the halves for
    the inputs are in the way.
    """
    bare, stages = costs.microbatch, costs.layout.stages
    forward, backward = stages * bare.forward.total, stages * bare.backward_input.total
    backward += 0.0 if split else stages * bare.backward_weight.total
    parts = [(costs.embedding, 1, 0.0), (costs.head, 1, 0.0)]
    parts += [(s.seconds, s.layers, min(s.seconds.recompute(mode).total for mode in modes)) for s in costs.segments]
    for seconds, number, again in parts:
        forward += number * seconds.forward.total
        backward += number * (again + (seconds.backward_input.total if split else seconds.backward_total))
    return forward + backward + (costs.microbatches - 1) * backward / most_stages


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
