"""Bytes of one rank by what they are for, and what one part of the model adds to them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .in_flight import AHEAD, FIRST, FIRST_AHEAD, LEAST, NO_GRADIENTS, REDUCING, ROOT, SUMMED, TURNED, InFlight
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


class LaterMoment(NamedTuple):
    """A moment at which a rank's chunk has turned or is reduced, and what the rank has then besides its parts, whatever
    its layers, by the choice of that chunk's stage ([Note: Resharding] in layout_costs.py)."""

    moment: InFlight
    chunk: int
    besides: Mapping[bool | None, MemoryBytes]


class _GradientBytes(dict[str, dict[str, float]]):
    """Bytes of gradients by phase and by mode, each phase summed up when it is first asked for: most never are."""

    def __init__(self, part: PartMemory) -> None:
        super().__init__()
        self._part = part

    def __missing__(self, phase: str) -> dict[str, float]:
        found = self[phase] = {mode: self._part.gradients_by(phase, mode).total for mode in RECOMPUTE_MODES}
        return found


@dataclass(frozen=True)
class PartTotals:
    """A part's bytes without what they are for."""

    state: float
    held: dict[str, float]
    held_weight: float
    gradients: dict[str, dict[str, float]]  # by phase, by mode


def least_totals(parts: Sequence[PartMemory], phases: Iterable[str]) -> PartTotals:
    """No part has fewer bytes, for whatever they are; gradients in these phases."""
    if len(parts) == 1:
        return parts[0].totals
    totals = [part.totals for part in parts]
    return PartTotals(
        state=min(one.state for one in totals),
        held={mode: min(one.held[mode] for one in totals) for mode in RECOMPUTE_MODES},
        held_weight=min(one.held_weight for one in totals),
        gradients={
            phase: {mode: min(one.gradients[phase][mode] for one in totals) for mode in RECOMPUTE_MODES}
            for phase in set(phases)
        },
    )


@dataclass(frozen=True)
class PartMemory:
    """What one part of the model (a layer, the embedding, the head) adds to its rank.

    `state` is always there. `first`, `turned`, `summed` and `reduced` are gradients in these phases ([Note: Gradients
    of a chunk]), `turned` with gathered weights that the first backward leaves besides. `ahead` is its weights where
    its chunk was gathered ahead and they are not in `state` anyway.

    `held` per in-flight microbatch without recomputation, `held_selective` and `held_recomputed` with it,
    `held_weight` between the two halves of a split backward. `left` (`left_selective`, `left_recomputed`) are gathered
    weights that a backward leaves where its activations were, as far as they are more, while gradients are summed.
    `transient` is the most that its backward needs at once beyond what is held, and with recomputation the activations
    that come back for one layer at a time; `transient_first`, by mode, is that of a backward that `sums_nothing`,
    where it differs.

    `nothing` takes off `state` what of it comes with gradients. `passing_turned` is what passes, under a pipeline, when
    all of a chunk has turned but what turns last.
    `at_root` and `reducing` are its gradients, and gathered weights besides `state`, in the two phases of a reduction;
    `reduction` is what its own has beyond those of its chunk.
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
    summed: MemoryBytes = NO_BYTES
    reduced: MemoryBytes = NO_BYTES
    first: MemoryBytes = NO_BYTES
    turned: MemoryBytes = NO_BYTES
    ahead: float = 0.0
    transient_first: Mapping[str, float] = field(default_factory=dict[str, float])
    passing_turned: float = 0.0
    at_root: MemoryBytes = NO_BYTES
    nothing: MemoryBytes = NO_BYTES
    reducing: MemoryBytes = NO_BYTES
    reduction: float = 0.0

    @cached_property
    def totals(self) -> PartTotals:
        return PartTotals(
            state=self.state.total,
            held={mode: self.held_by(mode).total for mode in RECOMPUTE_MODES},
            held_weight=self.held_weight.total,
            gradients=_GradientBytes(self),
        )

    def held_by(self, mode: str) -> MemoryBytes:
        return {"none": self.held, "selective": self.held_selective, "full": self.held_recomputed}[mode]

    def left_by(self, mode: str) -> float:
        return {"none": self.left, "selective": self.left_selective, "full": self.left_recomputed}[mode]

    def gradients_by(self, phase: str, mode: str) -> MemoryBytes:
        """What comes with gradients: themselves, and gathered weights that backwards leave."""
        if phase == NO_GRADIENTS:
            return self.nothing
        if phase == LEAST:
            return min(self.reduced, self.nothing, key=lambda size: size.total)
        if phase == AHEAD:
            return MemoryBytes(gathered_weights=self.ahead)
        if phase == FIRST:
            return self.first
        if phase == FIRST_AHEAD:
            return self.first + MemoryBytes(gathered_weights=self.ahead)
        if phase == TURNED:
            return self.turned
        if phase == ROOT:
            return self.at_root
        if phase == REDUCING:
            return self.reducing
        if phase == SUMMED:
            left = self.left_by(mode)
            return self.summed + MemoryBytes(gathered_weights=left) if left else self.summed
        return self.reduced

    def transient_by(self, mode: str, *, never_summed: bool = False) -> float:
        if never_summed and mode in self.transient_first:
            return self.transient_first[mode]
        return {"none": self.transient, "selective": self.transient_selective, "full": self.transient_recomputed}[mode]
