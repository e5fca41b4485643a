"""A good first assignment of any layout: layers dealt out evenly, each rank recomputing as little as fits."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from .bounds import fits
from .layout import RECOMPUTE_MODES
from .layout_costs import Blocks, LayoutCosts, StageCount


def first_assignment(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> tuple[StageCount, ...]:
    """All stages work about equally long; what does not fit recomputes all it may."""
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


def _recompute_until_it_fits(
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
                counts[stage] = _moved(original, k, cheap, dear, high)
                if costs.rank_bytes(rank, counts) > limit_bytes:
                    continue  # all of them, and then those of the next stage
                while high - low > 1:  # the least that fits, by halving
                    middle = (low + high) // 2
                    counts[stage] = _moved(original, k, cheap, dear, middle)
                    low, high = (low, middle) if costs.rank_bytes(rank, counts) <= limit_bytes else (middle, high)
                counts[stage] = _moved(original, k, cheap, dear, high)


def _moved(count: StageCount, segment: int, cheap: str, dear: str, number: int) -> StageCount:
    blocks = {mode: count[segment].of(mode) for mode in RECOMPUTE_MODES}
    blocks[cheap] -= number
    blocks[dear] += number
    return (*count[:segment], Blocks(**blocks), *count[segment + 1 :])


def least_missing_bytes(costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]) -> tuple[int, float]:
    """(rank, bytes) missing on the tightest rank in the layout's best case, when nothing fits.

    With one stage a rank and all layers alike it is the least: layers go one at a time to the rank that is left with
    the most room, and a rank needs least with all its layers in one mode. Else it is that of an even assignment that
    recomputes all it may.
    """
    if costs.layout.virtual_stages == 1 and len(costs.segments) == 1:
        counts = _roomiest_assignment(costs, modes or ("none",))
    else:
        dearest = sorted(modes, key=lambda mode: min(s.memory.held_by(mode).total for s in costs.segments))[:1]
        counts = first_assignment(costs, limit_bytes, dearest or ("none",))
    missing = [costs.rank_bytes(rank, counts) - limit_bytes for rank in range(costs.layout.pp)]
    worst = max(range(len(missing)), key=missing.__getitem__)
    return worst, missing[worst]


def _roomiest_assignment(costs: LayoutCosts, modes: Sequence[str]) -> tuple[StageCount, ...]:
    """The assignment whose fullest rank holds least: bytes of a rank rise with its layers."""
    stages, nothing = costs.layout.pp, [tuple(Blocks() for _ in costs.segments)] * costs.layout.stages

    def least(stage: int, layers: int) -> tuple[float, StageCount]:
        found = []
        for mode in modes:
            held: StageCount = (Blocks(**{mode: layers}),)
            counts = [*nothing[:stage], held, *nothing[stage + 1 :]]
            found.append((costs.rank_bytes(stage, counts), held))
        return min(found, key=lambda option: option[0])

    numbers = [1 if 0 < stage < stages - 1 else 0 for stage in range(stages)]
    heap = [(least(stage, numbers[stage] + 1)[0], stage) for stage in range(stages)]
    heapq.heapify(heap)
    for _ in range(costs.layers - sum(numbers)):
        _, stage = heapq.heappop(heap)
        numbers[stage] += 1
        heapq.heappush(heap, (least(stage, numbers[stage] + 1)[0], stage))
    return tuple(least(stage, layers)[1] for stage, layers in enumerate(numbers))
