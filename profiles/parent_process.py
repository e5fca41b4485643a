"""Between a process and the one that started it: it ends with that one, and leaves Ctrl-C to it."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone, even by kill -9.

    torch.multiprocessing asks for SIGINT then, which a command in a shell's background ignores, and so do its children.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C reaches this thread afterwards, and the processes that are started inside when they ask for it, if ever.

    What is blocked stays so in new programs. They may leave Ctrl-C to this one from their first import on, long before
    their own first line says so: a shell sends it to all of them.
    """
    resource_tracker.ensure_running()  # which would unblock it (Python 3.11) were it started inside
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
