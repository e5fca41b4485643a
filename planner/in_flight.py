"""What is in flight on each pipeline rank: the vectors that decide its activation bytes.

[Note: In flight]
A microbatch is in flight on a stage from its forward to its backward. Where the backward is split it gives up
most at I, and what W still needs at W. A rank with several chunks peaks for different sums of its chunks at
different times, so its in-flight is a set of vectors, and its activation bytes are the largest of the sums
Σ_c full[c]·held[c] + weight_only[c]·kept[c] over them.

[Note: Gradients of a chunk]
Gradients in fp32 appear during a chunk's first backward and go, but for a rank's shard, when the chunk's last one is
over and they are reduced (torch 2.13, `_add_reduce_grad`). So at a moment a chunk has NO_GRADIENTS yet; or its FIRST
backward begins, with everything that it ever has in flight still there; or all its layers have TURNED, one by one from
the last, from activations of that microbatch to gradients; or they are SUMMED; or REDUCED. In between it holds no more:
of its layers the last recompute least, so that bytes fall before they rise. Of the first two there is another, where
torch's pipeline has gathered the chunk as a whole before its first layer needs it: AHEAD and FIRST_AHEAD.

Under a pipeline a chunk is reduced group by group when its last backward is over: first FSDP2's root group, its
embedding and head (ROOT), then one layer after the other (REDUCING), of which the first is the worst moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import schedule_orders as orders
from .schedule import BLOCKING, FORWARDS_FIRST, IN_ROUNDS, SPLIT_BACKWARD, V_SHAPED, Action, Pipeline, order_of

NO_GRADIENTS, AHEAD, FIRST, FIRST_AHEAD, TURNED, SUMMED, REDUCED, ROOT, REDUCING = PHASES = (
    "none",
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

    `gradients` has each chunk's phase ([Note: Gradients of a chunk]), all SUMMED where it is empty.
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


# Stages of a rank that torch's pipeline has gathered at once (torch 2.13, `_add_unshard_reshard`).
STAGES_GATHERED = 3


def gradients_by_torch(pipeline: Pipeline) -> tuple[tuple[InFlight, ...], ...]:
    """`held_by_torch` with what gradients each chunk has at each moment, where that is not the sums of all.

    It is not where all forwards come first, on the first rank of 1F1B when there are no more microbatches than
    ranks, and with so few in the schedules of several chunks.
    """
    chunks, count = pipeline.chunks, pipeline.microbatches
    if pipeline.schedule in FORWARDS_FIRST:
        return (_chunks_turned(chunks, count),) * pipeline.ranks
    if few_microbatches(pipeline):
        return tuple(_phases_of_list(replace(pipeline, receives_early=False), rank) for rank in range(pipeline.ranks))
    held = held_by_torch(pipeline)
    if pipeline.schedule == "1f1b":
        few = [count <= pipeline.ranks - rank for rank in range(pipeline.ranks)]
        return tuple(_chunks_turned(1, count) if first else own for first, own in zip(few, held, strict=True))
    return held


def few_microbatches(pipeline: Pipeline) -> bool:
    """Whether so few are in flight that a rank is fullest while some of its chunks have no gradients yet. DualPipeV
    runs twice as many through its ranks before it repeats itself."""
    fewest = pipeline.ranks * (2 if pipeline.schedule == "dualpipev" else 1)
    return pipeline.schedule not in BLOCKING and pipeline.microbatches <= fewest


def _parts_of(pipeline: Pipeline, rank: int) -> Iterator[tuple[Action, int]]:
    """The actions of the rank's list, those that overlap apart, each with its chunk."""
    chunk_of = {stage: chunk for chunk, stage in enumerate(pipeline.stages_of(rank))}
    for action in order_of(pipeline, rank):
        for part in action.parts or (action,):
            yield part, chunk_of[part.stage]


@lru_cache(maxsize=16384)
def _phases_of_list(pipeline: Pipeline, rank: int) -> tuple[InFlight, ...]:
    """What is in flight, and the phase of each chunk, while each backward of the rank's list runs."""
    chunks, moments = pipeline.chunks, dict[tuple[int, ...], InFlight]()
    full, weight_only, done = [0] * chunks, [0] * chunks, [0] * chunks
    for part, chunk in _parts_of(pipeline, rank):
        if part.kind == orders.FORWARD:
            full[chunk] += 1
            continue
        phases = [_phase(number, pipeline.microbatches) for number in done]
        turns = part.kind != orders.INPUT and done[chunk] == 0
        moment = _at(full, weight_only, phases, chunk, FIRST if turns else phases[chunk])
        moments.setdefault(_as_numbers(moment), moment)
        # The first stage's input has no gradient ([Note: In flight], `held_by_torch`).
        halves = part.stage > 0 and part.kind != orders.BACKWARD
        full[chunk] -= part.kind == orders.INPUT if halves else part.kind != orders.INPUT
        weight_only[chunk] += ((part.kind == orders.INPUT) - (part.kind == orders.WEIGHT)) * halves
        done[chunk] += part.kind != orders.INPUT
        if turns:
            moment = _at(full, weight_only, phases, chunk, TURNED)
            moments.setdefault(_as_numbers(moment), moment)
    numbers = np.array(list(moments))
    kept = (numbers[:, None, :] <= numbers[None, :, :]).all(axis=2).sum(axis=1) == 1  # in itself alone
    return tuple(moment for moment, stays in zip(moments.values(), kept.tolist(), strict=True) if stays)


def _at(full: list[int], weight_only: list[int], phases: list[str], chunk: int, phase: str) -> InFlight:
    """A moment at which one chunk has that phase and the others theirs."""
    return InFlight(tuple(full), tuple(weight_only), (*phases[:chunk], phase, *phases[chunk + 1 :]))


