"""Every layout and every assignment of a small question, priced one by one: what the planner's answer must equal.

Nothing is bounded, pruned or solved here. Of the planner it takes the prices (`CostModel`), what the events of a
schedule wait for and the rules (`violations`, `why_no_recompute`); the loops over degrees and knobs, the splits of
layers and the recomputed counts are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from math import gcd
from typing import Any

import numpy as np

from planner.event_graph import build_graph
from planner.layout import CP_STYLES, RECOMPUTE_MODES, SCHEDULES, Layout
from planner.layout_costs import Blocks, LayoutCosts, StageCount
from planner.question import Question
from planner.rules import violations, why_no_recompute
from planner.schedule import Pipeline
from planner.simulation import StageSeconds
from planner.step_cost import CostModel

# Peaks this close to the limit fit: the rounding of a sum.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidate:
    """One assignment of one layout: its step and the bytes of its fullest rank."""

    layout: Layout
    counts: tuple[StageCount, ...]
    step_seconds: float
    peak_bytes: float


# ---- layouts ---------------------------------------------------------------------------------------------


def all_layouts(question: Question) -> list[Layout]:
    """The legal layouts, by trying every number for every degree and knob.

    Where an axis has one rank its knob has only its plain value, and of HSDP's shards those are tried that
    `is_shard_group` names; the rules judge the rest.
    """
    legal = []
    for layout in _degrees(question):
        for knobs in product(_pipelines(layout, question), _states(layout, question), _expert_grids(layout, question)):
            tried = Layout(**(vars(layout) | knobs[0] | knobs[1] | knobs[2]))
            if is_legal(tried, question):
                legal.append(tried)
    return legal


def is_legal(layout: Layout, question: Question) -> bool:
    """Whether the rules and the pins allow it, and it is worth proposing. More pins never allow more."""
    pinned = _as_pinned(layout, question.job.pins, question.job.bans) and modes_of(layout, question)
    proposed = gcd(layout.cp, layout.micro_batch) == 1  # else the same with less of both and more of dp
    return bool(pinned) and proposed and not violations(layout, question.rules)


def _degrees(question: Question) -> Iterator[Layout]:
    world, batch = question.cluster.devices, question.job.global_batch
    numbers = range(1, world + 1)
    for tp, cp, pp in product(numbers, repeat=3):
        if world % (tp * cp * pp):
            continue
        dp = world // (tp * cp * pp)
        micro_batches = [n for n in range(1, batch + 1) if batch % (n * dp) == 0]
        for sp, style, n in product((False, True)[:tp], CP_STYLES[1:] if cp > 1 else ("none",), micro_batches):
            yield Layout(tp=tp, cp=cp, cp_style=style, pp=pp, dp=dp, sequence_parallel=sp, micro_batch=n)


def _pipelines(layout: Layout, question: Question) -> list[dict[str, Any]]:
    chunks = range(1, (question.model.layers + 2) // layout.pp + 1) if layout.pp > 1 else (1,)
    schedules = SCHEDULES if layout.pp > 1 else ("1f1b",)
    return [{"schedule": schedule, "virtual_stages": n} for schedule, n in product(schedules, chunks)]


def _states(layout: Layout, question: Question) -> list[dict[str, Any]]:
    shards = [n for n in range(1, layout.dp + 1) if is_shard_group(n, layout, question)]
    return [{"zero": 0, "dp_shard": 1}, *({"zero": z, "dp_shard": n} for z, n in product((1, 2, 3), shards))]


def is_shard_group(number: int, layout: Layout, question: Question) -> bool:
    """State is sharded over all of dp, or over the dp ranks that a tier of links joins."""
    inside = [link.span for link in question.cluster.links]
    return number == layout.dp or (number > 1 and number * layout.tp * layout.cp in inside)


def _expert_grids(layout: Layout, question: Question) -> list[dict[str, Any]]:
    experts = question.model.experts
    if experts is None:
        return [{}]
    return [{"ep": ep, "etp": etp} for ep, etp in product(range(1, experts.number + 1), range(1, layout.tp + 1))]


def _as_pinned(layout: Layout, pins: Mapping[str, Any], bans: tuple[str, ...]) -> bool:
    of_stages = ("recompute", "reshard")
    kept = all(_in_pin(pin, vars(layout)[key]) for key, pin in pins.items() if key not in of_stages)
    kept = kept and ("reshard" not in pins or stages_choose(layout))
    plain = {"zero": 0, "sequence_parallel": False, "cp_style": "none"}
    return kept and all(vars(layout)[key] == plain.get(key, 1) for key in bans if key != "recompute")


def _in_pin(pin: Any, value: Any) -> bool:
    return value in pin if isinstance(pin, (tuple, range)) else value == pin


def modes_of(layout: Layout, question: Question) -> tuple[str, ...]:
    """The recompute modes that target, schedule and pin allow."""
    pin = "none" if "recompute" in question.job.bans else question.job.pins.get("recompute", RECOMPUTE_MODES)
    legal = [mode for mode in RECOMPUTE_MODES if why_no_recompute(mode, layout, question.rules) is None]
    return tuple(mode for mode in legal if _in_pin(pin, mode))


# ---- assignments -----------------------------------------------------------------------------------------


def splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut a chain of `layers` into `stages` runs; only the first and the last may be empty."""
    for numbers in product(range(layers + 1), repeat=stages - 1):
        last = layers - sum(numbers)
        if last >= 0 and all(number > 0 for number in numbers[1:]):
            yield (*numbers, last)


