"""Ranks that share cores, caches, memory or power: what a stage gains while others are in their bubble.

[Note: Beside others]
Kernels are measured with all ranks computing. In a pipeline with stages in their bubble the others run faster: a kernel
with k of the p stages at work takes c(k·n)/c(p·n) times as long as measured, with n ranks a stage and the profile's
contention c of its kind. Cores are shared evenly, so a product's is about the ranks a core; what streams through memory
gains more, since fewer tensors fit a cache better (four ranks on two cores: benchmarks/README.md). How long k stages
work is counted on the schedule itself, with layers dealt out so that it is short and no messages. What ranks of a stage
send each other gains less than compute (0.7 to 0.9 of the time with half at work, compute 0.5: benchmarks/meetings.py)
and counts as gaining nothing, since no point of a profile says how much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, TypeVar

from profiles.hardware import HardwareProfile
from profiles.points import DTYPE_BYTES, MemoryPoint

from .event_graph import COSTS, NOTHING, REDUCE, build_graph
from .layout import Layout
from .schedule import Pipeline
from .simulation import StageSeconds, event_times

# More microbatches than these a rank add the same to each stretch, one after the other.
_ROUNDS = 6
# (ranks that compute at once, share of the work that they are so many at), most ranks last.
Working = tuple[tuple[float, float], ...]
_HOST_SECONDS = (
    "launch_seconds",
    "microbatch_overhead_seconds",
    "shard_overhead_seconds",
    "sequence_shard_overhead_seconds",
    "host_operation_seconds",
    "operation_overhead_seconds",
)
_Point = TypeVar("_Point", bound=Any)


@dataclass(frozen=True)
class Pace:
    """How many times its measured seconds compute takes.

    `slowest` multiplies all of it, since all wait for the slowest rank. `working` is how many ranks compute at once;
    nothing where they always are as many as were measured.
    """

    slowest: float = 1.0
    working: Working = ()


def shares_with_stages(hardware: HardwareProfile, layout: Layout) -> bool:
    """Whether ranks of other stages slow this one's."""
    return layout.pp > 1 and ranks_that_share(hardware, layout) > layout.world_size // layout.pp


def ranks_that_share(hardware: HardwareProfile, layout: Layout) -> int:
    """As many as contention was measured up to, whether or not they are one node."""
    return min(layout.world_size, max((point.active for point in hardware.contention_points), default=1))


def ranks_at_work(
    hardware: HardwareProfile, layout: Layout, pipeline: Pipeline, durations: Sequence[StageSeconds]
) -> Working:
    """How many ranks compute at once over the layout's work; `durations` of each stage as measured."""
    each = ranks_that_share(hardware, layout) / layout.pp  # of the ranks that share something, in a stage
    shares = stages_at_work(pipeline, durations)
    working = sum(shares[1:])
    return tuple((each * stages, share / working) for stages, share in enumerate(shares) if stages and share > 0)


def with_ranks_at_work(hardware: HardwareProfile, active: float, of: int) -> HardwareProfile:
    """The profile as if it had been measured with so many ranks computing, where `of` were."""
    whole = hardware.contention(active) / hardware.contention(of)

    def scaled(points: Sequence[_Point], factor: float = whole) -> tuple[_Point, ...]:
        return tuple(replace(point, seconds=factor * point.seconds) for point in points)

    def slower(models: Sequence[_Point]) -> tuple[_Point, ...]:
        rates = [f.name for f in fields(models[0]) if f.name.endswith("flops_per_second")] if models else []
        return tuple(replace(model, **{rate: getattr(model, rate) / whole for rate in rates}) for model in models)

    memory: list[MemoryPoint] = []
    for point in hardware.memory:
        size = point.elements * DTYPE_BYTES[point.dtype]
        memory += scaled([point], hardware.contention(active, size) / hardware.contention(of, size))
    return replace(
        hardware,
        gemm=scaled(hardware.gemm),
        many_gemm=scaled(hardware.many_gemm),
        attention=scaled(hardware.attention),
        memory=tuple(memory),
        shard_overheads=scaled(hardware.shard_overheads),
        gemm_models=slower(hardware.gemm_models),
        attention_models=slower(hardware.attention_models),
        memory_bandwidth_bytes_per_second=hardware.memory_bandwidth_bytes_per_second / whole,
        **{name: whole * getattr(hardware, name) for name in _HOST_SECONDS},
    )


def least_pace(paces: Sequence[Pace]) -> Pace:
    """One at which nothing takes longer than at any of these: at each number of ranks as much of the work is done with
    no more than so many as at the one where that is most."""
    counts = sorted({active for pace in paces for active, _ in pace.working})
    until = [max(sum(s for active, s in pace.working if active <= count) for pace in paces) for count in counts]
    working = tuple((count, now - before) for count, (before, now) in zip(counts, pairwise([0.0, *until]), strict=True))
    return Pace(min(pace.slowest for pace in paces), working)


def stages_at_work(pipeline: Pipeline, durations: Sequence[StageSeconds]) -> tuple[float, ...]:
    """The share of a step in which none, one, ... all of the ranks work."""
    few = min(pipeline.microbatches, _ROUNDS * pipeline.ranks)
    spent = _seconds_at_work(replace(pipeline, microbatches=few), durations)
    if more := pipeline.microbatches - few:
        half = few // 2
        before = _seconds_at_work(replace(pipeline, microbatches=half), durations)
        spent = [now + more * (now - then) / (few - half) for now, then in zip(spent, before, strict=True)]
    total = sum(spent)
    return tuple(each / total for each in spent) if total > 0 else (*[0.0] * pipeline.ranks, 1.0)


def _seconds_at_work(pipeline: Pipeline, durations: Sequence[StageSeconds]) -> list[float]:
    """Seconds in which none, one, ... all of the ranks work."""
    graph = build_graph(pipeline)
    costs, times = event_times(graph, durations, [0.0] * (pipeline.stages - 1))
    changes = Counter[float]()
    for event, cost in enumerate(graph.costs, start=1):
        if cost != NOTHING and (cost - 1) % COSTS < REDUCE - 1:
            changes[times[event]] -= 1
            changes[times[event] - costs[cost]] += 1
    found, working, before = [0.0] * (pipeline.ranks + 1), 0, 0.0
    for now in sorted(changes):
        # Sums of durations that should be one may differ in their last digit.
        found[min(max(working, 0), pipeline.ranks)] += now - before
        working, before = working + changes[now], now
    return found
