"""What a rank was doing when it was stopped: its Python stack, written as it dies, and read back from its log."""

from __future__ import annotations

import faulthandler
import re
import signal
from dataclasses import dataclass

_THREAD = re.compile(r"(?:Current t|T)hread 0x[0-9a-f]+.*\(most recent call first\):")
_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)')
_OPERATION_FILES = ("torch/_ops.py",)  # between a caller and an operation in C++
# Where a rank stands while it waits for others: (end of the file's name, function; None: any).
_WAITS = (
    ("torch/distributed/distributed_c10d.py", None),
    ("torch/distributed/_functional_collectives.py", None),
    ("torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py", None),
    ("torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py", None),
    ("torch/distributed/pipelining/schedules.py", "_wait_batch_p2p"),
    ("runtime/measure.py", "_wait_for_tensors"),
    ("runtime/measure.py", "_wait_for_work"),
    # On a GPU collectives are only queued, and the host waits for all of them where it reads the loss.
    ("runtime/step.py", "training_step"),
    ("torch/cuda/__init__.py", "synchronize"),
)


@dataclass(frozen=True)
class Frame:
    """One call on a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


STOP_SIGNAL = signal.SIGUSR1  # with which our launcher ends ranks: SIGTERM, which others send too, is a wish to leave


def write_when_stopped() -> None:
    """Have the stacks of all threads written to standard error when SIGTERM, STOP_SIGNAL or a crash ends this process.

    In C, from the signal's handler: also of a process that sleeps, computes without end, or holds Python's lock.
    """
    faulthandler.enable(all_threads=True)
    for number in (signal.SIGTERM, STOP_SIGNAL):
        faulthandler.register(number, all_threads=True, chain=True)


def main_stack(log: str) -> tuple[Frame, ...]:
    """The main thread's calls, innermost first, of the last stacks in a rank's log; () where there are none.

    Python lists threads from the newest to the oldest, so the main thread is the last.
    """
    frames: list[Frame] = []
    for line in log.splitlines():
        if _THREAD.match(line):
            frames = []
        elif match := _FRAME.match(line):
            frames.append(Frame(match["file"], int(match["line"]), match["function"]))
    return tuple(frames) if _THREAD.search(log) else ()


def waits_for_others(stack: tuple[Frame, ...]) -> bool:
    """Whether the innermost call that is more than an operation's own is one that waits for other ranks."""
    for frame in stack:
        if not frame.file.endswith(_OPERATION_FILES):
            return any(frame.file.endswith(file) and function in (None, frame.function) for file, function in _WAITS)
    return False
