"""Steps without an update, by why: not finite, left out for their norm, or for the loss scale's sake."""

from __future__ import annotations

from .step import StepResult


class SkippedSteps:
    """Counts them; `in_a_row` those since the last update that may end a run, which the loss scale's may not."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._all = self._spiked = self._overflowed = 0

    def note(self, result: StepResult) -> None:
        """The next step's result."""
        if result.updated:
            self.in_a_row = 0
            return
        self.in_a_row += not result.overflowed
        self._all += 1
        self._spiked += result.finite
        self._overflowed += result.overflowed

    def to_record(self) -> dict[str, int]:
        """As they stand in record.yaml."""
        return {
            "skipped_steps": self._all,
            "spiked_steps": self._spiked,
            "overflowed_steps": self._overflowed,
        }
