"""Bytes of one rank by what they are for, and what one part of the model adds to them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

from .layout import RECOMPUTE_MODES


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of one rank, by what they are for; they add up and scale."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered_weights: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    transient: float = 0.0
    pipeline_buffers: float = 0.0
    communicators: float = 0.0
    context: float = 0.0
    allocator_slack: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def items(self) -> dict[str, float]:
        return dict(vars(self))

    def __add__(self, other: MemoryBytes) -> MemoryBytes:
        return MemoryBytes(*map(operator.add, vars(self).values(), vars(other).values()))

    def with_slack(self, share: float) -> MemoryBytes:
        """Add what the allocator loses: a share of the tensor bytes."""
        tensors = self.total - self.context - self.communicators
        return self + MemoryBytes(allocator_slack=share * tensors)

    def __mul__(self, factor: float) -> MemoryBytes:
        return MemoryBytes(*(value * factor for value in vars(self).values()))


NO_BYTES = MemoryBytes()


@dataclass(frozen=True)
class PartTotals:
    """A part's bytes without what they are for."""

    state: float
    left: dict[str, float]
    held: dict[str, float]
    held_weight: float


@dataclass(frozen=True)
class PartMemory:
    """What one part of the model (a layer, the embedding, the head) adds to its rank.

    `held` per in-flight microbatch without recomputation, `held_selective` and `held_recomputed` with it,
    `held_weight` between the two halves of a split backward. `left` (`left_selective`, `left_recomputed`) are gathered
    weights that a backward leaves where its activations were, as far as they are more. `transient` is the most that its
    backward needs at once beyond what is held, and with recomputation the activations that come back for one layer at a
    time.
    """

    state: MemoryBytes = NO_BYTES
    held: MemoryBytes = NO_BYTES
    held_recomputed: MemoryBytes = NO_BYTES
    transient: float = 0.0
    transient_recomputed: float = 0.0
    held_selective: MemoryBytes = NO_BYTES
    transient_selective: float = 0.0
    held_weight: MemoryBytes = NO_BYTES
    left: float = 0.0
    left_selective: float = 0.0
    left_recomputed: float = 0.0

    @cached_property
    def totals(self) -> PartTotals:
        return PartTotals(
            state=self.state.total,
            left={mode: self.left_by(mode) for mode in RECOMPUTE_MODES},
            held={mode: self.held_by(mode).total for mode in RECOMPUTE_MODES},
            held_weight=self.held_weight.total,
        )

    def held_by(self, mode: str) -> MemoryBytes:
        return {"none": self.held, "selective": self.held_selective, "full": self.held_recomputed}[mode]

    def left_by(self, mode: str) -> float:
        return {"none": self.left, "selective": self.left_selective, "full": self.left_recomputed}[mode]

    def transient_by(self, mode: str) -> float:
        return {"none": self.transient, "selective": self.transient_selective, "full": self.transient_recomputed}[mode]
