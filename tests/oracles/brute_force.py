"""Every layout and every assignment of a small question, priced one by one: what the planner's answer must equal.

Nothing is bounded, pruned or solved here. Of the planner it takes the prices (`CostModel`) and the rules
(`violations`); the loops over degrees and knobs, the splits of layers and the recomputed counts are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from planner.layout import Layout, violations
from planner.search import Question
from planner.step_cost import CostModel, LayoutCosts, StageCount

# Peaks this close to the limit fit: the rounding of a sum.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidate:
    """One assignment of one layout: its step and the bytes of its fullest rank."""

    layout: Layout
    counts: tuple[StageCount, ...]
    step_seconds: float
    peak_bytes: float


def all_layouts(question: Question) -> list[Layout]:
    """The legal layouts, by trying every number from 1 to the world or the batch for every degree."""
    world, batch = question.cluster.devices, question.job.global_batch
    legal = []
    degrees = [d for d in product(range(1, world + 1), repeat=3) if d[0] * d[1] * d[2] == world]
    knobs = product(range(4), range(1, batch + 1), ("gpipe", "1f1b"), (False, True))
    for (tp, pp, dp), (zero, micro_batch, schedule, sequence_parallel) in product(degrees, list(knobs)):
        layout = Layout(
            tp=tp,
            pp=pp,
            dp=dp,
            dp_shard=1 if zero == 0 else dp,
            sequence_parallel=sequence_parallel,
            zero=zero,
            micro_batch=micro_batch,
            schedule=schedule,
        )
        if not violations(layout, question.rules) and _as_pinned(layout, question.job.pins, question.job.bans):
            legal.append(layout)
    return legal


def _as_pinned(layout: Layout, pins: Mapping[str, Any], bans: tuple[str, ...]) -> bool:
    kept = all(value == vars(layout)[key] for key, value in pins.items() if key != "recompute")
    return kept and not any(
        vars(layout)[key] > (key not in ("zero", "sequence_parallel")) for key in bans if key != "recompute"
    )


def splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut a chain of `layers` into `stages` runs; only the first and the last may be empty."""
    for numbers in product(range(layers + 1), repeat=stages - 1):
        last = layers - sum(numbers)
        if last >= 0 and all(number > 0 for number in numbers[1:]):
            yield (*numbers, last)


def assignments(layers: int, stages: int, recompute: str | None = None) -> Iterator[tuple[StageCount, ...]]:
    """Every split with every count of recomputed blocks per stage."""
    for split in splits(layers, stages):
        least = [n if recompute == "full" else 0 for n in split]
        most = [0 if recompute == "none" else n for n in split]
        for full in product(*(range(low, high + 1) for low, high in zip(least, most, strict=True))):
            yield tuple(StageCount(n - x, x) for n, x in zip(split, full, strict=True))


def candidates(question: Question) -> dict[Layout, list[Candidate]]:
    """Every assignment of every legal layout, whatever the memory limit."""
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    return {layout: list(_priced(prices.price(layout), question)) for layout in all_layouts(question)}


def _priced(costs: LayoutCosts, question: Question) -> Iterator[Candidate]:
    # A rank's bytes depend on its own blocks alone: one call prices the same count on every stage.
    pairs = [(none, full) for none in range(costs.layers + 1) for full in range(costs.layers + 1 - none)]
    table = {pair: [m.total for m in costs.memory([StageCount(*pair)] * costs.layout.pp)] for pair in pairs}
    pin = question.job.pins.get("recompute", "none" if "recompute" in question.job.bans else None)
    for counts in assignments(costs.layers, costs.layout.pp, pin):
        peak = max(table[count.none, count.full][stage] for stage, count in enumerate(counts))
        yield Candidate(costs.layout, counts, costs.step(counts), peak)


def fastest(priced: list[Candidate], limit_bytes: float) -> Candidate | None:
    """The candidate with the least step among those that fit, or None."""
    fitting = [c for c in priced if c.peak_bytes <= limit_bytes * (1 + ROUNDING)]
    return min(fitting, key=lambda candidate: candidate.step_seconds, default=None)
