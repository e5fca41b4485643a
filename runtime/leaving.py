"""Leave a run before its end, with a checkpoint: when SIGTERM asks for it, or a time limit is near."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from . import stacks

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits(3): try again later
REQUEST_FILE = "leave"  # in a run's logs: that the launcher was asked
_STEPS_LOOKED_AT = 20  # for how long a step may take; the first, which may compile, is soon forgotten


class Left(Exception):
    """The run has left before its last step, on request and with a checkpoint, from which `--resume` goes on."""

    def __init__(self, what: str, exit_code: int = EXIT_CODE) -> None:
        super().__init__(what)
        self.exit_code = exit_code


class Leaving:
    """A rank's wish to leave. All ranks learn of one's in the sums of the next step, so that they leave after the same.

    [Note: Leaving]
    Who is asked differs: SIGTERM may come to the launcher, which leaves a note in the run's logs that rank 0 looks for
    before each step, or to ranks, as from torchrun, which hands it on, or from a batch system that tells every process
    of a job. An agent of torchrun's that may start ranks again means by it that they end, and there it is no wish. The
    clock is rank 0's. The time limit counts from the ranks' start: rank 0 asks when what is left no longer holds two
    steps and a checkpoint, the longest of late: the step whose sums carry the wish, and one more were it not made now.
    """

    def __init__(self, logs: Path, rank: int, time_limit_seconds: float | None) -> None:
        self._file = logs / REQUEST_FILE if rank == 0 else None
        self._limit_seconds = time_limit_seconds if rank == 0 else None
        self._start = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=_STEPS_LOOKED_AT)
        self._why = ""

    def note_step(self, seconds: float) -> None:
        """A step, with all that surrounds it, took so long."""
        self._step_seconds.append(seconds)

    def wish(self, checkpoint_seconds: float) -> bool:
        """Whether this rank wants to leave after the step that begins now; a wish stays."""
        if self._file is not None and self._file.exists():
            self._why = "SIGTERM"
        if self._limit_seconds is not None:
            left = self._limit_seconds - (time.monotonic() - self._start)
            if left < 2 * max(self._step_seconds, default=0.0) + checkpoint_seconds:
                self._why = f"the time limit of {self._limit_seconds / 60:g} minutes"
        return bool(self._why)

    @property
    def why(self) -> str:
        """What asked this rank; another rank was asked where it knows nothing."""
        return self._why or "SIGTERM"

    def obey_sigterm(self) -> None:
        """From now on SIGTERM to this process is a wish to leave; its stacks are written all the same."""

        def ask(*_: Any) -> None:
            self._why = "SIGTERM"

        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            return
        faulthandler.unregister(signal.SIGTERM)  # which would else be overwritten: it must come on top
        signal.signal(signal.SIGTERM, ask)
        stacks.write_when_stopped()


@contextmanager
def sigterm_is_a_wish(logs: Path) -> Iterator[None]:
    """In the launcher: the first SIGTERM asks the ranks to leave, a second one ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return

    def ask(*_: Any) -> None:
        signal.signal(signal.SIGTERM, end)
        try:
            (logs / REQUEST_FILE).touch()
        except OSError:  # a full disk, which will not take a checkpoint either
            end()

    def end(*_: Any) -> None:
        raise SignalException("asked twice", signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
