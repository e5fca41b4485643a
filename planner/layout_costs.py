"""LayoutCosts: every second and byte of one layout as numbers per layer, from which any assignment is priced.

Bytes are linear in the assignment as seconds are ([Note: Linear in the assignment] in layout_seconds.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import RECOMPUTE_MODES
from .layout_seconds import Blocks, LayoutSeconds, SegmentSeconds, StageCount
from .memory_bytes import MemoryBytes, PartMemory
from .schedule import InFlight

__all__ = ["Blocks", "LayoutCosts", "SegmentCosts", "StageCount"]


@dataclass(frozen=True)
class SegmentCosts(SegmentSeconds):
    """`layers` layers in a row of one kind, each with these seconds and bytes."""

    memory: PartMemory


@dataclass(frozen=True)
class LayoutCosts(LayoutSeconds):
    """One layout, priced.

    `fixed_memory` and `in_flight` have an entry a pipeline rank, the latter the vectors of [Note: In-flight
    activations] of which none is below another.
    """

    segments: tuple[SegmentCosts, ...]
    embedding_memory: PartMemory
    head_memory: PartMemory
    fixed_memory: tuple[MemoryBytes, ...]
    in_flight: tuple[tuple[InFlight, ...], ...]
    allocator_slack: float

    # ---- one rank --------------------------------------------------------------------------------------

    def rank_parts(self, rank: int, counts: Sequence[StageCount]) -> list[tuple[int, PartMemory, int, str]]:
        """(local chunk, part, how many, mode) of all that a rank holds."""
        parts: list[tuple[int, PartMemory, int, str]] = []
        for chunk, stage in enumerate(self.layout.stages_of(rank)):
            for segment, blocks in zip(self.segments, counts[stage], strict=True):
                parts += [(chunk, segment.memory, blocks.of(mode), mode) for mode in RECOMPUTE_MODES]
            if stage == 0:
                parts.append((chunk, self.embedding_memory, 1, "none"))
            if stage == self.layout.stages - 1:
                parts.append((chunk, self.head_memory, 1, "none"))
        return [part for part in parts if part[2]]

    def rank_memory(self, rank: int, counts: Sequence[StageCount]) -> MemoryBytes:
        """Itemised bytes of a rank at its peak: the worst of its in-flight vectors."""
        parts = self.rank_parts(rank, counts)
        state, transient = self.fixed_memory[rank], 0.0
        for _, part, number, mode in parts:
            state = state + part.state * number
            transient = max(transient, part.transient_by(mode))
        worst = MemoryBytes()
        for vector in self.in_flight[rank]:
            held = MemoryBytes()
            for chunk, part, number, mode in parts:
                held = held + part.held_by(mode) * (number * vector.full[chunk])
                if vector.weight_only[chunk]:
                    held = held + part.held_weight * (number * vector.weight_only[chunk])
            if held.total >= worst.total:
                worst = held
        return (state + worst + MemoryBytes(transient=transient)).with_slack(self.allocator_slack)

    def memory(self, counts: Sequence[StageCount]) -> list[MemoryBytes]:
        """Itemised peak bytes of each pipeline rank."""
        return [self.rank_memory(rank, counts) for rank in range(self.layout.pp)]

    def rank_bytes(self, rank: int, counts: Sequence[StageCount]) -> float:
        """The total of `rank_memory`, much sooner."""
        return max(self.moment_bytes(rank, counts))

    def moment_bytes(self, rank: int, counts: Sequence[StageCount]) -> list[float]:
        """Bytes of a rank at each of its in-flight vectors."""
        fixed, kept, transient = self.fixed_memory[rank], 0.0, 0.0
        parts = self.rank_parts(rank, counts)
        held = [0.0] * len(self.in_flight[rank])
        for chunk, part, number, mode in parts:
            totals = part.totals
            kept += totals.state * number
            transient = max(transient, part.transient_by(mode))
            each, weight = number * totals.held[mode], number * totals.held_weight
            for i, vector in enumerate(self.in_flight[rank]):
                held[i] += each * vector.full[chunk] + weight * vector.weight_only[chunk]
        beside = fixed.context + fixed.communicators
        slack = 1.0 + self.allocator_slack
        return [beside + slack * (fixed.total - beside + kept + most + transient) for most in held]
