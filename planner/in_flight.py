"""What is in flight on each pipeline rank: the vectors that decide its activation bytes.

[Note: In flight]
A microbatch is in flight on a stage from its forward to its backward. Where the backward is split it gives up
most at I, and what W still needs at W. A rank with several chunks peaks for different sums of its chunks at
different times, so its in-flight is a set of vectors, and its activation bytes are the largest of the sums
Σ_c full[c]·held[c] + weight_only[c]·kept[c] over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import schedule_orders as orders
from .schedule import FORWARDS_FIRST, IN_ROUNDS, SPLIT_BACKWARD, V_SHAPED, Action, Pipeline, order_of

NO_GRADIENTS, LEAST, AHEAD, FIRST, FIRST_AHEAD, TURNED, SUMMED, REDUCED, ROOT, REDUCING = PHASES = (
    "none",
    "least",
    "ahead",
    "first",
    "first-ahead",
    "turned",
    "summed",
    "reduced",
    "root",
    "reducing",
)


class InFlight(NamedTuple):
    """Microbatches in flight on a rank at one moment, per chunk from its first: `full` between the start of F and
    the end of I or B, `weight_only` from then to the end of W.

    `gradients` has each chunk's phase ([Note: Gradients of a chunk] in gradient_moments.py), all SUMMED where it is
    empty.
    """

    full: tuple[int, ...]
    weight_only: tuple[int, ...]
    gradients: tuple[str, ...] = ()

    def phase(self, chunk: int) -> str:
        return self.gradients[chunk] if self.gradients else SUMMED


def sums_nothing(moment: InFlight) -> bool:
    """Whether no chunk has sums of gradients to add to."""
    return bool(moment.gradients) and SUMMED not in moment.gradients


def in_flight(pipeline: Pipeline, part_of_full: bool = False) -> tuple[tuple[InFlight, ...], ...]:
    """Per rank, moments of its list such that no weighted sum (weights >= 0) is larger at any other moment.

    `part_of_full`: only sums that weigh a chunk's weight_only no more than its full, which takes far fewer moments.
    """
    return _in_flight(shortest(pipeline), part_of_full)


def held_by_torch(pipeline: Pipeline) -> tuple[tuple[InFlight, ...], ...]:
    """`in_flight` as torch's runtime has it: on the first stage, whose input has no gradient, the input's half of a
    backward does nothing and all stays until the weights' (torch 2.13, `backward_one_chunk`)."""
    return _held_by_torch(shortest(pipeline))


@lru_cache(maxsize=4096)
def _held_by_torch(pipeline: Pipeline) -> tuple[tuple[InFlight, ...], ...]:
    first, *others = in_flight(pipeline)
    if pipeline.schedule not in SPLIT_BACKWARD:
        return (first, *others)
    whole = {(v.full[0] + v.weight_only[0], *v.full[1:], 0, *v.weight_only[1:]) for v in first}
    return (_largest(np.array(sorted(whole)), part_of_full=False), *others)


def parts_of(pipeline: Pipeline, rank: int) -> Iterator[tuple[Action, int]]:
    """The actions of the rank's list, those that overlap apart, each with its chunk."""
    chunk_of = {stage: chunk for chunk, stage in enumerate(pipeline.stages_of(rank))}
    for action in order_of(pipeline, rank):
        for part in action.parts or (action,):
            yield part, chunk_of[part.stage]


def input_halves(pipeline: Pipeline, rank: int) -> tuple[int, ...]:
    """Per chunk of a rank, input-halves of backwards that have begun when it is last as full as it gets: up to the
    first after its last forward."""
    few = shortest(pipeline)
    # Microbatches beyond those of the shortest list are as many input-halves more, but in DualPipeV, which splits
    # backwards at its ends only.
    more = 0 if pipeline.schedule == "dualpipev" else pipeline.microbatches - few.microbatches
    return tuple(begun + more for begun in _input_halves(few, rank))


