"""Seconds of one part of the model by phase of the step and by cause; parts add up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """Seconds of one phase on one rank by cause: own compute, tp collectives, dp collectives not hidden."""

    compute: float = 0.0
    tp: float = 0.0
    dp: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.dp

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.compute + other.compute, self.tp + other.tp, self.dp + other.dp)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.compute * factor, self.tp * factor, self.dp * factor)


@dataclass(frozen=True)
class PartSeconds:
    """Phases of one part of the model: per microbatch forward, backward and recompute; per step the others."""

    forward: Seconds = Seconds()
    backward: Seconds = Seconds()
    recompute: Seconds = Seconds()
    gather: Seconds = Seconds()
    reduce: Seconds = Seconds()
    optimizer: Seconds = Seconds()

    def __add__(self, other: PartSeconds) -> PartSeconds:
        return PartSeconds(*(getattr(self, phase) + getattr(other, phase) for phase in _PHASES))

    def __mul__(self, factor: float) -> PartSeconds:
        return PartSeconds(*(getattr(self, phase) * factor for phase in _PHASES))


_PHASES = ("forward", "backward", "recompute", "gather", "reduce", "optimizer")
