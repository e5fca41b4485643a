"""Seconds of one part of the model by phase of the step and by cause; parts add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Per microbatch the first five, per step the others.
PHASES = (
    "forward",
    "backward_input",
    "backward_weight",
    "recompute_selective",
    "recompute_full",
    "gather",
    "reduce",
    "optimizer",
)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one phase on one rank by cause: own compute, and what of each axis's collectives is not hidden."""

    compute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    dp: float = 0.0
    pp: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.cp + self.ep + self.dp + self.pp

    def __add__(self, other: Seconds) -> Seconds:
        if other is NOTHING:
            return self
        if self is NOTHING:
            return other
        return Seconds(
            self.compute + other.compute,
            self.tp + other.tp,
            self.cp + other.cp,
            self.ep + other.ep,
            self.dp + other.dp,
            self.pp + other.pp,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(
            self.compute * factor,
            self.tp * factor,
            self.cp * factor,
            self.ep * factor,
            self.dp * factor,
            self.pp * factor,
        )


NOTHING = Seconds()


@dataclass(frozen=True, slots=True)
class PartSeconds:
    """Phases of one part of the model on one rank.

    A whole backward is `backward_input` and `backward_weight` one after the other; schedules that split it run
    them apart. Each recompute mode adds its phase to the input's backward.
    """

    forward: Seconds = NOTHING
    backward_input: Seconds = NOTHING
    backward_weight: Seconds = NOTHING
    recompute_selective: Seconds = NOTHING
    recompute_full: Seconds = NOTHING
    gather: Seconds = NOTHING
    reduce: Seconds = NOTHING
    optimizer: Seconds = NOTHING

    @property
    def backward(self) -> Seconds:
        """Of one microbatch, nothing recomputed."""
        return self.backward_input + self.backward_weight

    @property
    def backward_total(self) -> float:
        """The same without its causes."""
        return self.backward_input.total + self.backward_weight.total

    def recompute(self, mode: str) -> Seconds:
        """What a recompute mode adds to a microbatch's backward."""
        if mode == "none":
            return NOTHING
        return self.recompute_full if mode == "full" else self.recompute_selective

    def __add__(self, other: PartSeconds) -> PartSeconds:
        return PartSeconds(*(getattr(self, phase) + getattr(other, phase) for phase in PHASES))

    def __mul__(self, factor: float) -> PartSeconds:
        return PartSeconds(*(getattr(self, phase) * factor for phase in PHASES))


def least_of(options: Sequence[PartSeconds]) -> PartSeconds:
    """A part that takes no longer than any of the options, however often: phase by phase the least.

    A gather comes with a first forward, so together these are the least that they are together in any option.
    """
    phases = {phase: min((getattr(one, phase) for one in options), key=_total) for phase in PHASES}
    forward = phases["forward"].total
    together = min(one.gather.total + one.forward.total for one in options)
    phases["gather"] = Seconds(dp=max(0.0, together - forward))
    return PartSeconds(**phases)


def _total(seconds: Seconds) -> float:
    return seconds.total
