"""A good first assignment of any layout: layers dealt out evenly, each rank recomputing as little as fits."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product

from .bounds import fits
from .layout import RECOMPUTE_MODES
from .layout_costs import Blocks, LayoutCosts, StageCount


def first_assignment(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> tuple[StageCount, ...]:
    """Ranks work about equally long; what does not fit recomputes all it may."""
    if costs.layout.virtual_stages > 1:
        counts = dealt_by_rank(costs, modes, costs.layout.virtual_stages - 1)
    else:
        counts = _dealt_by_stage(costs, modes)
    recompute_until_it_fits(costs, counts, limit_bytes, modes)
    return tuple(counts)


def _dealt_by_stage(costs: LayoutCosts, modes: Sequence[str]) -> list[StageCount]:
    """All stages work about equally long, in the quickest mode."""
    chain, each = _chain(costs), [s.seconds.forward.total + s.seconds.backward.total for s in costs.segments]
    cuts = _even_cuts([each[k] for k in chain], _end_work(costs))
    return _counts(costs, [end - first for first, end in cuts], modes)


def dealt_by_rank(costs: LayoutCosts, modes: Sequence[str], widest: int) -> list[StageCount]:
    """All ranks work about equally long, in the quickest mode, and of each chunk all ranks have about as many layers:
    what is more than others have is in chunk `widest` and those before it, where chunk 0 comes after the last.

    A layer counts as long as the mean of all, and the ends as layers. So where the width changes it changes once, on
    all ranks: a rank with a wide chunk beside one with a narrow chunk waits.
    """
    layout, ends = costs.layout, _end_work(costs)
    work = sum(s.layers * (s.seconds.forward.total + s.seconds.backward.total) for s in costs.segments)
    as_layers = [(end - min(ends)) * costs.layers / work if work > 0 else 0.0 for end in ends]
    held = [0 if stage in (0, layout.stages - 1) else 1 for stage in range(layout.stages)]
    heap = [(sum(held[s] + as_layers[s] for s in layout.stages_of(rank)), rank) for rank in range(layout.pp)]
    heapq.heapify(heap)
    more = [0] * layout.pp
    for _ in range(costs.layers - sum(held)):
        longest, rank = heap[0]
        more[rank] += 1
        heapq.heapreplace(heap, (longest + 1, rank))
    for rank, layers in enumerate(more):
        stages = layout.stages_of(rank)
        order = [stages[(widest - n) % len(stages)] for n in range(len(stages))]
        for _ in range(layers):
            held[min(order, key=lambda stage: held[stage] + round(as_layers[stage]))] += 1
    return _counts(costs, held, modes)


def _chain(costs: LayoutCosts) -> list[int]:
    """The segment of each layer."""
    return [k for k, segment in enumerate(costs.segments) for _ in range(segment.layers)]


def _end_work(costs: LayoutCosts) -> list[float]:
    """Seconds of each stage without layers."""
    return [end.forward.total + end.backward.total for end in costs.stage_ends]


def _counts(costs: LayoutCosts, widths: Sequence[int], modes: Sequence[str]) -> list[StageCount]:
    """So many layers on each stage, in the quickest mode."""
    chain, first, counts = _chain(costs), 0, list[StageCount]()
    quickest = _by_seconds(costs, modes)[0]
    for width in widths:
        held = chain[first : first + width]
        counts.append(tuple(Blocks(**{quickest: held.count(k)}) for k in range(len(costs.segments))))
        first += width
    return counts


def _by_seconds(costs: LayoutCosts, modes: Sequence[str]) -> list[str]:
    return sorted(modes, key=lambda mode: max(s.seconds.recompute(mode).total for s in costs.segments))


def quickest_start(
    costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]
) -> tuple[LayoutCosts, tuple[StageCount, ...]] | None:
    """The first assignment that fits, with all stages' choice alike where they have one and the quickest that does."""
    alike = [costs]
    if len(costs.choices) > 1:  # not all keep their weights: that is zero 1
        freed = [choice for choice, _ in costs.choices if choice is not False]
        alike = [replace(costs, reshard=(choice,) * costs.layout.stages) for choice in freed]
    for each in alike:
        counts = first_assignment(each, limit_bytes, modes)
        if fits(each, counts, limit_bytes):
            return each, counts
    return None


def _even_cuts(work: Sequence[float], ends: Sequence[float]) -> list[tuple[int, int]]:
    """[first, end) of each stage: each takes layers until it has its share of what is left, one at least inside."""
    cuts, first, left = [], 0, sum(work) + sum(ends)
    for stage, end in enumerate(ends):
        remaining = len(ends) - stage
        share, taken, last = left / remaining, end, first
        needed_later = max(0, remaining - 2)
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


