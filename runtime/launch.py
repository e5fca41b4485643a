"""Start a plan's ranks on this machine, or join those that torchrun started; watch them and say who died."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from planner.plan import Plan
from profiles.input_error import InputError

from . import run_folder
from .compilation import choose_compilation
from .data import load_corpus
from .failure import RunFailed
from .mesh import coordinate_of
from .metrics import METRICS_FILE
from .trainer import Record, TrainOptions, check_vocabulary, run

# What a rank imports for seconds. The fork server imports it once and the ranks are forked from there; unlike
# this process it has no threads and no CUDA context that a fork would break.
_PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
]
MONITOR_SECONDS = 0.1  # how often the launcher looks whether a rank has died, and the tail for a new line
RAISED = 1  # exit code of a rank that ended with an exception
LOG_LINES = 20  # of the rank that died, in the error
_CONSEQUENCES = (signal.SIGTERM, signal.SIGABRT)  # what the launcher sends, and gloo's end when a peer is gone


def train(plan: Plan, options: TrainOptions, on_progress: Callable[[Record], None]) -> None:
    """Train as the plan says, to the end; `on_progress` gets each step's record.

    On one machine this starts the ranks itself, with their output in RUN/logs; under torchrun (RANK and
    WORLD_SIZE set) it is one of them, and rank 0 reports progress. Raises InputError for what a person can
    put right, RunFailed when a rank dies, and KeyboardInterrupt on Ctrl-C, in each case with no rank left.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if os.environ["RANK"] == "0":
            run_folder.prepare(options.run_dir, plan, steps=options.steps, resume=options.resume)
        run(plan, options, on_progress)
        return
    _check(plan, options)
    run_folder.prepare(options.run_dir, plan, steps=options.steps, resume=options.resume)
    with _tail(options.run_dir / METRICS_FILE, on_progress):
        start_ranks(plan, options, run)


def _check(plan: Plan, options: TrainOptions) -> None:
    """What every rank would find wrong, found once and before any starts."""
    check_vocabulary(plan)
    choose_compilation(plan, options.compile, "cuda" if torch.cuda.is_available() else "cpu")
    load_corpus(options.data, plan.job.sequence)
    devices, wanted = torch.cuda.device_count(), plan.layout.world_size
    if torch.cuda.is_available() and devices < wanted:
        raise InputError(
            "the plan is for more devices than this machine has",
            where="plan: layout",
            expected=f"{wanted} devices, as in the plan",
            got=f"{devices} CUDA devices",
            hint="start it on more machines with torchrun, or plan again for these devices",
        )


def start_ranks(plan: Plan, options: TrainOptions, body: Callable[[Plan, TrainOptions], None]) -> None:
    """Run `body` (a module's function, `trainer.run` but in tests of failure) on each rank, to the end."""
    world_size = plan.layout.world_size
    with tempfile.TemporaryDirectory(prefix="meshwright-") as scratch, _one_thread_a_rank(), _torch_silent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )
        multiprocessing.set_forkserver_preload(_PRELOAD)
        lifeline, held_open = multiprocessing.Pipe(duplex=False)
        try:
            elastic_launch(config, _rank_main)(plan, options, body, lifeline)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise
        except ChildFailedError as error:
            raise _failure(error, plan, options) from None
        finally:
            held_open.close()
            lifeline.close()


def _rank_main(
    plan: Plan, options: TrainOptions, body: Callable[[Plan, TrainOptions], None], lifeline: Connection
) -> None:
    """A rank's process: its output goes to its own log, and it ends when `lifeline` does."""
    # Ctrl-C reaches the ranks too when it is typed; they end at once and the launcher reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    log = _log_path(options, rank)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}, process {os.getpid()}", flush=True)
    try:
        body(plan, options)
    except BaseException:
        _died_path(options, rank).write_text(str(time.time_ns()))
        traceback.print_exc()
        sys.stderr.flush()
        time.sleep(3 * MONITOR_SECONDS)  # so that a rank whose death made this one raise is found before it
        os._exit(
            RAISED
        )  # not sys.exit: what a gloo thread still waits for would hold the process, and the others with it


def _end_with(lifeline: Connection) -> None:
    """End this process when the launcher, which holds the other end, is gone, even by kill -9."""
    try:
        lifeline.recv_bytes()
    except EOFError:
        os._exit(RAISED)


def _failure(error: ChildFailedError, plan: Plan, options: TrainOptions) -> RunFailed:
    """The rank that died first; that the others lost their connection is only a consequence.

    torch reports one of the dead. A rank that was killed is named by it, since those that raise linger; of
    ranks that raised, their own notes tell which was first.
    """
    rank, failure = next(iter(error.failures.items()))
    exit_code = failure.exitcode
    if exit_code > 0 or -exit_code in _CONSEQUENCES:
        notes = {other: _died_path(options, other) for other in range(plan.layout.world_size)}
        raised = {other: int(note.read_text()) for other, note in notes.items() if note.exists()}
        if raised:
            rank, exit_code = min(raised, key=raised.__getitem__), RAISED
    log = _log_path(options, rank)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return RunFailed(
        rank=rank,
        stage=coordinate_of(rank, plan.layout).pp,
        exit_code=exit_code,
        log_lines=tuple(lines[-LOG_LINES:]),
    )


def _log_path(options: TrainOptions, rank: int) -> Path:
    return options.run_dir / run_folder.LOGS_FOLDER / f"rank_{rank}.log"


def _died_path(options: TrainOptions, rank: int) -> Path:
    return options.run_dir / run_folder.LOGS_FOLDER / f"rank_{rank}.died"


@contextmanager
def _one_thread_a_rank() -> Iterator[None]:
    """OMP_NUM_THREADS=1 for the processes started inside, unless a person has set it."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _torch_silent() -> Iterator[None]:
    """Without torch's own lines about ranks that died or were stopped: `RunFailed` tells it once."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # by level alone: torch gives each of its loggers one of its own
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _tail(path: Path, on_progress: Callable[[Record], None]) -> Iterator[None]:
    """Call `on_progress`, in a thread, for each record that is added to `path` while the body runs."""
    ended = threading.Event()

    def follow() -> None:
        with path.open(encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            rest = ""
            while True:
                last = ended.is_set()  # asked before reading, so that the final lines are read too
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    on_progress(json.loads(line))
                if last:
                    return
                ended.wait(MONITOR_SECONDS)

    thread = threading.Thread(target=follow, name="metrics-tail")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
