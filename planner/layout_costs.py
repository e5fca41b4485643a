"""LayoutCosts: every second and byte of one layout as numbers per layer, from which any assignment is priced.

[Note: Linear in the assignment]
For a fixed layout each duration on a stage (forward, backward, gather, reduce, optimizer) and each byte is a
sum over the layers it holds, so it is linear in how many layers of each segment and recompute mode it has. What is
not linear, such as how much of a collective hides behind compute, is settled per layer beforehand.

[Note: Resharding]
Under zero 3 with gpipe or 1f1b each stage says what becomes of its layers' weights. `reshard: true`: freed after every
forward and backward, and gathered again for each. `false`: kept from the first forward to the reduction of the
gradients, gathered once; all stages so are zero 1. Neither: freed after forwards alone, as torch's pipeline has it, and
gathered for each backward, which leaves them where a microbatch's activations were; they add to the peak only what they
are more than those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from .in_flight import TURNED, InFlight, sums_nothing
from .layout import RECOMPUTE_MODES, Layout
from .memory_bytes import LaterMoment, MemoryBytes, PartMemory
from .part_seconds import PartSeconds, Seconds
from .schedule import Pipeline
from .simulation import Simulation, StageSeconds, simulate


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many layers of one segment a stage holds, by recompute mode."""

    none: int = 0
    selective: int = 0
    full: int = 0

    @property
    def total(self) -> int:
        return self.none + self.selective + self.full

    def of(self, mode: str) -> int:
        return self.none if mode == "none" else self.full if mode == "full" else self.selective


# What one stage holds: an entry a segment of the model. An assignment has one of these a stage.
StageCount = tuple[Blocks, ...]


@dataclass(frozen=True)
class SegmentCosts:
    """`layers` layers in a row of one kind, each with these seconds and bytes."""

    kind: str
    layers: int
    seconds: PartSeconds
    memory: PartMemory


_RankPart = tuple[int, PartMemory, int, str]