def assignments(
    segments: Sequence[int], stages: int, modes: Sequence[str] = ("none", "full")
) -> Iterator[tuple[StageCount, ...]]:
    """Every split of the chain of segments, with every count of each mode on every stage and segment."""
    chain = [k for k, layers in enumerate(segments) for _ in range(layers)]
    for split in splits(len(chain), stages):
        held, first = [], 0
        for number in split:
            held.append(chain[first : first + number])
            first += number
        ways = [tuple(product(*(_blocks(stage.count(k), modes) for k in range(len(segments))))) for stage in held]
        yield from product(*ways)


def _blocks(layers: int, modes: Sequence[str]) -> list[Blocks]:
    """Every way to give `layers` layers their modes."""
    numbers = [n for n in product(range(layers + 1), repeat=len(modes)) if sum(n) == layers]
    return [Blocks(**dict(zip(modes, each, strict=True))) for each in numbers]


# ---- prices ----------------------------------------------------------------------------------------------


def candidates(question: Question) -> dict[Layout, list[Candidate]]:
    """Every assignment of every legal layout, whatever the memory limit."""
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    return {
        layout: [
            found
            for costs in as_stages_choose(prices, layout, question.job.pins.get("reshard", (True, None, False)))
            for found in priced(costs, modes_of(layout, question))
            if question.job.pins.get("reshard") is False or some_layer_is_freed(costs, found.counts)
        ]
        for layout in all_layouts(question)
    }


def as_stages_choose(prices: CostModel, layout: Layout, pin: Any) -> Iterator[LayoutCosts]:
    """The layout's costs with every choice of its stages what to do with weights that the pin leaves."""
    if not stages_choose(layout):
        yield prices.price(layout)
        return
    for choice in product([each for each in (True, None, False) if _in_pin(pin, each)], repeat=layout.pp):
        yield prices.price(layout, choice)


def stages_choose(layout: Layout) -> bool:
    """Under zero 3, and in pipelines that leave gathering to each layer."""
    return layout.zero == 3 and layout.pp > 1 and layout.schedule in ("gpipe", "1f1b")


def some_layer_is_freed(costs: LayoutCosts, counts: Sequence[StageCount]) -> bool:
    """Where stages choose: if none is, it is zero 1."""
    if not costs.reshard:
        return True
    held = [any(blocks.total for blocks in count) for count in counts]
    return any(has and choice is not False for has, choice in zip(held, costs.reshard, strict=True))


def priced(costs: LayoutCosts, modes: Sequence[str]) -> Iterator[Candidate]:
    """Every assignment of one layout. What a stage or a rank costs by itself is asked for once."""
    layout, stages = costs.layout, range(costs.layout.stages)
    stages_of = [layout.stages_of(rank) for rank in range(layout.pp)]
    nothing = tuple(Blocks() for _ in costs.segments)

    @cache
    def alone(stage: int, count: StageCount) -> tuple[StageSeconds, float]:
        return costs.stage_durations(stage, count), costs.stage_seconds(stage, count).optimizer.total

    @cache
    def bytes_of(rank: int, own: tuple[StageCount, ...]) -> float:
        counts = [nothing] * len(stages)
        for stage, count in zip(stages_of[rank], own, strict=True):
            counts[stage] = count
        return costs.rank_memory(rank, counts).total

    tried = list(assignments([segment.layers for segment in costs.segments], len(stages), modes))
    figures = [[alone(stage, count) for stage, count in enumerate(counts)] for counts in tried]
    played = makespans(costs.pipeline, [[durations for durations, _ in each] for each in figures], costs.hop_seconds)
    for counts, each, seconds in zip(tried, figures, played, strict=True):
        optimizer = max(sum(each[stage][1] for stage in held) for held in stages_of)
        peak = max(bytes_of(rank, tuple(counts[stage] for stage in held)) for rank, held in enumerate(stages_of))
        yield Candidate(layout, counts, seconds + optimizer + costs.step_seconds, peak)


def makespans(
    pipeline: Pipeline, durations: Sequence[Sequence[StageSeconds]], hop_seconds: Sequence[float]
) -> list[float]:
    """`simulate(pipeline, each, hop_seconds).seconds` of each, to the last bit; all of them event by event."""
    graph = _graph(pipeline)
    if not durations:
        return []
    forward, first, second, gather, reduce = np.array(
        [[(s.forward, s.backward_input, s.backward_weight, s.gather, s.reduce) for s in each] for each in durations]
    ).transpose(2, 1, 0)  # each [stages, len(durations)]
    sends = np.repeat(np.array([[*hop_seconds, 0.0]]).T, len(durations), axis=1)
    of_stages = np.stack([gather + forward, forward, first + second, first, second, reduce, sends], axis=1)
    costs = [np.zeros(len(durations)), *of_stages.reshape(-1, len(durations))]
    over = [np.zeros(len(durations))]  # when each event is
    for *waited, cost in zip(*graph.waits, graph.costs, strict=True):
        start = over[waited[0]]
        for other in waited[1:]:
            if other:
                start = np.maximum(start, over[other])
        over.append(start + costs[cost])
    return np.max([over[end] for end in graph.ends], axis=0).tolist()


_graph = lru_cache(maxsize=16)(build_graph)  # layouts of one pipeline follow each other


def fastest(of_layouts: Sequence[Candidate], limit_bytes: float) -> Candidate | None:
    """The candidate with the least step among those that fit, or None."""
    fitting = [c for c in of_layouts if c.peak_bytes <= limit_bytes * (1 + ROUNDING)]
    return min(fitting, key=lambda candidate: candidate.step_seconds, default=None)
