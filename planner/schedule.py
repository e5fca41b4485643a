"""Pipeline schedules as action lists, which of them torch can run, and what is in flight in them.

[Note: Action lists]
A schedule is one list of actions per pipeline rank. An action is written as torch writes it: stage, kind,
microbatch, so `1F0` is the forward of microbatch 0 on stage 1. Kinds: F forward, B whole backward, or the two
halves of it, I for the gradient of the stage's input and W for those of its weights. The same lists give the
in-flight counts and the simulation (`simulation.py`).

[Note: In flight]
A microbatch is in flight on a stage from its forward to its backward. Where the backward is split it gives up
most at I, and what W still needs at W. A rank with several chunks peaks for different sums of its chunks at
different times, so its in-flight is a set of vectors, and its activation bytes are the largest of the sums
Σ_c full[c]·held[c] + weight_only[c]·kept[c] over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from . import schedule_orders as orders
from .schedule_orders import Action

__all__ = [
    "BLOCKING",
    "FORWARDS_FIRST",
    "SPLIT_BACKWARD",
    "Action",
    "InFlight",
    "Pipeline",
    "action_lists",
    "held_by_torch",
    "in_flight",
    "input_halves",
    "least_in_flight",
    "why_illegal",
]

# They run a backward in two halves; recomputation does not go with that on torch.
SPLIT_BACKWARD = ("zb1p", "zbv", "dualpipev")
# Every forward of a step comes before the first backward.
FORWARDS_FIRST = ("gpipe", "looped-bfs")
# torch runs them with paired sends and receives that block the host ([Note: Blocking point-to-point]).
BLOCKING = ("gpipe", "1f1b")
_ONE_CHUNK, _V_SHAPED = BLOCKING, ("zbv", "dualpipev")
_IN_ROUNDS = ("interleaved-1f1b", "zb1p")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What fixes the action lists. `schedule` is one of `layout.SCHEDULES`, `chunks` the layout's virtual_stages."""

    schedule: str
    ranks: int
    chunks: int
    microbatches: int

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        """Stages go round the ranks, or in a V down and back up: stages 0 1 2 3 lie on ranks 0 1 0 1, or 0 1 1 0."""
        if self.schedule in _V_SHAPED and stage >= self.ranks:
            return 2 * self.ranks - 1 - stage
        return stage % self.ranks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The rank's stages from its first chunk to its last."""
        if self.schedule in _V_SHAPED:
            return rank, 2 * self.ranks - 1 - rank
        return tuple(range(rank, self.stages, self.ranks))