@lru_cache(maxsize=16384)
def _input_halves(pipeline: Pipeline, rank: int) -> tuple[int, ...]:
    order = [part for part, _ in parts_of(pipeline, rank)]
    last = max(n for n, part in enumerate(order) if part.kind == orders.FORWARD)
    after = [n for n, part in enumerate(order) if n > last and part.kind == orders.INPUT][:1]
    begun = [part.stage for part in order[: after[0] + 1 if after else last] if part.kind == orders.INPUT]
    return tuple(begun.count(stage) for stage in pipeline.stages_of(rank))


def shortest(pipeline: Pipeline) -> Pipeline:
    """The fewest microbatches with the same vectors: between warm-up and cool-down the lists repeat themselves."""
    ranks, count, fewest = pipeline.ranks, pipeline.microbatches, pipeline.microbatches
    if pipeline.schedule in IN_ROUNDS:
        size = orders.round_size(ranks, count)
        fewest = size * min(count // size, 3)
    elif pipeline.schedule in V_SHAPED:
        fewest = min(count, 2 * ranks + 1)
    return pipeline if fewest == count else replace(pipeline, microbatches=fewest)


@lru_cache(maxsize=4096)
def _in_flight(pipeline: Pipeline, part_of_full: bool) -> tuple[tuple[InFlight, ...], ...]:
    ranks, chunks, count = pipeline.ranks, pipeline.chunks, pipeline.microbatches
    if pipeline.schedule in FORWARDS_FIRST:
        return ((InFlight((count,) * chunks, (0,) * chunks),),) * ranks
    if pipeline.schedule == "1f1b":
        return tuple((InFlight((min(count, ranks - rank),), (0,)),) for rank in range(ranks))
    return tuple(_largest(_moments(pipeline, rank), part_of_full) for rank in range(ranks))


def _moments(pipeline: Pipeline, rank: int) -> NDArray[np.int64]:
    """[moments, 2 * chunks]: `full` of each chunk, then `weight_only`, with all that `_largest` may keep."""
    return (_moments_in_rounds if pipeline.schedule in IN_ROUNDS else _moments_of_list)(pipeline, rank)


def _moments_of_list(pipeline: Pipeline, rank: int) -> NDArray[np.int64]:
    """What is in flight while each backward of the rank's list runs; during a forward it is never more than then."""
    now, moments = [0] * (2 * pipeline.chunks), []
    for part, chunk in parts_of(pipeline, rank):
        if part.kind == orders.FORWARD:
            now[chunk] += 1
            continue
        moments.append(tuple(now))
        now[chunk] -= part.kind != orders.WEIGHT
        now[pipeline.chunks + chunk] += (part.kind == orders.INPUT) - (part.kind == orders.WEIGHT)
    return np.array(moments)


def _moments_in_rounds(pipeline: Pipeline, rank: int) -> NDArray[np.int64]:
    """The same without the list, for interleaved 1F1B and ZB1P, where the vectors change direction.

    After w warm-up forwards, step j runs forward w+j and backward j and, in ZB1P, the weights of backward j-r. Per
    chunk, n forwards in order are a sum of ramps in n that bend at multiples of G, so the vectors are linear in j but
    where j, j+1, j-r or w+1+j is such a multiple, forwards run out or weights start.
    """
    ranks, chunks, count = pipeline.ranks, pipeline.chunks, pipeline.microbatches
    split, size, total = pipeline.schedule == "zb1p", orders.round_size(ranks, count), chunks * count
    warmup = orders.warmup_forwards(rank, ranks, chunks, count, per_hop=1 if split else 2)
    before = size * np.arange(chunks)

    def forwards(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        rounds, rest = np.divmod(numbers[:, None], chunks * size)
        return rounds * size + np.clip(rest - before, 0, size)

    lag = rank if split else 0
    bends = {0, total - 1, total - 1 - warmup}
    for offset in (0, -1, lag, -1 - warmup):
        bends.update(range(offset % size, total, size))
    steps = np.array(sorted(j for j in bends if 0 <= j < total))
    # In ZB1P a step has two moments, before and after its input's half.
    inputs = np.stack([steps, steps + 1], axis=1).ravel() if split else steps
    steps = np.repeat(steps, 2) if split else steps
    started, freed = forwards(np.minimum(warmup + 1 + steps, total)), forwards(inputs)[:, ::-1]
    gone = forwards(np.maximum(steps - lag, 0))[:, ::-1] if split else freed
    return np.concatenate([started - freed, freed - gone], axis=1)


def _largest(moments: NDArray[np.int64], part_of_full: bool) -> tuple[InFlight, ...]:
    """Of `_moments` those that matter: halfway between two others a sum is never the largest, nor below another
    throughout."""
    points = np.array(list(dict.fromkeys(map(tuple, moments.tolist()))))
    # The lists go on in patterns of up to six actions, so a straight run is found a few places before and after.
    straight = np.zeros(len(points), dtype=bool)
    for step in range(1, min(6, (len(points) - 1) // 2) + 1):
        between = points[: -2 * step] + points[2 * step :] == 2 * points[step:-step]
        straight[step:-step] |= between.all(axis=1)
    ends = points[~straight]
    chunks = points.shape[1] // 2
    full, weight_only = ends[:, :chunks], ends[:, chunks:]
    compared = np.concatenate([full, full + weight_only], axis=1) if part_of_full else ends
    within = (compared[:, None, :] <= compared[None, :, :]).all(axis=2)
    kept = within.sum(axis=1) == 1  # in itself alone
    return tuple(
        InFlight(tuple(f), tuple(w)) for f, w in zip(full[kept].tolist(), weight_only[kept].tolist(), strict=True)
    )


def least_in_flight(pipeline: Pipeline) -> tuple[int, ...]:
    """Per rank, microbatches that any layer holds at the rank's worst moment, in whichever chunk it lies."""
    return _least_in_flight(shortest(pipeline))


@lru_cache(maxsize=4096)
def _least_in_flight(pipeline: Pipeline) -> tuple[int, ...]:
    if pipeline.schedule in (*FORWARDS_FIRST, "1f1b"):
        return tuple(min(moment.full) for (moment,) in in_flight(pipeline))
    # Of all moments, which takes far less than finding those that matter to some sum.
    each = (_moments(pipeline, rank)[:, : pipeline.chunks] for rank in range(pipeline.ranks))
    return tuple(int(full.min(axis=1).max()) for full in each)


@lru_cache(maxsize=4096)
def least_of_any(pipelines: tuple[tuple[str, int], ...], ranks: int, microbatches: int) -> tuple[int, ...]:
    """The least `least_in_flight` of each rank under any of these (schedule, chunks)."""
    every = (least_in_flight(Pipeline(schedule, ranks, chunks, microbatches)) for schedule, chunks in pipelines)
    return tuple(map(min, zip(*every, strict=True)))


@lru_cache(maxsize=16384)
def most_outputs(pipeline: Pipeline, rank: int, received: bool) -> int:
    """Outputs of a rank's stages that torch's pipeline holds at once, less inputs `received` in a buffer.

    It keeps the output of each microbatch in flight (`fwd_cache`); the last stage's is the loss. From the input's half
    of a split backward on, the gradient of that output is a receive buffer. Where the next stage is on the same rank
    its output is the buffer.
    """
    held = pipeline.stages_of(rank)
    buffered = [s > 0 and received for s in held]
    sent = [s < pipeline.stages - 1 and s + 1 not in held for s in held]
    kept = [0]
    for moment in held_by_torch(pipeline)[rank]:
        full = sum(n * (s - r) for n, s, r in zip(moment.full, sent, buffered, strict=True))
        kept.append(full - sum(n * r for n, r in zip(moment.weight_only, buffered, strict=True)))
    return max(kept)
