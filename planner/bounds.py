"""Closed-form lower bounds of a layout: seconds that no assignment can beat, and whether any can fit.

[Note: The bound]
Every path of the schedule is at most the step (`simulation.known_paths`). For stage s with n blocks, x of them
recomputed, two paths hold whatever the other stages do:

    round trip   W + (M-1)·b_s(n) + late_s·f_s(n) + M·x·rec + (2(p-1) + blocked_s)·send + o_s(n)
    own work     e_f·[s>0] + M·(f_s(n) + b_s(n)) + M·x·rec + (s + blocked_s)·send + reduce_s(n) + o_s(n)

W is one microbatch through the whole model without recomputation and with the first gathers of weights
(GPipe: of stage s alone), late_s the forwards that stage s runs after its first backward, blocked_s the
sends it waits for, o_s its optimizer. Memory gives the least x for each n. The larger of the two, c_s(n),
rises with n, so the least possible maximum over the stages with Σ n = layers is found by giving one block at
a time to the stage where it costs least: exact for this relaxation, and the split it ends with is a good
first assignment.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .simulation import blocked_sends, late_forwards
from .step_cost import LayoutCosts, StageCount

ROUNDING = 1e-9  # relative: sums of bytes in another order differ by less


@dataclass(frozen=True)
class Bound:
    """No assignment of the layout is faster than `seconds`; `counts` is the split that reaches the bound's maximum."""

    seconds: float
    counts: tuple[StageCount, ...]


class StageLimits:
    """What one stage allows: the least number of recomputed blocks that n blocks need to fit."""

    def __init__(
        self, costs: LayoutCosts, stage: int, empty_bytes: float, limit_bytes: float, recompute: str | None
    ) -> None:
        slack = 1.0 + costs.allocator_slack
        block, flight = costs.block_memory, costs.in_flight[stage]
        held, recomputed = block.held.total * flight, block.held_recomputed.total * flight
        # A sum that rounds to a hair above the limit fits, here as in `fits`.
        self._free = limit_bytes * (1 + ROUNDING) - empty_bytes
        self._per_block = slack * (block.state.total + held)
        self._saved = slack * (held - recomputed)
        self._recompute = recompute

    def least_recomputed(self, blocks: int) -> int | None:
        """The fewest of `blocks` blocks that must recompute, or None when even all of them do not fit."""
        missing = blocks * self._per_block - self._free
        if self._recompute == "full":
            return blocks if missing <= blocks * self._saved else None
        if missing <= 0:
            return 0
        if self._recompute == "none" or self._saved <= 0:
            return None
        needed = math.ceil(missing / self._saved)
        return needed if needed <= blocks else None


def lower_bound(costs: LayoutCosts, limit_bytes: float, recompute: str | None) -> Bound | None:
    """The bound above, or None when no assignment fits `limit_bytes`.

    `recompute` pins the mode of every block ("none" or "full"); None leaves it free.
    """
    stages, layers, count = costs.layout.pp, costs.layers, costs.microbatches
    block = costs.block
    bare = costs.microbatch
    ends = [bare] * stages  # the stages between first and last are alike
    ends[0], ends[-1] = costs.ends_seconds(0), costs.ends_seconds(stages - 1)
    forward, backward, again = block.forward.total, block.backward.total, block.recompute.total
    whole = sum(e.forward.total + e.backward.total for e in ends) + layers * (forward + backward)
    gathers = sum(e.gather.total for e in ends) + layers * block.gather.total
    edges = {s: costs.stage_memory(s, StageCount(0, 0)).total for s in {0, min(1, stages - 1), stages - 1}}
    limits = [
        StageLimits(costs, s, edges.get(s, edges[min(1, stages - 1)]), limit_bytes, recompute) for s in range(stages)
    ]
    schedule, send = costs.layout.schedule, costs.send_seconds
    late = [late_forwards(schedule, s, stages, count) for s in range(stages)]
    blocked = [send * blocked_sends(schedule, s, stages, count) for s in range(stages)]
    first_forward = ends[0].forward.total

    def cost(stage: int, blocks: int, recomputed: int) -> float:
        end = ends[stage]
        f = end.forward.total + blocks * forward
        b = end.backward.total + blocks * backward
        update = end.optimizer.total + blocks * block.optimizer.total
        gather = end.gather.total + blocks * block.gather.total
        trip = whole + (gathers if schedule == "1f1b" else gather)
        trip += (count - 1) * b + late[stage] * f + 2 * (stages - 1) * send + ends[0].reduce.total
        own = count * (f + b) + end.reduce.total + blocks * block.reduce.total
        own += gather
        own += first_forward + stage * send if stage else 0.0
        return max(trip, own) + blocked[stage] + count * recomputed * again + update

    counts = [0] * stages
    most = 0.0
    heap: list[tuple[float, int, int]] = []

    def offer(stage: int) -> None:
        recomputed = limits[stage].least_recomputed(counts[stage] + 1)
        if recomputed is not None:
            heapq.heappush(heap, (cost(stage, counts[stage] + 1, recomputed), stage, recomputed))

    chosen = [0] * stages
    given = 0
    for stage in range(stages):
        inner = 0 < stage < stages - 1
        needed = limits[stage].least_recomputed(1 if inner else 0)
        if needed is None:
            return None
        counts[stage], chosen[stage] = (1, needed) if inner else (0, 0)
        given += counts[stage]
        most = max(most, cost(stage, counts[stage], needed))
        offer(stage)
    if given > layers:
        return None
    while given < layers:
        if not heap:
            return None
        seconds, stage, recomputed = heapq.heappop(heap)
        most = max(most, seconds)
        counts[stage] += 1
        chosen[stage] = recomputed
        given += 1
        offer(stage)
    assignment = tuple(StageCount(n - x, x) for n, x in zip(counts, chosen, strict=True))
    return Bound(most + costs.step_seconds, assignment)


def fits(costs: LayoutCosts, counts: Sequence[StageCount], limit_bytes: float) -> bool:
    """Whether every rank stays within the limit, up to the rounding of a sum."""
    return all(memory.total <= limit_bytes * (1 + ROUNDING) for memory in costs.memory(counts))


def least_missing_bytes(costs: LayoutCosts, limit_bytes: float, recompute: str | None) -> tuple[int, float]:
    """(stage, bytes) missing on the tightest stage in the layout's best case, when nothing fits.

    Blocks go one at a time to the stage that is left with the most room. Where the mode is free a stage needs
    least with all blocks recomputed, or none: bytes are linear in how many are, but for the transient.
    """
    stages = costs.layout.pp

    def used(stage: int, blocks: int) -> float:
        kept, recomputed = StageCount(blocks, 0), StageCount(0, blocks)
        allowed = {"none": (kept,), "full": (recomputed,)}.get(recompute or "", (kept, recomputed))
        return min(costs.stage_memory(stage, count).total for count in allowed)

    counts = [1 if 0 < s < stages - 1 else 0 for s in range(stages)]
    heap = [(used(s, counts[s] + 1), s) for s in range(stages)]
    heapq.heapify(heap)
    for _ in range(costs.layers - sum(counts)):
        _, stage = heapq.heappop(heap)
        counts[stage] += 1
        heapq.heappush(heap, (used(stage, counts[stage] + 1), stage))
    missing = [used(s, counts[s]) - limit_bytes for s in range(stages)]
    worst = max(range(stages), key=missing.__getitem__)
    return worst, missing[worst]
