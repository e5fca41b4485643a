"""Write checkpoints while a run trains or beside it: seconds, bytes, and for how long training waited."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from . import checkpoint
from .checkpoint_folder import FOLDER, StateText, keep_newest, publish, size_bytes, unfinished
from .loss_scale import LossScaler
from .transformer import Chunk


@dataclass(frozen=True)
class Written:
    """A checkpoint that has its place. Training stood still for `stall_seconds` of its `seconds`."""

    step: int
    seconds: float
    stall_seconds: float
    size_bytes: int

    def to_record(self) -> dict[str, Any]:
        """As numbers of a step's record."""
        return {
            "checkpoint_seconds": self.seconds,
            "checkpoint_stall_seconds": self.stall_seconds,
            "checkpoint_bytes": self.size_bytes,
        }


@dataclass
class _Pending:
    step: int
    start: float
    stall_seconds: float
    done: Future[tuple[float, int]]  # when it had its place, and its size


class CheckpointWriter:
    """The checkpoints of one run, of which the `keep` newest stay (0: all). Every rank must make the same calls.

    [Note: Asynchronous checkpoints]
    Training waits while tensors are copied to host memory (a second copy of all that a checkpoint holds), and goes on
    while torch's thread writes the copies. That thread meets those of other ranks in a process group of its own, since
    collectives of two threads in one group would be taken for each other. One checkpoint is under way at a time: the
    next waits for it. It has its place among the whole ones as soon as every rank has written its part, whatever
    training does then, and what went wrong is raised at the end of a step.
    """

    def __init__(
        self,
        run_dir: Path,
        chunks: Sequence[Chunk],
        optimizer: torch.optim.AdamW,
        text: StateText,
        *,
        keep: int,
        asynchronous: bool,
        scaler: LossScaler | None = None,
    ) -> None:
        self._run_dir, self._text, self._keep = run_dir, text, keep
        self._chunks, self._optimizer, self._scaler = chunks, optimizer, scaler
        self._group = _group_of_its_own() if asynchronous else None
        self._pending: _Pending | None = None
        self._unread: list[Written] = []
        self.written: list[Written] = []

    @property
    def longest_seconds(self) -> float:
        """That a checkpoint has taken so far; 0 before the first."""
        return max((found.seconds for found in self.written), default=0.0)

    def write(self, step: int) -> None:
        """The checkpoint of `step`: to its end, or asynchronously once the one before it is done.

        Raises CheckpointException, on every rank, where one cannot write its part.
        """
        start = time.perf_counter()
        if self._group is None:
            checkpoint.save(self._run_dir, step, self._chunks, self._optimizer, self._text.at(step), self._scaler)
            size = self._tidy(step)
            seconds = time.perf_counter() - start
            self._note(Written(step, seconds, seconds, size))
            return
        self.finish()
        folder = checkpoint.begin(self._run_dir, step, self._text.at(step), self._group)
        state = checkpoint.state_of(self._chunks, self._optimizer, step, self._scaler)
        upload = state_dict_saver.async_save(state, checkpoint_id=str(folder), process_group=self._group)
        assert isinstance(upload, Future), "what torch's default stager gives: it copies before it returns"
        done: Future[tuple[float, int]] = Future()
        self._pending = _Pending(step, start, time.perf_counter() - start, done)
        upload.add_done_callback(self._when_uploaded(step, done))

    def poll(self) -> None:
        """Take note of a checkpoint that has ended since; raises what `write` would have."""
        if self._pending is not None and self._pending.done.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is under way, if there is one."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        start = time.perf_counter()
        try:
            end, size = pending.done.result()
        except CheckpointException:
            checkpoint.give_up(unfinished(self._run_dir, pending.step))
            raise
        stall = pending.stall_seconds + time.perf_counter() - start
        self._note(Written(pending.step, end - pending.start, stall, size))

    def news(self) -> dict[str, Any]:
        """Numbers of the last checkpoint that has ended since the last call; {} where none has."""
        unread, self._unread = self._unread, []
        return unread[-1].to_record() if unread else {}

    def _note(self, found: Written) -> None:
        self.written.append(found)
        self._unread.append(found)

    def _tidy(self, step: int) -> int:
        """Delete what is not kept; the size of the newest. On rank 0, elsewhere 0."""
        if dist.get_rank() != 0:
            return 0
        keep_newest(self._run_dir, self._keep)
        return size_bytes(self._run_dir / FOLDER / f"step_{step}")

    def _when_uploaded(self, step: int, done: Future[tuple[float, int]]) -> Callable[[Future[Any]], None]:
        """What torch's thread does at the end, when its last collective has said that all parts are written."""

        def end(upload: Future[Any]) -> None:
            try:
                upload.result()
                if dist.get_rank() == 0:
                    publish(self._run_dir, step)
                done.set_result((time.perf_counter(), self._tidy(step)))
            except BaseException as error:  # raised again where training asks
                done.set_exception(error)

        return end


def _group_of_its_own() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    return group
