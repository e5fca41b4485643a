"""A gradient norm far above those before it: its step is left out, and many of them in a row end the run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path

from .disk import last_checkpoint
from .failure import RunFailed

WINDOW_STEPS = 64  # whose median is what is usual
_LEAST_STEPS = 16  # before which nothing is; after a resume it is learned anew


class SpikeGuard:
    """Limits the gradient norm to `multiple` times its median over the last updates; None is no limit.

    Every rank has one, fed with the same norms, so that all leave out the same steps.
    """

    def __init__(self, multiple: float | None) -> None:
        self.multiple = multiple
        self._norms: deque[float] = deque(maxlen=WINDOW_STEPS)

    @property
    def limit(self) -> float:
        """The largest norm of the next step with which it is made."""
        if self.multiple is None or len(self._norms) < _LEAST_STEPS:
            return math.inf
        return self.multiple * statistics.median(self._norms)

    def note(self, norm: float) -> None:
        """The norm of a step that was made."""
        self._norms.append(norm)

    def failure(self, norm: float, run_dir: Path, *, step: int, in_a_row: int) -> RunFailed:
        """The error that ends a run after `in_a_row` steps without an update, the last of them for its norm."""
        usual = statistics.median(self._norms)
        return RunFailed(
            f"and all others left out {in_a_row} steps in a row, up to step {step}: its gradient norm of {norm:.3g} is "
            f"{norm / usual:.3g} times the usual {usual:.3g}, and --spike-guard {self.multiple:g} was asked for. The "
            f"weights are those before; {last_checkpoint(run_dir)}",
            rank=0,
            stage=0,
        )
