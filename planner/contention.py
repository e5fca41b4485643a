"""Ranks that share cores, memory bandwidth or power: what a stage gains while others are in their bubble.

[Note: Beside others]
Kernels are measured with all ranks computing. In a pipeline with stages in their bubble the others run faster, all that
run at once by the same factor, so a stretch of the step with k of its p stages at work takes c(k·n)/c(p·n) times as
long as planned, with n ranks a stage and the profile's contention c. How long k stages work is counted on the schedule
itself with equal chunks, forward : backward = 1 : 2 and no messages.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from profiles.hardware import HardwareProfile

from .event_graph import COSTS, NOTHING, REDUCE, build_graph
from .layout import Layout
from .schedule import Pipeline
from .simulation import StageSeconds, event_times

# Between warm-up and cool-down all ranks work: more microbatches than these a rank add to that alone.
_ROUNDS = 6
_UNIT = StageSeconds(1.0, 1.0, 1.0)
_ACTIONS = 3  # of such seconds in a microbatch of a chunk


def beside_others(hardware: HardwareProfile, layout: Layout, microbatches: int) -> float:
    """Seconds of the layout's compute in times of those with all ranks at work ([Note: Beside others]).

    How many ranks share anything is what contention was measured up to, whether or not they are one node.
    """
    points = hardware.contention_points
    ranks = min(layout.world_size, max((point.active for point in points), default=1))
    in_stage = layout.world_size // layout.pp
    if layout.pp == 1 or ranks <= in_stage:
        return 1.0
    each = ranks / layout.pp  # of the ranks that share something, in a stage
    shares = stages_at_work(layout.pipeline(microbatches))
    spent = sum(share * hardware.contention(each * stages) for stages, share in enumerate(shares))
    return spent / hardware.contention(ranks)


def stages_at_work(pipeline: Pipeline) -> tuple[float, ...]:
    """The share of a step in which none, one, ... all of the ranks' stages work."""
    few = min(pipeline.microbatches, _ROUNDS * pipeline.ranks)
    steps = _steps_at_work(replace(pipeline, microbatches=few))
    more = _ACTIONS * pipeline.chunks * (pipeline.microbatches - few)
    total = sum(steps) + more
    return (*(each / total for each in steps[:-1]), (steps[-1] + more) / total)


@lru_cache(maxsize=1024)
def _steps_at_work(pipeline: Pipeline) -> tuple[float, ...]:
    """Units of time in which none, one, ... all of the ranks work; a forward takes one."""
    graph = build_graph(pipeline)
    costs, times = event_times(graph, [_UNIT] * pipeline.stages, [0.0] * (pipeline.stages - 1))
    changes = Counter[float]()
    for event, cost in enumerate(graph.costs, start=1):
        if cost != NOTHING and (cost - 1) % COSTS < REDUCE - 1:
            changes[times[event]] -= 1
            changes[times[event] - costs[cost]] += 1
    found, working, before = [0.0] * (pipeline.ranks + 1), 0, 0.0
    for now in sorted(changes):
        found[working] += now - before
        working, before = working + changes[now], now
    return tuple(found)
