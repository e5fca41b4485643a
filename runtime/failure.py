"""Why a run ended early: the rank that is to blame, where it stood in the layout, and how a rank tells the launcher."""

from __future__ import annotations

import errno
import re
import signal
import traceback
from typing import Any

from profiles.input_error import InputError

RAISED = 1  # exit code of a rank that ended with an exception
LOG_LINES = 20  # of the rank that is to blame, in the error
_MOST_CHARACTERS = 600  # of a text that a rank tells the launcher, which must fit a pipe's atomic write
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)  # how gloo, NCCL and the store say it
_LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)  # likewise


class RunFailed(Exception):
    """A rank ended before the run did, or could not go on; the launcher has stopped the others.

    Attributes:
        rank: global rank of the process that is to blame.
        stage: its pipeline coordinate.
        how: what it did, as the rest of a sentence that begins with its name.
        exit_code: its exit code; negative is the number of the signal that killed it.
        log_lines: the lines that tell most of it: the last it wrote, or its stack.
    """

    def __init__(
        self, how: str, *, rank: int, stage: int, exit_code: int = RAISED, log_lines: tuple[str, ...] = ()
    ) -> None:
        log = "".join(f"\n  {line}" for line in log_lines)
        super().__init__(f"rank {rank} (pipeline stage {stage}) {how}{':' if log else ''}{log}")
        self.rank = rank
        self.stage = stage
        self.how = how
        self.exit_code = exit_code
        self.log_lines = log_lines


class Interrupted(KeyboardInterrupt):
    """The launcher was told by a signal to end, and has ended the ranks."""

    def __init__(self, signal_: signal.Signals) -> None:
        super().__init__(f"interrupted by {signal_.name}")
        self.exit_code = 128 + signal_  # as a shell says it


def is_timeout(error: BaseException | None) -> bool:
    """Whether a collective gave up waiting, or the meeting before the first; torch's pipeline wraps such errors."""
    return _says(_TIMED_OUT, error)


def lost_peer(error: BaseException | None) -> bool:
    """Whether a collective failed since another of its ranks is gone, or gave up waiting: gloo's pair closes then."""
    return _says(_LOST_PEER, error)


def _says(what: re.Pattern[str], error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, RuntimeError) and what.search(str(error)):
            return True
        error = error.__cause__
    return False


def told(error: BaseException) -> dict[str, Any]:
    """What a rank tells the launcher of the exception that ends it, as plain data; `retold` makes it one again."""
    if isinstance(error, RunFailed):
        return {"kind": "failed", "how": error.how[:_MOST_CHARACTERS], "rank": error.rank, "stage": error.stage}
    if isinstance(error, InputError):
        fields = ("what", "where", "expected", "got", "hint")
        return {"kind": "input", **{field: getattr(error, field)[:_MOST_CHARACTERS] for field in fields}}
    if is_timeout(error):
        return {"kind": "timeout", "at": _own_frame(error)}
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {"kind": "lost peer" if lost_peer(error) else "raised", "lines": [line[:150] for line in lines[-LOG_LINES:]]}


def _own_frame(error: BaseException) -> str:
    """The innermost call of ours, which says what was waited for; torch's own calls are many and alike."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/site-packages/" not in frame.filename] or list(frames)
    return f"{own[-1].filename}:{own[-1].lineno} {own[-1].name}" if own else "an unknown place"


def retold(said: dict[str, Any]) -> Exception | None:
    """The exception of a rank that knew itself what was wrong; None for one that only raised or timed out."""
    details = {key: value for key, value in said.items() if key != "kind"}
    if said["kind"] == "failed":
        return RunFailed(details.pop("how"), **details)
    if said["kind"] == "input":
        return InputError(details.pop("what"), **details)
    return None


def is_full_disk(error: OSError) -> bool:
    """Whether a write failed since the disk or the quota is full, or the disk is broken or read-only."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
