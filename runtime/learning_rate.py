"""The learning rate of each step: a warm-up, and one of several ways down to a minimum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from profiles.input_error import InputError

SHAPES = ("cosine", "linear", "constant", "wsd", "inverse-square-root")
COOLDOWNS = ("linear", "cosine", "minus-sqrt", "exponential")
# arXiv 2405.18392, section 4: from a fifth of the steps on a cooldown does as well as a cosine over all of them.
_COOLDOWN_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """What follows the warm-up.

    `wsd` (warm-up, stable, decay: arXiv 2404.06395, section 4) stays at the peak and falls along `cooldown` over the
    last `cooldown_steps`, a fifth of all where that is None. `constant` stays at the peak to the end, and
    `inverse-square-root` falls as peak · √(warm-up / step), never below the minimum. The others reach the minimum at
    `decay_steps`, the last step where that is None, and stay there.
    """

    shape: str = "cosine"
    decay_steps: int | None = None
    cooldown: str = "linear"
    cooldown_steps: int | None = None

    def check(self, *, steps: int, warmup_steps: int) -> None:
        """Raise InputError for a shape that there is not, or a cooldown that begins in the warm-up."""
        for flag, value, known in (
            ("--lr-schedule", self.shape, SHAPES),
            ("--cooldown-shape", self.cooldown, COOLDOWNS),
        ):
            if value not in known:
                raise InputError(
                    f"{value!r} is not known", where=flag, expected="one of " + ", ".join(known), got=value
                )
        if self.cooldown_steps is None:
            return
        if self.shape != "wsd":
            raise InputError(
                "only wsd has a cooldown", where="--cooldown", expected="--lr-schedule wsd", got=self.shape
            )
        room = max(0, (self.decay_steps or steps) - warmup_steps)
        if self.cooldown_steps > room:
            raise InputError(
                "the cooldown begins in the warm-up",
                where="--cooldown",
                expected=f"at most the {room} steps after the warm-up",
                got=str(self.cooldown_steps),
            )


COSINE = RateSchedule()


def learning_rate_at(
    step: int, *, steps: int, warmup_steps: int, peak: float, minimum: float, schedule: RateSchedule = COSINE
) -> float:
    """Linear from peak / warmup_steps up to `peak`, then as `schedule` says down to `minimum`.

    `step` counts from 1 to `steps`; the step after the warm-up has the peak.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    end = schedule.decay_steps or steps
    if schedule.shape == "constant":
        return peak
    if schedule.shape == "inverse-square-root":
        return max(minimum, peak * math.sqrt(max(warmup_steps, 1) / step))
    if step >= end and end > warmup_steps + 1:
        return minimum
    if schedule.shape == "wsd":
        length = schedule.cooldown_steps
        length = max(1, round(_COOLDOWN_SHARE * end)) if length is None else length
        progress = (step - (end - length)) / length if length else 0.0
        return minimum + (peak - minimum) * _left(schedule.cooldown, progress)
    if end <= warmup_steps + 1:
        return peak
    progress = (step - warmup_steps - 1) / (end - warmup_steps - 1)
    return minimum + (peak - minimum) * _left(schedule.shape, progress)


def _left(shape: str, progress: float) -> float:
    """What is left of the way from peak to minimum when `progress` of the steps down are made.

    As Megatron-LM's OptimizerParamScheduler has them; before the first step down nothing is gone.
    """
    if progress <= 0.0:
        return 1.0
    match shape:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case "minus-sqrt":
            return 1.0 - math.sqrt(progress)
        case "exponential":
            return 2.0 * 0.5**progress - 1.0
    raise AssertionError(shape)