def _phase(backwards: int, microbatches: int) -> str:
    """Of a chunk with so many behind it, while none of its own is the first."""
    return NO_GRADIENTS if backwards == 0 else REDUCED if backwards == microbatches else SUMMED


def _as_numbers(moment: InFlight) -> tuple[int, ...]:
    """Of two moments one holds no less than the other where none of these is less: sums are more than anything."""
    phases = moment.gradients
    early = [phase in (FIRST, TURNED, SUMMED) for phase in phases]
    late = [phase in (REDUCED, TURNED, SUMMED) for phase in phases]
    summed = [phase == SUMMED for phase in phases]  # an embedding has more then than when its chunk has turned
    return (*moment.full, *moment.weight_only, *map(int, early + late + summed))


@lru_cache(maxsize=4096)
def _chunks_turned(chunks: int, count: int) -> tuple[InFlight, ...]:
    """Begin and end of each chunk's first backward and begin of its second, from the last chunk to the first, with
    `count` microbatches in flight in each chunk not yet done. A chunk evicted in the forward passes is gathered again
    two chunks before its turn."""
    evicted, moments = range(chunks - STAGES_GATHERED), []
    for turned in reversed(range(chunks)):
        full = tuple(count if chunk <= turned else 0 for chunk in range(chunks))
        fewer = (*full[:turned], count - 1, *full[turned + 1 :])
        again = [chunk in evicted and chunk > turned - STAGES_GATHERED for chunk in range(turned + 1)]
        before = tuple(AHEAD if ahead else NO_GRADIENTS for ahead in again[:-1])
        after = (REDUCED,) * (chunks - 1 - turned)
        moments.append(InFlight(full, (0,) * chunks, (*before, FIRST_AHEAD if again[-1] else FIRST, *after)))
        for phase in (TURNED, SUMMED) if count > 1 else (TURNED,):
            moments.append(InFlight(fewer, (0,) * chunks, (*before, phase, *after)))
    return tuple(moments)


def reducing_by_torch(pipeline: Pipeline) -> tuple[tuple[InFlight, ...], ...]:
    """Per rank, the moments at which one of its chunks is reduced."""
    return _reducing_by_torch(replace(shortest(pipeline), receives_early=False))


@lru_cache(maxsize=4096)
def _reducing_by_torch(pipeline: Pipeline) -> tuple[tuple[InFlight, ...], ...]:
    chunks, count = pipeline.chunks, pipeline.microbatches
    if chunks == 1:
        done = [InFlight((0,), (0,), (TURNED,))]
        return (_reducing_as(done),) * pipeline.ranks
    if pipeline.schedule in FORWARDS_FIRST:
        turned = [one for one in _chunks_turned(chunks, count) if TURNED in one.gradients]
        done = [one._replace(full=(*one.full[:c], 0, *one.full[c + 1 :])) for c, one in enumerate(reversed(turned))]
        return (_reducing_as(done[::-1]),) * pipeline.ranks
    return tuple(_reducing_as(_done_of_list(pipeline, rank)) for rank in range(pipeline.ranks))


def _reducing_as(moments: Sequence[InFlight]) -> tuple[InFlight, ...]:
    """The same with the chunk that has TURNED in either phase of its reduction."""
    return tuple(
        moment._replace(gradients=tuple(phase if own == TURNED else own for own in moment.gradients))
        for moment in moments
        for phase in (ROOT, REDUCING)
    )


def _done_of_list(pipeline: Pipeline, rank: int) -> list[InFlight]:
    """What is in flight when each chunk's last backward is over, and the phases: TURNED is this chunk's."""
    full, weight_only, done = ([0] * pipeline.chunks for _ in range(3))
    moments = []
    for part, chunk in _parts_of(pipeline, rank):
        if part.kind == orders.FORWARD:
            full[chunk] += 1
            continue
        full[chunk] -= part.kind != orders.WEIGHT
        weight_only[chunk] += (part.kind == orders.INPUT) - (part.kind == orders.WEIGHT)
        done[chunk] += part.kind != orders.INPUT
        if part.kind != orders.INPUT and done[chunk] == pipeline.microbatches:
            phases = [_phase(number, pipeline.microbatches) for number in done]
            moments.append(_at(full, weight_only, phases, chunk, TURNED))
    return moments


def least_phases_by_torch(pipeline: Pipeline) -> tuple[str, ...]:
    """`least_phases` of `gradients_by_torch`, or fewer, without the moments where that needs none."""
    if pipeline.schedule in (*FORWARDS_FIRST, "1f1b"):
        return least_phases(gradients_by_torch(pipeline))
    return (NO_GRADIENTS if few_microbatches(pipeline) else SUMMED,) * pipeline.ranks


def least_phases(moments: tuple[tuple[InFlight, ...], ...]) -> tuple[str, ...]:
    """Per rank, the phase of all its chunks at all moments; NO_GRADIENTS, of the fewest bytes, where they differ."""
    return tuple(_one_phase(of_rank) for of_rank in moments)


def _one_phase(moments: tuple[InFlight, ...]) -> str:
    """Of a rank, whose moments all have phases or none does."""
    if not moments[0].gradients:
        return SUMMED
    first = moments[0].gradients[0]
    alike = all(phase == first for moment in moments for phase in moment.gradients)
    return first if alike else NO_GRADIENTS


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
    order = [part for part, _ in _parts_of(pipeline, rank)]
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
    for part, chunk in _parts_of(pipeline, rank):
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
def least_of_any_chunks(schedule: str, ranks: int, chunks: tuple[int, ...], microbatches: int) -> tuple[int, ...]:
    """The least `least_in_flight` of each rank with any of these numbers of chunks."""
    every = (least_in_flight(Pipeline(schedule, ranks, number, microbatches)) for number in chunks)
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
