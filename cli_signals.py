"""Ctrl-C, and a standard stream that nobody reads any more: what is asked of the operating system about them."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # as a shell says it
NO_READER = 128 + signal.SIGPIPE
_TOLD = ("Abort", "Exit", "Left", "RunFailed")  # errors by which a verb itself says that it was interrupted
_STREAMS = (1, 2)  # standard output and standard error


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, even where a library in C makes another error of it. Only where it ended
    the process before: else it is ignored, by a command in a shell's background, or handled already."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    try:
        signal.signal(signal.SIGINT, interrupt)
        yield
    except Exception as error:
        if came and type(error).__name__ not in _TOLD:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def open_streams() -> None:
    """A standard stream that the shell has closed (`>&-`) goes nowhere: else Python has none, and the first file that
    is opened takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 it stays open


def nobody_reads(error: BaseException) -> bool:
    """Whether the error is that of a standard stream whose reader is gone, as that of `| head -1`.

    Rich makes a SystemExit of it, having opened standard output anew.
    """
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    poll = select.poll()
    for stream in _STREAMS:
        poll.register(stream, 0)
    return isinstance(error, BrokenPipeError) and any(events & select.POLLERR for _, events in poll.poll(0))


def write_nowhere() -> None:
    """What is still in Python's buffers goes nowhere at the end, and says nothing of it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in _STREAMS:
        os.dup2(nowhere, stream)
