"""Run a function on n gloo ranks, forked from the test process, and collect what each returns."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import os
import pickle
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from profiles.parent_process import die_with_parent


class RankError(AssertionError):
    """A rank raised, died or took too long."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 60.0
) -> list[Any]:
    """`function(*arguments)` on each rank of a fresh process group; the results, by rank (picklable).

    The fork costs 0.2 s where a spawn costs 4. Children use one thread, without which an OpenMP pool that
    the parent has used hangs; they end with os._exit, so that their siblings fail at once.
    """
    handle, store = tempfile.mkstemp(prefix="ranks-")
    os.close(handle)
    children: dict[int, tuple[int, int]] = {}  # read end of a pipe -> (process id, rank)
    for rank in range(world_size):
        reader, writer = os.pipe()
        process = fork()
        if process == 0:
            os.close(reader)
            _child(function, arguments, rank, world_size, store, writer, timeout_seconds)
        os.close(writer)
        children[reader] = (process, rank)
    results = _collect(children, time.monotonic() + timeout_seconds)
    os.unlink(store)
    last_words = [_last_words(store, rank) for rank in range(world_size)]
    failures = [f"rank {rank}: {text}{last_words[rank]}" for rank, (ok, text) in sorted(results.items()) if not ok]
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank][1] for rank in range(world_size)]


def _last_words(store: str, rank: int) -> str:
    """Where each thread of a rank that crashed was; its file is gone after."""
    file = _crash_file(store, rank)
    said = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return f"\n{said}" if said else ""


def _crash_file(store: str, rank: int) -> Path:
    return Path(f"{store}.{rank}")


def fork() -> int:
    """os.fork, where it is safe: what a launch has left in cycles, a store with its thread among it, ends before; in
    the fork, which has not that thread, it would wait for it for ever. (Quick, since `conftest.py` has set aside what
    imports leave.)"""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of the thread that pytest-xdist has
        return os.fork()


def _child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    store: str,
    writer: int,
    timeout_seconds: float,
) -> None:
    code = 1
    try:
        die_with_parent()
        faulthandler.enable(_crash_file(store, rank).open("w"), all_threads=True)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # the parent's test run judges our warnings; these are torch's own
        dist.init_process_group(
            "gloo",
            store=FileStore(store, world_size),  # a file needs no free port
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        payload = (True, function(*arguments))
        dist.barrier()
        code = 0
    except BaseException:
        payload = (False, traceback.format_exc())
    data = pickle.dumps(payload)
    while data:
        data = data[os.write(writer, data) :]
    os._exit(code)


def _collect(children: dict[int, tuple[int, int]], deadline: float) -> dict[int, tuple[bool, Any]]:
    """Read every child's answer to its end; kill what is left at the deadline. All children are reaped."""
    received = dict.fromkeys(children, b"")
    open_readers = set(children)
    while open_readers and (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select(list(open_readers), [], [], left)
        for reader in ready:
            piece = os.read(reader, 1 << 20)
            received[reader] += piece
            if not piece:
                open_readers.discard(reader)
    results: dict[int, tuple[bool, Any]] = {}
    for reader, (process, rank) in children.items():
        if reader in open_readers:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(reader)
        answer = received[reader]
        if reader in open_readers:
            results[rank] = (False, "did not end in time")
        else:
            results[rank] = pickle.loads(answer) if answer else (False, f"died without a word: {_ended(status)}")
    return results


def _ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"