@dataclass(frozen=True)
class LayoutCosts:
    """One layout, priced. `microbatch` is what a microbatch costs any stage besides its layers, `hop_seconds` of each
    stage but the last what a message between it and the next takes, nothing on one rank.

    `fixed_memory` and `in_flight` have an entry a pipeline rank, the latter the vectors of [Note: In-flight
    activations] of which none is below another. `find_reductions` tells of each rank the moments at which it may be
    fuller.

    Where stages choose ([Note: Resharding]) `reshard` has each one's choice, and `choices` the layers by it; `segments`
    then have no more seconds and bytes than either, for bounds. `receives_early` is how the pipeline runs ([Note: Early
    receives] in event_graph.py).
    """

    layout: Layout
    microbatches: int
    segments: tuple[SegmentCosts, ...]
    embedding: PartSeconds
    head: PartSeconds
    microbatch: PartSeconds
    hop_seconds: tuple[float, ...]
    step_seconds: float
    embedding_memory: PartMemory
    head_memory: PartMemory
    fixed_memory: tuple[MemoryBytes, ...]
    in_flight: tuple[tuple[InFlight, ...], ...]
    allocator_slack: float
    reshard: tuple[bool | None, ...] = ()
    choices: tuple[tuple[bool | None, tuple[SegmentCosts, ...]], ...] = ()
    receives_early: bool = False
    find_reductions: Callable[[LayoutCosts], tuple[tuple[LaterMoment, ...], ...]] | None = field(
        default=None, compare=False
    )

    @cached_property
    def reductions(self) -> tuple[tuple[LaterMoment, ...], ...]:
        """Found when first asked for: bounds rule most layouts out without them."""
        return self.find_reductions(self) if self.find_reductions else ()

    def segments_if(self, reshard: bool | None) -> tuple[SegmentCosts, ...]:
        """The layers of a stage that has chosen so."""
        return dict(self.choices)[reshard] if self.choices else self.segments

    def segments_of(self, stage: int) -> tuple[SegmentCosts, ...]:
        """The layers as the stage has them."""
        return self.segments_if(self.reshard[stage]) if self.reshard else self.segments

    @property
    def pipeline(self) -> Pipeline:
        pipeline = self.layout.pipeline(self.microbatches)
        return replace(pipeline, receives_early=True) if self.receives_early else pipeline

    @cached_property
    def sent_before(self) -> tuple[float, ...]:
        """What one message each down to the stage takes, of every stage."""
        return tuple(accumulate(self.hop_seconds, initial=0.0))

    @property
    def layers(self) -> int:
        return sum(segment.layers for segment in self.segments)

    # ---- one stage -------------------------------------------------------------------------------------

    def stage_seconds(self, stage: int, count: StageCount) -> PartSeconds:
        """All phases of a stage; recomputation is apart from `backward_input`, under `recompute_full`."""
        total = self.ends_seconds(stage)
        again = Seconds()
        for segment, blocks in zip(self.segments_of(stage), count, strict=True):
            total = total + segment.seconds * blocks.total
            for mode in ("selective", "full"):
                if number := blocks.of(mode):
                    again = again + segment.seconds.recompute(mode) * number
        return PartSeconds(
            total.forward,
            total.backward_input,
            total.backward_weight,
            Seconds(),
            again,
            total.gather,
            total.reduce,
            total.optimizer,
        )

    def ends_seconds(self, stage: int) -> PartSeconds:
        """What the stage costs before it holds any layer."""
        total = self.microbatch
        if stage == 0:
            total = total + self.embedding
        if stage == self.layout.stages - 1:
            total = total + self.head
        return total

    @cached_property
    def stage_ends(self) -> tuple[PartSeconds, ...]:
        """`ends_seconds` of every stage; those between the first and the last are alike."""
        stages = self.layout.stages
        if stages == 1:
            return (self.ends_seconds(0),)
        return (self.ends_seconds(0), *[self.microbatch] * (stages - 2), self.ends_seconds(stages - 1))

    # ---- one rank --------------------------------------------------------------------------------------

    def rank_parts(self, rank: int, counts: Sequence[StageCount]) -> list[_RankPart]:
        """(local chunk, part, how many, mode) of all that a rank holds."""
        parts: list[_RankPart] = []
        for chunk, stage in enumerate(self.layout.stages_of(rank)):
            for segment, blocks in zip(self.segments_of(stage), counts[stage], strict=True):
                parts += [(chunk, segment.memory, blocks.of(mode), mode) for mode in RECOMPUTE_MODES]
        return [part for part in parts if part[2]] + self.end_parts(rank)

    def end_parts(self, rank: int) -> list[_RankPart]:
        """Of those the embedding and the head."""
        parts: list[_RankPart] = []
        if rank in (0, self.last_rank):
            stages = self.layout.stages_of(rank)
            if rank == 0:
                parts.append((0, self.embedding_memory, 1, "none"))
            if rank == self.last_rank:
                parts.append((stages.index(self.layout.stages - 1), self.head_memory, 1, "none"))
        return parts

    @cached_property
    def last_rank(self) -> int:
        """The rank of the last stage."""
        return self.pipeline.rank_of(self.layout.stages - 1)

    def rank_memory(self, rank: int, counts: Sequence[StageCount]) -> MemoryBytes:
        """Itemised bytes of a rank at its peak: the worst of its in-flight vectors."""
        parts = self.rank_parts(rank, counts)
        state, passing = self.fixed_memory[rank], self._passing_bytes(parts)
        for _, part, number, _ in parts:
            state = state + part.state * number
        worst = MemoryBytes()
        moments = [(one, MemoryBytes(transient=passing[sums_nothing(one)])) for one in self.backward_moments(rank)]
        for vector, held in moments + [(one.moment, self._besides(rank, one)) for one in self.later_moments(rank)]:
            for chunk, part, number, mode in parts:
                held = held + part.held_by(mode) * (number * vector.full[chunk])
                held = held + part.gradients_by(vector.phase(chunk), mode) * number
                if vector.weight_only[chunk]:
                    held = held + part.held_weight * (number * vector.weight_only[chunk])
            if held.total >= worst.total:
                worst = held
        return (state + worst).with_slack(self.allocator_slack)

    @property
    def last_recompute_least(self) -> bool:
        """Whether what passes in a stage's backward is what passes in the layers of each segment that recompute least.

        They come first in a backward. When it is another's turn their activations of the microbatch are gone, which are
        no less than what it recomputes. Without a pipeline, and with several chunks, all modes count.
        """
        return self.layout.pp > 1 and self.layout.virtual_stages == 1

    def _passing_bytes(self, parts: Sequence[_RankPart]) -> tuple[float, float]:
        """The most that passes in a backward of these parts, whether or not it `sums_nothing`. Those of a segment are
        beside each other, the mode of least recomputation first."""
        before = [None, *(part for _, part, _, _ in parts)]
        if not self.last_recompute_least:
            before = [None] * len(before)
        counted = [(part, mode) for (_, part, _, mode), last in zip(parts, before, strict=False) if part is not last]
        summed, nothing = (
            max((part.transient_by(mode, never_summed=first) for part, mode in counted), default=0.0)
            for first in (False, True)
        )
        return summed, nothing

    def backward_moments(self, rank: int) -> list[InFlight]:
        """Those at which a backward begins: what passes then depends on the rank's layers."""
        return [vector for vector in self.in_flight[rank] if not self.is_later(vector)]

    def is_later(self, vector: InFlight) -> bool:
        """Whether a chunk of a pipeline's rank has turned; without a pipeline that is like the begin of a backward."""
        return TURNED in vector.gradients and self.layout.pp > 1

    def later_moments(self, rank: int) -> list[LaterMoment]:
        """The others, and those of its reductions."""
        turned = [self.turned(rank, vector) for vector in self.in_flight[rank] if self.is_later(vector)]
        return turned + list(self.reductions[rank] if self.reductions else ())

    def turned(self, rank: int, vector: InFlight) -> LaterMoment:
        """The moment with what passes when a chunk has turned."""
        chunk = vector.gradients.index(TURNED)
        end = max((part.passing_turned for of, part, _, _ in self.end_parts(rank) if of == chunk), default=0.0)
        besides: dict[bool | None, MemoryBytes] = {}
        for choice, segments in self.choices or ((None, self.segments),):
            passing = max(end, *(segment.memory.passing_turned for segment in segments))
            besides[choice] = MemoryBytes(transient=passing)
        return LaterMoment(vector, chunk, besides)

    def _besides(self, rank: int, one: LaterMoment) -> MemoryBytes:
        """What a rank has at the moment besides its parts."""
        stage = self.layout.stages_of(rank)[one.chunk]
        return one.besides[self.reshard[stage] if self.reshard else None]

    @cached_property
    def _turned_bytes(self) -> list[list[float | None]]:
        """`_besides` of each rank's in-flight vectors, in all; None where a backward begins."""
        return [
            [self._besides(rank, self.turned(rank, one)).total if self.is_later(one) else None for one in vectors]
            for rank, vectors in enumerate(self.in_flight)
        ]

    @cached_property
    def _reduction_bytes(self) -> list[list[float]]:
        return [[self._besides(rank, one).total for one in moments] for rank, moments in enumerate(self.reductions)]

    def memory(self, counts: Sequence[StageCount]) -> list[MemoryBytes]:
        """Itemised peak bytes of each pipeline rank."""
        return [self.rank_memory(rank, counts) for rank in range(self.layout.pp)]

    def rank_bytes(self, rank: int, counts: Sequence[StageCount]) -> float:
        """The total of `rank_memory`, much sooner."""
        return max(self.moment_bytes(rank, counts))

    def moment_bytes(self, rank: int, counts: Sequence[StageCount]) -> list[float]:
        """Bytes of a rank at each of its in-flight vectors and then of its reductions."""
        return self._moment_bytes(rank, self.rank_parts(rank, counts))

    def end_moment_bytes(self, rank: int) -> list[float]:
        """The same of a rank without layers, but for its reductions: one moment where its ends hold no activations, nor
        gradients at some."""
        ends = self.end_parts(rank)
        if (ends and self.in_flight[rank][0].gradients) or any(
            part.totals.held["none"] or part.totals.held_weight for _, part, _, _ in ends
        ):
            return self._moment_bytes(rank, ends, len(self.in_flight[rank]))
        return self._moment_bytes(rank, ends, 1)

    def _moment_bytes(self, rank: int, parts: Sequence[_RankPart], moments: int | None = None) -> list[float]:
        fixed, kept, passing = self.fixed_memory[rank], 0.0, self._passing_bytes(parts)
        vectors = list(self.in_flight[rank][:moments])
        held = [
            passing[sums_nothing(vector)] if turned is None else turned
            for vector, turned in zip(vectors, self._turned_bytes[rank], strict=False)
        ]
        if moments is None and self.reductions:
            vectors += [one.moment for one in self.reductions[rank]]
            held += self._reduction_bytes[rank]
        for chunk, part, number, mode in parts:
            totals = part.totals
            kept += totals.state * number
            each, weight = number * totals.held[mode], number * totals.held_weight
            for i, vector in enumerate(vectors):
                held[i] += each * vector.full[chunk] + weight * vector.weight_only[chunk]
                held[i] += number * totals.gradients[vector.phase(chunk)][mode]
        beside = fixed.context + fixed.communicators
        slack = 1.0 + self.allocator_slack
        return [beside + slack * (fixed.total - beside + kept + most) for most in held]

    # ---- an assignment ---------------------------------------------------------------------------------

    def durations(self, counts: Sequence[StageCount]) -> list[StageSeconds]:
        """What the simulation needs of each stage."""
        return [self.stage_durations(stage, count) for stage, count in enumerate(counts)]

    def stage_durations(self, stage: int, count: StageCount) -> StageSeconds:
        """The same of one stage."""
        cost = self.stage_seconds(stage, count)
        return StageSeconds(
            forward=cost.forward.total,
            backward_input=cost.backward_input.total + cost.recompute_full.total,
            backward_weight=cost.backward_weight.total,
            gather=cost.gather.total,
            reduce=cost.reduce.total,
        )

    def optimizer_seconds(self, counts: Sequence[StageCount]) -> float:
        """The slowest rank's update; clipping has made every rank wait for every other before."""
        return max(
            sum(self.stage_seconds(s, counts[s]).optimizer.total for s in self.layout.stages_of(rank))
            for rank in range(self.layout.pp)
        )

    def simulate(self, counts: Sequence[StageCount]) -> Simulation:
        """The step up to the last gradient reduction."""
        return simulate(self.pipeline, self.durations(counts), self.hop_seconds)

    def step(self, counts: Sequence[StageCount]) -> float:
        """Seconds of the optimizer step under this assignment: the one objective of planner and brute force."""
        return self.simulate(counts).seconds + self.optimizer_seconds(counts) + self.step_seconds

    def breakdown(self, counts: Sequence[StageCount]) -> dict[str, float]:
        """Seconds of the step by cause, as the busiest rank lives them; they sum to `step`.

        That rank's own work by cause, then what the critical path spends on point-to-point, and the rest of
        the time as bubble.
        """
        simulation = self.simulate(counts)
        costs = [self.stage_seconds(s, count) for s, count in enumerate(counts)]
        work, recompute = [], []
        for rank in range(self.layout.pp):
            own, again = Seconds(), Seconds()
            for stage in self.layout.stages_of(rank):
                cost = costs[stage]
                own = own + (cost.forward + cost.backward + cost.recompute_full) * self.microbatches
                own = own + cost.gather + cost.reduce
                again = again + cost.recompute_full * self.microbatches
            work.append(own)
            recompute.append(again.compute)
        busiest = max(range(self.layout.pp), key=lambda rank: work[rank].total)
        spent = work[busiest]
        waiting = max(0.0, simulation.seconds - spent.total) if self.layout.pp > 1 else 0.0
        sends = min(waiting, simulation.critical_path.sent_seconds(self.hop_seconds))
        return {
            "compute": spent.compute - recompute[busiest],
            "recompute": recompute[busiest],
            "tp": spent.tp,
            "cp": spent.cp,
            "ep": spent.ep,
            "pp": sends + spent.pp,
            "bubble": waiting - sends,
            "dp_exposed": spent.dp,
            "optimizer": self.optimizer_seconds(counts) + self.step_seconds,
        }
