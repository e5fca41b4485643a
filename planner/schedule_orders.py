"""The order of every pipeline schedule: which action a rank runs when, as torch 2.13 lists it.

p ranks, v chunks a rank, M microbatches, rank r from 0. Sources: GPipe and 1F1B arXiv 1811.06965 and 2104.04473
(figure 4), interleaved 1F1B arXiv 2104.04473 section 2.2, looped BFS arXiv 2211.05953, ZB1P and ZBV arXiv 2401.10241,
DualPipeV arXiv 2412.19437; where a paper leaves a choice, torch/distributed/pipelining/schedules.py decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

FORWARD, BACKWARD, INPUT, WEIGHT, OVERLAP = "F", "B", "I", "W", "OVERLAP_F_B"


class Action(NamedTuple):
    """One forward (F), whole backward (B), or backward for the input (I) or the weights (W): microbatch on a stage.

    DualPipeV's overlap of a forward with a backward is one action of two `parts`, without stage and microbatch.
    """

    stage: int
    kind: str
    microbatch: int
    parts: tuple[Action, ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{self.microbatch}"


def gpipe(rank: int, microbatches: int) -> list[Action]:
    """All forwards, then all backwards, both in order."""
    return [Action(rank, kind, i) for kind in (FORWARD, BACKWARD) for i in range(microbatches)]


def one_forward_one_backward(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """min(M, p - r) warm-up forwards, then one backward and one forward in turn."""
    warmup = min(microbatches, ranks - rank)
    order = [Action(rank, FORWARD, i) for i in range(warmup)]
    for i in range(microbatches - warmup):
        order.append(Action(rank, BACKWARD, i))
        order.append(Action(rank, FORWARD, warmup + i))
    order += [Action(rank, BACKWARD, i) for i in range(microbatches - warmup, microbatches)]
    return order


def looped_bfs(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Action]:
    """Chunk after chunk forward with all microbatches; backward in exactly the opposite order."""
    forwards = [(chunk * ranks + rank, i) for chunk in range(chunks) for i in range(microbatches)]
    return [Action(stage, FORWARD, i) for stage, i in forwards] + [
        Action(stage, BACKWARD, i) for stage, i in reversed(forwards)
    ]


# ---- interleaved: microbatches in rounds of G, each round chunk by chunk ----------------------------------


def round_size(ranks: int, microbatches: int) -> int:
    """G microbatches a round: M over max(1, M // p) rounds, which `why_illegal` wants to divide M."""
    return microbatches // max(1, microbatches // ranks)


def warmup_forwards(rank: int, ranks: int, chunks: int, microbatches: int, per_hop: int) -> int:
    """(v-1)·G + per_hop·(p-1-r), at most v·M: 2 a hop in interleaved 1F1B, 1 in ZB1P."""
    ahead = (chunks - 1) * round_size(ranks, microbatches) + per_hop * (ranks - 1 - rank)
    return min(ahead, microbatches * chunks)


def _rounds(ranks: int, chunks: int, microbatches: int) -> list[tuple[int, int]]:
    """(chunk, microbatch) of each forward in order; a backward has chunk v-1-c for the same place."""
    size = round_size(ranks, microbatches)
    return [
        (chunk, first + i) for first in range(0, microbatches, size) for chunk in range(chunks) for i in range(size)
    ]


def interleaved(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Action]:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards that are left."""
    warmup = warmup_forwards(rank, ranks, chunks, microbatches, per_hop=2)
    places = _rounds(ranks, chunks, microbatches)
    forwards = [Action(chunk * ranks + rank, FORWARD, i) for chunk, i in places]
    backwards = [Action((chunks - 1 - chunk) * ranks + rank, BACKWARD, i) for chunk, i in places]
    steady = len(places) - warmup
    order = forwards[:warmup]
    for pair in zip(forwards[warmup:], backwards[:steady], strict=True):
        order += pair
    return order + backwards[steady:]


def zb1p(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Action]:
    """As interleaved with a shorter warm-up; the weights' backward follows r input-backwards later."""
    warmup = warmup_forwards(rank, ranks, chunks, microbatches, per_hop=1)
    places = _rounds(ranks, chunks, microbatches)
    forwards = [Action(chunk * ranks + rank, FORWARD, i) for chunk, i in places]
    backwards = [((chunks - 1 - chunk) * ranks + rank, i) for chunk, i in places]
    order = forwards[:warmup]
    for j, (stage, i) in enumerate(backwards):
        order += forwards[warmup + j : warmup + j + 1]
        order.append(Action(stage, INPUT, i))
        if j >= rank:
            late_stage, late_microbatch = backwards[j - rank]
            order.append(Action(late_stage, WEIGHT, late_microbatch))
    return order + [Action(stage, WEIGHT, i) for stage, i in backwards[max(0, len(backwards) - rank) :]]


# ---- V: rank r holds stage r on the way down (`near` the input) and 2p-1-r on the way back (`far`) ----------


def zbv(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """ZB-V written for at least 2p-1 microbatches; those that do not exist are left out."""
    p, r, near, far = ranks, rank, rank, 2 * ranks - 1 - rank
    padded = max(2 * p - 1, microbatches)
    near_backward, far_backward = [(near, INPUT), (near, WEIGHT)], [(far, INPUT), (far, WEIGHT)]
    far_turn = [(far, FORWARD), *far_backward]
    steps = [(near, FORWARD)] * (2 * (p - r) - 1)
    steps += [(far, FORWARD), (near, FORWARD)] * r
    steps += far_turn * (p - r)
    steps += [(near, FORWARD), *near_backward, *far_turn] * (padded - 2 * p + r + 1)
    steps += [*near_backward, *far_turn] * (p - 1 - r)
    steps += [(near, INPUT), (far, INPUT)] * r
    steps += near_backward * (p - r)
    steps += [(far, WEIGHT)] * r + [(near, WEIGHT)] * r
    return [action for action in _numbered(steps) if action.microbatch < microbatches]


def _numbered(steps: Sequence[tuple[int, str]]) -> Iterator[Action]:
    """Microbatches 0, 1, 2, … to each kind on each stage."""
    counts: dict[tuple[int, str], int] = {}
    for step in steps:
        microbatch = counts.get(step, 0)
        counts[step] = microbatch + 1
        yield Action(*step, microbatch)


def dualpipev(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """DualPipeV: forwards of one direction overlapped with backwards of the other; M >= 2p."""
    p, r, near, far = ranks, rank, rank, 2 * ranks - 1 - rank
    order: list[Action] = []
    forwards, backwards = {near: 0, far: 0}, {near: 0, far: 0}
    pending: list[tuple[int, int]] = []  # input-backwards whose weights are still to come, oldest first

    def next_forward(stage: int) -> Action:
        forwards[stage] += 1
        return Action(stage, FORWARD, forwards[stage] - 1)

    def next_backward(stage: int, kind: str = BACKWARD) -> Action:
        backwards[stage] += 1
        if kind == INPUT:
            pending.append((stage, backwards[stage] - 1))
        return Action(stage, kind, backwards[stage] - 1)

    def oldest_weight() -> list[Action]:
        return [Action(stage, WEIGHT, i) for stage, i in (pending.pop(0),)] if pending else []

    def overlap(forward: int, backward: int) -> Action:
        return Action(-1, OVERLAP, -1, (next_forward(forward), next_backward(backward)))

    order += [next_forward(near) for _ in range(2 * (p - r - 1))]
    for _ in range(r + 1):
        order += [next_forward(near), next_forward(far)]
    for _ in range(p - r - 1):
        order.append(next_backward(far, INPUT))
        order += oldest_weight()
        order.append(next_forward(far))
    for i in range(microbatches - 2 * p + r + 1):
        # Where the two meet first, on the last rank, torch keeps them apart: overlapped they would make a bubble.
        order += [next_forward(near), next_backward(far)] if i == 0 and r == p - 1 else [overlap(near, far)]
        order.append(overlap(far, near))
    for _ in range(p - r - 1):
        order += [next_backward(far), overlap(far, near)]
    for i in range(2 * (r + 1)):  # the second half of these leaves its weights for the cool-down
        order.append(next_backward(near if i % 2 else far, BACKWARD if i < r + 1 else INPUT))
    for _ in range(p - r - 1):
        order += oldest_weight()
        order.append(next_backward(near, INPUT))
    for _ in range(r + 1):
        order += oldest_weight()
    return order