def recompute_until_it_fits(
    costs: LayoutCosts, counts: list[StageCount], limit_bytes: float, modes: Sequence[str]
) -> None:
    """Ranks that do not fit recompute, the stages of each in turn: layers go to dearer modes, one after the other or
    left out where that takes less, until the rank's bytes fit or all layers are at the last."""
    quickest, *dearer = _by_seconds(costs, modes)
    for rank in range(costs.layout.pp):
        if not dearer or costs.rank_bytes(rank, counts) <= limit_bytes:
            continue
        tried = []
        for first in range(len(dearer)):
            chosen = list(counts)
            _to_dearer_modes(costs, rank, chosen, limit_bytes, (quickest, *dearer[first:]))
            spent = sum(costs.stage_seconds(s, chosen[s]).recompute_full.total for s in costs.layout.stages_of(rank))
            tried.append((costs.rank_bytes(rank, chosen) > limit_bytes, spent, chosen))
        counts[:] = min(tried, key=lambda one: one[:2])[2]


def _to_dearer_modes(
    costs: LayoutCosts, rank: int, counts: list[StageCount], limit_bytes: float, modes: Sequence[str]
) -> None:
    """Layer by layer to the next dearer mode, on the rank's own stages, until its bytes fit or all are at the last."""
    for cheap, dear in pairwise(modes):
        for stage in costs.layout.stages_of(rank):
            for k in range(len(costs.segments)):
                original = counts[stage]
                high = original[k].of(cheap)
                if not high or costs.rank_bytes(rank, counts) <= limit_bytes:
                    continue
                low = 0
                counts[stage] = moved(original, k, {cheap: -high, dear: high})
                if costs.rank_bytes(rank, counts) > limit_bytes:
                    continue  # all of them, and then those of the next stage
                while high - low > 1:  # the least that fits, by halving
                    middle = (low + high) // 2
                    counts[stage] = moved(original, k, {cheap: -middle, dear: middle})
                    low, high = (low, middle) if costs.rank_bytes(rank, counts) <= limit_bytes else (middle, high)
                counts[stage] = moved(original, k, {cheap: -high, dear: high})


def moved(count: StageCount, segment: int, more: Mapping[str, int]) -> StageCount:
    """The stage with so many layers more, or fewer, of the segment in each mode."""
    blocks = {mode: count[segment].of(mode) + more.get(mode, 0) for mode in RECOMPUTE_MODES}
    return (*count[:segment], Blocks(**blocks), *count[segment + 1 :])


def roomiest_assignment(
    costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]
) -> tuple[LayoutCosts, tuple[StageCount, ...]]:
    """The assignment whose tightest rank misses least of the limit, and each stage's choice, when nothing fits.

    With one stage a rank and all layers alike it is the best: layers go one at a time to the rank that is left with
    the most room, and a rank needs least with all its layers in one mode. Else it is an even assignment that
    recomputes all it may.
    """
    if costs.layout.virtual_stages == 1 and len(costs.segments) == 1:
        return _layer_by_layer(costs, modes or ("none",))
    dearest = sorted(modes, key=lambda mode: min(s.memory.held_by(mode).total for s in costs.segments))[:1]
    return costs, first_assignment(costs, limit_bytes, dearest or ("none",))


def missing_bytes(costs: LayoutCosts, counts: Sequence[StageCount], limit_bytes: float) -> tuple[int, float]:
    """(rank, bytes) missing on the tightest rank."""
    missing = [costs.rank_bytes(rank, counts) - limit_bytes for rank in range(costs.layout.pp)]
    worst = max(range(len(missing)), key=missing.__getitem__)
    return worst, missing[worst]


def _layer_by_layer(costs: LayoutCosts, modes: Sequence[str]) -> tuple[LayoutCosts, tuple[StageCount, ...]]:
    """The assignment whose fullest rank holds least, and each stage's choice: bytes of a rank rise with its layers."""
    stages, nothing = costs.layout.pp, [tuple(Blocks() for _ in costs.segments)] * costs.layout.stages
    pinned = tuple(choice for choice, _ in costs.choices)
    choices = tuple(choice for choice in pinned if choice is not False) or pinned or (None,)
    alike = {each: replace(costs, reshard=(each,) * stages) if costs.choices else costs for each in choices}

    def least(stage: int, layers: int) -> tuple[float, StageCount, bool | None]:
        found = []
        for (choice, chosen), mode in product(alike.items(), modes):
            held: StageCount = (Blocks(**{mode: layers}),)
            counts = [*nothing[:stage], held, *nothing[stage + 1 :]]
            found.append((chosen.rank_bytes(stage, counts), held, choice))
        return min(found, key=lambda option: option[0])

    numbers = [1 if 0 < stage < stages - 1 else 0 for stage in range(stages)]
    heap = [(least(stage, numbers[stage] + 1)[0], stage) for stage in range(stages)]
    heapq.heapify(heap)
    for _ in range(costs.layers - sum(numbers)):
        _, stage = heapq.heappop(heap)
        numbers[stage] += 1
        heapq.heappush(heap, (least(stage, numbers[stage] + 1)[0], stage))
    best = [least(stage, layers) for stage, layers in enumerate(numbers)]
    if costs.choices:
        costs = replace(costs, reshard=tuple(choice for _, _, choice in best))
    return costs, tuple(held for _, held, _ in best)
