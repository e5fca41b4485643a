"""The scale of the loss under fp16, without which small gradients would vanish; constant, or found as training goes.

[Note: Loss scale]
The smallest number of fp16 is 6e-8, the largest 65504. So backward begins at the scale instead of at 1, in the head and
where the balance loss joins, and every gradient is that much larger; their fp32 sums are divided by it again before
anyone looks at them. Powers of two change no digit. Of a gradient that overflows all ranks know, since they sum the
squares of all: no rank changes weights, moments, AdamW's counts of steps or selection biases, and the learning rate of
the next step is the one that this step would have had. Such a step is no failure while the scale can fall.

The rules and their defaults are those of Megatron-LM (megatron/core/optimizer/grad_scaler.py): after `hysteresis`
overflows the scale is halved, and by each from then on, down to `minimum`; after `window` steps in a row without one it
is doubled and may be met by as many overflows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from profiles.input_error import InputError

from .experts import routers_of
from .transformer import Chunk


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the scale is found ([Note: Loss scale]); `constant` keeps it there for good."""

    constant: float | None = None
    initial: float = 2.0**32
    minimum: float = 1.0
    window: int = 1000
    hysteresis: int = 2

    def check(self) -> None:
        """Raise InputError for a scale that would lose the loss or begin below its minimum."""
        for flag, value in (
            ("--loss-scale", self.constant),
            ("--min-loss-scale", self.minimum),
            ("--loss-scale-window", self.window),
            ("--hysteresis", self.hysteresis),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(
                    f"{flag} cannot be {value:g}", where=flag, expected="a number above 0", got=f"{value:g}"
                )
        if not self.minimum <= self.initial < float("inf"):
            raise InputError(
                "the first loss scale is below the least",
                where="--initial-loss-scale",
                expected=f"at least --min-loss-scale {self.minimum:g}",
                got=f"{self.initial:g}",
            )


MEGATRON = LossScaling()


class LossScaler:
    """The scale of the next step, the same on every rank: each tells its own what all have agreed on.

    `factor` is the scale as a float64 scalar on the device, which head and routers read. `left_out` counts the steps
    that were left out for the scale's sake.
    """

    def __init__(self, how: LossScaling, chunks: Sequence[Chunk], device: torch.device) -> None:
        self._how = how
        self.scale = how.initial if how.constant is None else how.constant
        self.left_out = 0
        self._sound_steps = 0  # in a row
        self._overflows_left = how.hysteresis
        self.factor = torch.full((), self.scale, dtype=torch.float64, device=device)
        for chunk in chunks:
            if chunk.head is not None:
                chunk.head.way = replace(chunk.head.way, scale=self.factor)
        for router in routers_of(chunks):
            router.loss_scale = self.factor

    def note(self, *, finite_loss: bool, finite_gradients: bool) -> bool:
        """Go by what a step gave. Returns whether it was left out for the scale's sake, and no failure.

        A loss that is not finite is not the scale's doing; nor is an overflow under a scale that cannot fall.
        """
        mendable = False
        if finite_gradients:
            self._sound_steps += 1
            if self._how.constant is None and self._sound_steps == self._how.window:
                self._sound_steps, self._overflows_left = 0, self._how.hysteresis
                self._set(self.scale * 2)
        else:
            mendable = finite_loss and self._how.constant is None and self.scale > self._how.minimum
            self._sound_steps = 0
            self._overflows_left -= 1
            if self._how.constant is None and self._overflows_left <= 0:
                self._set(max(self.scale / 2, self._how.minimum))
        self.left_out += mendable
        return mendable

    def state(self) -> torch.Tensor:
        """What a checkpoint keeps of it, float64 [4]."""
        found = (self.scale, self._sound_steps, self._overflows_left, self.left_out)
        return torch.tensor(found, dtype=torch.float64)

    def load(self, state: torch.Tensor) -> None:
        """Go on from a checkpoint's `state`; a constant scale stays."""
        scale, sound, overflows, left_out = state.tolist()
        self.left_out = int(left_out)
        if self._how.constant is None:
            self._sound_steps, self._overflows_left = int(sound), int(overflows)
            self._set(scale)

    def _set(self, scale: float) -> None:
        self.scale = scale
        self.factor.fill_(scale)
