"""When the gradients of each chunk of a pipeline rank come and go, and what is in flight then.

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

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from . import schedule_orders as orders
from .in_flight import (
    AHEAD,
    FIRST,
    FIRST_AHEAD,
    LEAST,
    NO_GRADIENTS,
    REDUCED,
    REDUCING,
    ROOT,
    SUMMED,
    TURNED,
    InFlight,
    held_by_torch,
    parts_of,
    shortest,
)
from .schedule import BLOCKING, FORWARDS_FIRST, Action, Pipeline

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


@lru_cache(maxsize=16384)
def _phases_of_list(pipeline: Pipeline, rank: int) -> tuple[InFlight, ...]:
    """What is in flight, and the phase of each chunk, while each backward of the rank's list runs."""
    chunks, moments = pipeline.chunks, dict[tuple[int, ...], InFlight]()
    full, weight_only, done = [0] * chunks, [0] * chunks, [0] * chunks
    for part, chunk in parts_of(pipeline, rank):
        if part.kind == orders.FORWARD:
            full[chunk] += 1
            continue
        phases = [_phase(number, pipeline.microbatches) for number in done]
        turns = part.kind != orders.INPUT and done[chunk] == 0
        moment = _at(full, weight_only, phases, chunk, FIRST if turns else phases[chunk])
        moments.setdefault(_as_numbers(moment), moment)
        _end_part(part, chunk, full, weight_only)
        done[chunk] += part.kind != orders.INPUT
        if turns:
            moment = _at(full, weight_only, phases, chunk, TURNED)
            moments.setdefault(_as_numbers(moment), moment)
    numbers = np.array(list(moments))
    kept = (numbers[:, None, :] <= numbers[None, :, :]).all(axis=2).sum(axis=1) == 1  # in itself alone
    return tuple(moment for moment, stays in zip(moments.values(), kept.tolist(), strict=True) if stays)


def _end_part(part: Action, chunk: int, full: list[int], weight_only: list[int]) -> None:
    """What is in flight on a rank once a backward of its list, or half of one, is over. The first stage's input has no
    gradient, so that its half does nothing (`held_by_torch`)."""
    if part.kind == orders.BACKWARD or part.stage == 0:
        full[chunk] -= part.kind != orders.INPUT
        return
    full[chunk] -= part.kind == orders.INPUT
    weight_only[chunk] += (part.kind == orders.INPUT) - (part.kind == orders.WEIGHT)


def _at(full: list[int], weight_only: list[int], phases: list[str], chunk: int, phase: str) -> InFlight:
    """A moment at which one chunk has that phase and the others theirs."""
    return InFlight(tuple(full), tuple(weight_only), (*phases[:chunk], phase, *phases[chunk + 1 :]))


def _phase(backwards: int, microbatches: int) -> str:
    """Of a chunk with so many behind it, while none of its own is the first."""
    return NO_GRADIENTS if backwards == 0 else REDUCED if backwards == microbatches else SUMMED


def _as_numbers(moment: InFlight) -> tuple[int, ...]:
    """Of two moments one holds no less than the other where none of these is less: sums are more than anything, and
    weights go when they are reduced."""
    phases = moment.gradients
    early = [phase in (FIRST, TURNED, SUMMED) for phase in phases]
    late = [phase in (REDUCED, TURNED, SUMMED) for phase in phases]
    summed = [phase == SUMMED for phase in phases]  # an embedding has more then than when its chunk has turned
    gathered = [phase != REDUCED for phase in phases]
    return (*moment.full, *moment.weight_only, *map(int, early + late + summed + gathered))


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
    for part, chunk in parts_of(pipeline, rank):
        if part.kind == orders.FORWARD:
            full[chunk] += 1
            continue
        _end_part(part, chunk, full, weight_only)
        done[chunk] += part.kind != orders.INPUT
        if part.kind != orders.INPUT and done[chunk] == pipeline.microbatches:
            phases = [_phase(number, pipeline.microbatches) for number in done]
            moments.append(_at(full, weight_only, phases, chunk, TURNED))
    return moments


@lru_cache(maxsize=4096)
def least_phases_of_any(pipelines: tuple[tuple[str, int], ...], ranks: int, microbatches: int) -> tuple[str, ...]:
    """Per rank, a phase that no chunk has fewer bytes in at its rank's worst moment under any of these (schedule,
    chunks): LEAST where they differ."""
    every = [_phases_by_torch(Pipeline(schedule, ranks, chunks, microbatches)) for schedule, chunks in pipelines]
    return tuple(of_rank[0] if len(set(of_rank)) == 1 else LEAST for of_rank in zip(*every, strict=True))


def _phases_by_torch(pipeline: Pipeline) -> tuple[str, ...]:
    """`least_phases` of `gradients_by_torch`, or fewer, without the moments where that needs none."""
    if pipeline.schedule in (*FORWARDS_FIRST, "1f1b"):
        return least_phases(gradients_by_torch(pipeline))
    return (NO_GRADIENTS if few_microbatches(pipeline) else SUMMED,) * pipeline.ranks


def least_phases(moments: tuple[tuple[InFlight, ...], ...]) -> tuple[str, ...]:
    """Per rank, the phase of all its chunks at all moments; where they differ NO_GRADIENTS, of the fewest bytes, or
    LEAST, of fewer yet, where at each some have been reduced and their gathered weights are gone."""
    return tuple(_one_phase(of_rank) for of_rank in moments)


def _one_phase(moments: tuple[InFlight, ...]) -> str:
    """Of a rank, whose moments all have phases or none does."""
    if not moments[0].gradients:
        return SUMMED
    first = moments[0].gradients[0]
    alike = all(phase == first for moment in moments for phase in moment.gradients)
    if alike:
        return first
    return LEAST if all(REDUCED in moment.gradients for moment in moments) else NO_GRADIENTS