def why_illegal(pipeline: Pipeline) -> str | None:
    """Why torch refuses the schedule with these numbers, or None."""
    schedule, ranks, chunks, count = pipeline.schedule, pipeline.ranks, pipeline.chunks, pipeline.microbatches
    if schedule in _ONE_CHUNK and chunks != 1:
        return f"{schedule} runs one chunk a pipeline rank, and virtual_stages={chunks}"
    if schedule in _V_SHAPED and chunks != 2:
        return f"{schedule} runs exactly 2 chunks a pipeline rank, and virtual_stages={chunks}"
    if schedule == "1f1b" and count < ranks:
        return (
            f"1f1b with {count} microbatches and pp={ranks}: torch runs it only with at least as many microbatches "
            f"as stages"
        )
    if schedule == "dualpipev" and count < 2 * ranks:
        return (
            f"dualpipev with {count} microbatches and pp={ranks}: it needs at least as many microbatches as its "
            f"{2 * ranks} stages"
        )
    rounds = max(1, count // ranks)
    if schedule in _IN_ROUNDS and count % rounds:
        return (
            f"{schedule} with {count} microbatches and pp={ranks} runs in {rounds} rounds, and {rounds} does not "
            f"divide {count}"
        )
    return None


def action_lists(pipeline: Pipeline) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank, in order."""
    return tuple(tuple(_order(pipeline, rank)) for rank in range(pipeline.ranks))


def _order(pipeline: Pipeline, rank: int) -> list[Action]:
    ranks, chunks, count = pipeline.ranks, pipeline.chunks, pipeline.microbatches
    match pipeline.schedule:
        case "gpipe":
            return orders.gpipe(rank, count)
        case "1f1b":
            return orders.one_forward_one_backward(rank, ranks, count)
        case "interleaved-1f1b":
            return orders.interleaved(rank, ranks, chunks, count)
        case "looped-bfs":
            return orders.looped_bfs(rank, ranks, chunks, count)
        case "zb1p":
            return orders.zb1p(rank, ranks, chunks, count)
        case "zbv":
            return orders.zbv(rank, ranks, count)
        case "dualpipev":
            return orders.dualpipev(rank, ranks, count)
    raise AssertionError(pipeline.schedule)


# ---- in flight -----------------------------------------------------------------------------------------------


class InFlight(NamedTuple):
    """Microbatches in flight on a rank at one moment, per chunk from its first: `full` between the start of F and
    the end of I or B, `weight_only` from then to the end of W."""

    full: tuple[int, ...]
    weight_only: tuple[int, ...]


def in_flight(pipeline: Pipeline, part_of_full: bool = False) -> tuple[tuple[InFlight, ...], ...]:
    """Per rank, moments of its list such that no weighted sum (weights >= 0) is larger at any other moment.

    `part_of_full`: only sums that weigh a chunk's weight_only no more than its full, which takes far fewer moments.
    """
    return _in_flight(_shortest(pipeline), part_of_full)


@lru_cache(maxsize=1024)
def held_by_torch(pipeline: Pipeline) -> tuple[tuple[InFlight, ...], ...]:
    """`in_flight` as torch's runtime has it: on the first stage, whose input has no gradient, the input's half of a
    backward does nothing and all stays until the weights' (torch 2.13, `backward_one_chunk`)."""
    first, *others = in_flight(pipeline)
    if pipeline.schedule not in SPLIT_BACKWARD:
        return (first, *others)
    whole = {InFlight((v.full[0] + v.weight_only[0], *v.full[1:]), (0, *v.weight_only[1:])) for v in first}
    return (_largest(sorted(whole), part_of_full=False), *others)


@lru_cache(maxsize=4096)
def input_halves(pipeline: Pipeline) -> tuple[tuple[int, ...], ...]:
    """Per rank and chunk, input-halves of backwards that have begun when a rank is last as full as it gets: up to the
    first after its last forward."""
    shortest = _shortest(pipeline)
    # Microbatches beyond those of the shortest list are as many input-halves more, but in DualPipeV, which splits
    # backwards at its ends only.
    more = 0 if pipeline.schedule == "dualpipev" else pipeline.microbatches - shortest.microbatches
    counts = []
    for rank in range(pipeline.ranks):
        order = [part for action in _order(shortest, rank) for part in action.parts or (action,)]
        last = max(n for n, part in enumerate(order) if part.kind == orders.FORWARD)
        after = [n for n, part in enumerate(order) if n > last and part.kind == orders.INPUT][:1]
        begun = [part.stage for part in order[: after[0] + 1 if after else last] if part.kind == orders.INPUT]
        counts.append(tuple(begun.count(stage) + more for stage in pipeline.stages_of(rank)))
    return tuple(counts)


def _shortest(pipeline: Pipeline) -> Pipeline:
    """The fewest microbatches with the same vectors: between warm-up and cool-down the lists repeat themselves."""
    ranks, count = pipeline.ranks, pipeline.microbatches
    if pipeline.schedule in _IN_ROUNDS:
        size = orders.round_size(ranks, count)
        return replace(pipeline, microbatches=size * min(count // size, 3))
    if pipeline.schedule in _V_SHAPED:
        return replace(pipeline, microbatches=min(count, 2 * ranks + 1))
    return pipeline


@lru_cache(maxsize=1024)
def _in_flight(pipeline: Pipeline, part_of_full: bool) -> tuple[tuple[InFlight, ...], ...]:
    ranks, chunks, count = pipeline.ranks, pipeline.chunks, pipeline.microbatches
    if pipeline.schedule in FORWARDS_FIRST:
        return ((InFlight((count,) * chunks, (0,) * chunks),),) * ranks
    if pipeline.schedule == "1f1b":
        return tuple((InFlight((min(count, ranks - rank),), (0,)),) for rank in range(ranks))
    moments = _moments_in_rounds if pipeline.schedule in _IN_ROUNDS else _moments_of_list
    return tuple(_largest(moments(pipeline, rank), part_of_full) for rank in range(ranks))


def _moments_of_list(pipeline: Pipeline, rank: int) -> Iterator[InFlight]:
    """What is in flight while each backward of the rank's list runs; during a forward it is never more than then."""
    chunk_of = {stage: chunk for chunk, stage in enumerate(pipeline.stages_of(rank))}
    full, weight_only = [0] * pipeline.chunks, [0] * pipeline.chunks
    for action in _order(pipeline, rank):
        for part in action.parts or (action,):
            chunk = chunk_of[part.stage]
            if part.kind == orders.FORWARD:
                full[chunk] += 1
                continue
            yield InFlight(tuple(full), tuple(weight_only))
            full[chunk] -= part.kind != orders.WEIGHT
            weight_only[chunk] += (part.kind == orders.INPUT) - (part.kind == orders.WEIGHT)


def _moments_in_rounds(pipeline: Pipeline, rank: int) -> Iterator[InFlight]:
    """The same without the list, for interleaved 1F1B and ZB1P, where the vectors change direction.

    After w warm-up forwards, step j runs forward w+j and backward j and, in ZB1P, the weights of backward j-r. Per
    chunk, n forwards in order are a sum of ramps in n that bend at multiples of G, so the vectors are linear in j but
    where j, j+1, j-r or w+1+j is such a multiple, forwards run out or weights start.
    """
    ranks, chunks, count = pipeline.ranks, pipeline.chunks, pipeline.microbatches
    split, size, total = pipeline.schedule == "zb1p", orders.round_size(ranks, count), chunks * count
    warmup = orders.warmup_forwards(rank, ranks, chunks, count, per_hop=1 if split else 2)

    def forwards(n: int) -> list[int]:
        rounds, rest = divmod(n, chunks * size)
        return [rounds * size + min(max(rest - chunk * size, 0), size) for chunk in range(chunks)]

    def moment(forward: int, inputs: int, weights: int) -> InFlight:
        started, freed, gone = forwards(forward), forwards(inputs)[::-1], forwards(weights)[::-1]
        full = tuple(a - b for a, b in zip(started, freed, strict=True))
        return InFlight(full, tuple(a - b for a, b in zip(freed, gone, strict=True)))

    lag = rank if split else 0
    bends = {0, total - 1, total - 1 - warmup}
    for offset in (0, -1, lag, -1 - warmup):
        bends.update(range(offset % size, total, size))
    for j in sorted(bends):
        if 0 <= j < total:
            forward = min(warmup + 1 + j, total)
            if split:
                yield moment(forward, j, max(0, j - lag))
                yield moment(forward, j + 1, max(0, j - lag))
            else:
                yield moment(forward, j, j)


def _largest(moments: Iterable[InFlight], part_of_full: bool) -> tuple[InFlight, ...]:
    """The moments that matter: halfway between two others a sum is never the largest, nor below another throughout."""
    points = [moment.full + moment.weight_only for moment in dict.fromkeys(moments)]
    # The lists go on in patterns of up to six actions, so a straight run is found a few places before and after.
    ends = [
        point
        for n, point in enumerate(points)
        if not any(
            all(a + b == 2 * c for a, b, c in zip(points[n - step], points[n + step], point, strict=True))
            for step in range(1, min(6, n, len(points) - 1 - n) + 1)
        )
    ]
    chunks = len(points[0]) // 2
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # (what is compared, point)
    for point in ends:
        full, weight_only = point[:chunks], point[chunks:]
        mine = full + tuple(map(int.__add__, full, weight_only)) if part_of_full else point
        if not any(_within(mine, other) for other, _ in found):
            found = [each for each in found if not _within(each[0], mine)]
            found.append((mine, point))
    return tuple(InFlight(point[:chunks], point[chunks:]) for _, point in found)


def _within(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(map(int.__le__, a, b))


@lru_cache(maxsize=4096)
def least_in_flight(pipeline: Pipeline) -> tuple[int, ...]:
    """Per rank, microbatches that any layer holds at the rank's worst moment, in whichever chunk it lies."""
    return tuple(max(min(moment.full) for moment in moments) for moments in in_flight(pipeline))
