"""The tie between launcher and ranks: ranks tell how they fare, and none outlives the launcher or its own end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe, forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from profiles.parent_process import die_with_parent

LOOK_SECONDS = 0.5  # between two looks at who is alive
PATIENCE_SECONDS = 5.0  # after the first failure, for a rank to obey SIGTERM
_MOST_BYTES = 3500  # of a message; up to 4096 a pipe keeps the messages of several writers apart (pipe(7))


def die_with_launcher() -> None:
    """Have the kernel kill this rank when the launcher is gone, even by kill -9.

    By the kernel and not by a thread: that of a rank that holds Python's lock for ever would not run, nor would any of
    a stopped one. A rank's parent is the fork server, and that ends when nobody holds its pipe any more: the launcher,
    and until now each rank, which has been given the pipe to start processes of its own.
    """
    die_with_parent()
    server: Any = forkserver._forkserver  # of Python 3.11 and 3.12; there is no public name
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


@dataclass(frozen=True)
class Voice:
    """A rank's end of the pipe on which it tells the launcher how it fares."""

    pipe: Connection

    def started(self, rank: int) -> None:
        self._send({"rank": rank, "process": os.getpid()})

    def done(self, rank: int) -> None:
        self._send({"rank": rank, "done": True})

    def failed(self, rank: int, said: dict[str, Any]) -> None:
        """`said` as `failure.told` makes it; its lines are shortened from the top to what a pipe takes at once."""
        message = {"rank": rank, "failed": said}
        while len(json.dumps(message).encode()) > _MOST_BYTES and said.get("lines"):
            said["lines"].pop(0)
        self._send(message)

    def wake(self) -> None:
        """Say nothing, so that the launcher looks around."""
        self._send({})

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the launcher is gone, and this process about to be
            self.pipe.send_bytes(json.dumps(message).encode())


class RankWatch:
    """The launcher's side, for as long as ranks run: a thread that listens, and kills what does not end.

    `failures` are (rank, what it said) in the order in which ranks failed; `killed` the ranks that did not obey
    SIGTERM, each with what the kernel said of its process.
    """

    def __init__(self) -> None:
        self._news, pipe = Pipe(duplex=False)
        self.voice = Voice(pipe)
        self.failures: list[tuple[int, dict[str, Any]]] = []
        self.killed: dict[int, str] = {}
        self._processes: dict[int, _Process] = {}
        self._done: set[int] = set()
        self._failed_at: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    def __enter__(self) -> RankWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        self._news.close()
        self.voice.pipe.close()

    def settle(self) -> None:
        """Wait until all that the ranks said has been heard; to be called when they are gone."""
        self._over.set()
        self.voice.wake()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            last = self._over.is_set()  # asked before listening, so that the final news are heard too
            while self._news.poll():
                self._hear(json.loads(self._news.recv_bytes()))
            if last:
                return
            self._look()
            # Wakes for news, and else to look around.
            self._news.poll(LOOK_SECONDS)

    def _hear(self, message: dict[str, Any]) -> None:
        rank = message.get("rank")
        if rank is None:
            return
        if "process" in message:
            self._processes[rank] = _Process.of(message["process"])
        elif "failed" in message:
            self.failures.append((rank, message["failed"]))
            self._failed_at = self._failed_at or time.monotonic()
        else:
            self._done.add(rank)

    def _look(self) -> None:
        left = {rank: process for rank, process in self._processes.items() if process.state() is not None}
        if any(rank not in left and rank not in self._done for rank in self._processes):
            self._failed_at = self._failed_at or time.monotonic()
        if self._failed_at is not None and time.monotonic() > self._failed_at + PATIENCE_SECONDS:
            for rank, process in left.items():
                self.killed.setdefault(rank, process.state() or "")
                with suppress(ProcessLookupError):
                    os.kill(process.id, signal.SIGKILL)


@dataclass(frozen=True)
class _Process:
    """A process by its id and the time of its start, since ids are used again."""

    id: int
    start: str

    @classmethod
    def of(cls, process: int) -> _Process:
        fields = _stat(process)
        return cls(process, fields[19] if fields else "")

    def state(self) -> str | None:
        """S for sleeping, T for stopped … as in proc(5); None when it has ended."""
        fields = _stat(self.id)
        return fields[0] if fields and fields[19] == self.start and fields[0] not in "ZX" else None


def _stat(process: int) -> list[str]:
    """The fields of /proc/ID/stat after the name: the first is the state, the twentieth the start."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
