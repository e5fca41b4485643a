"""Start a plan's ranks on this machine, or join those that torchrun or srun started; watch them and say who died."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, popen_fork
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from planner.plan import Plan
from profiles.input_error import InputError
from profiles.parent_process import die_with_parent

from . import run_folder, slurm, stacks
from .checkpoint_folder import latest, step_of
from .compilation import choose_compilation
from .data.tokenizer import BYTES
from .failure import RAISED, Interrupted, is_timeout, told
from .float8 import check_device
from .hf_files import keep_description
from .hf_weights import check_before_start
from .host_moments import check_offload
from .leaving import EXIT_CODE, Left, sigterm_is_a_wish
from .metrics import METRICS_FILE
from .post_mortem import log_path, waited, why
from .rank_watch import RankWatch, Voice, die_with_launcher
from .target import check_target
from .trackers import check_installed, check_reachable
from .trainer import Record, TrainOptions, open_data, run

# What a rank imports for seconds. The fork server imports it once and the ranks are forked from there; unlike
# this process it has no threads and no CUDA context that a fork would break.
_PRELOAD = [
    "networkx",
    "safetensors",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "yaml",
]
MONITOR_SECONDS = 0.1  # how often the launcher looks whether a rank has died, and the tail for a new line


def train(plan: Plan, options: TrainOptions, on_progress: Callable[[Record], None]) -> None:
    """Train as the plan says, to the end; `on_progress` gets each step's record.

    On one machine this starts the ranks itself, with their output in RUN/logs; under torchrun (RANK and
    WORLD_SIZE set) or srun (`runtime/slurm.py`) it is one of them, and rank 0 reports progress. Raises InputError
    for what a person can put right, RunFailed when a rank dies, hangs or cannot go on, Left when the run was asked to
    leave and has written a checkpoint, and Interrupted when a signal tells this process to end, in each case with no
    rank left.
    """
    check_target(plan)
    check_device(plan)
    _check_options(options)
    slurm.join()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(plan, options, on_progress)
        return
    _check(plan, options)
    logs = options.run_dir / run_folder.LOGS_FOLDER
    with run_folder.alone_in(options.run_dir):
        _prepare(plan, options)
        with _tail(options.run_dir / METRICS_FILE, on_progress), sigterm_is_a_wish(logs):
            why_left = start_ranks(plan, options, run, ending_signals="SIGINT,SIGHUP,SIGQUIT")
    _raise_if_left(why_left, options)


def _join(plan: Plan, options: TrainOptions, on_progress: Callable[[Record], None]) -> None:
    """Be one of torchrun's ranks; torchrun stops the others with SIGTERM when this one ends early."""
    die_with_parent()  # which may be killed itself, and nobody else would end this rank
    stacks.write_when_stopped()
    if os.environ["RANK"] == "0":
        _prepare(plan, options)
    try:
        why_left = run(plan, options, on_progress)
    except RuntimeError as error:
        if not is_timeout(error):
            raise
        logs = options.run_dir / run_folder.LOGS_FOLDER
        raise waited(int(os.environ["RANK"]), plan.layout, logs, options.timeout_seconds) from error
    if os.environ["RANK"] == "0":
        _raise_if_left(why_left, options, exit_code=0)  # after another, torchrun would start the ranks again


def _raise_if_left(why_left: str | None, options: TrainOptions, exit_code: int = EXIT_CODE) -> None:
    if why_left is not None:
        step = step_of(latest(options.run_dir))
        raise Left(
            f"left after step {step} of {options.steps}, asked by {why_left}; "
            f"--run-dir {options.run_dir} --resume goes on from the checkpoint of that step",
            exit_code,
        )


def _prepare(plan: Plan, options: TrainOptions) -> None:
    if not options.resume:
        check_before_start(options.weights, plan)
    run_folder.prepare(options.run_dir, plan, steps=options.steps, resume=options.resume, dtype=options.dtype)
    if not options.resume:
        tokenizer = options.data.tokenizer
        made_with = Path(tokenizer) if tokenizer not in (None, BYTES) else None
        keep_description(options.run_dir, options.weights, made_with)


def _check_options(options: TrainOptions) -> None:
    """What a person may have got wrong that has nothing to do with machines."""
    options.schedule.check(steps=options.steps, warmup_steps=options.warmup_steps)
    if options.balance is not None:
        options.balance.check()
    check_installed(options.watching.wandb, options.watching.mlflow)
    window = options.watching.profile_steps
    if window is not None and window[0] > options.steps:
        raise InputError(
            "the trace begins after the run",
            where="--profile-steps",
            expected=f"a first step of at most {options.steps}",
            got=str(window[0]),
        )


def _check(plan: Plan, options: TrainOptions) -> None:
    """What every rank would find wrong, found once and before any starts."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    choose_compilation(plan, options.compile, device_type)
    check_offload(plan, device_type)
    open_data(plan, options)
    check_reachable(options.watching.wandb, options.watching.mlflow)
    devices, wanted = torch.cuda.device_count(), plan.layout.world_size
    if torch.cuda.is_available() and devices < wanted:
        raise InputError(
            "the plan is for more devices than this machine has",
            where="plan: layout",
            expected=f"{wanted} devices, as in the plan",
            got=f"{devices} CUDA devices",
            hint="start it on more machines with torchrun, or plan again for these devices",
        )


def start_ranks(
    plan: Plan,
    options: TrainOptions,
    body: Callable[[Plan, TrainOptions], Any],
    *,
    ending_signals: str = "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
) -> Any:
    """Run `body` (a module's function, `trainer.run` but in tests of failure) on each rank, to the end.

    Returns what it gave on rank 0, which must be picklable. `ending_signals` to this process end the ranks.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=plan.layout.world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
        monitor_interval=MONITOR_SECONDS,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # a rank writes its own
        signals_to_handle=ending_signals,
    )
    multiprocessing.set_forkserver_preload(_PRELOAD)
    with _one_thread_a_rank(), _torch_silent(), _stops_ranks(), _signals_as_before(), RankWatch() as watch:
        _start_fork_server(options.run_dir / run_folder.LOGS_FOLDER / run_folder.FORK_SERVER_LOG)
        try:
            return elastic_launch(config, _rank_main)(plan, options, body, watch.voice)[0]
        except SignalException as error:
            raise Interrupted(signal.Signals(error.sigval)) from None
        except ChildFailedError as error:
            watch.settle()
            rank, failure = next(iter(error.failures.items()))
            logs = options.run_dir / run_folder.LOGS_FOLDER
            raise why(rank, failure.exitcode, plan.layout, logs, watch, options.timeout_seconds) from None


def _start_fork_server(log: Path) -> None:
    """Where SIGTERM is ignored, which a batch system sends to every process: the ranks would die with their parent.
    What it and ranks that are not told their log yet say goes to `log`: Ctrl-C reaches them in the middle of an import.

    What is ignored stays so in new programs, and in the ranks until they know what to do about it.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with _standard_error_into(log):
            forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _standard_error_into(path: Path) -> Iterator[None]:
    """For processes started inside."""
    own = os.dup(2)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 2)
        os.close(file)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _rank_main(plan: Plan, options: TrainOptions, body: Callable[[Plan, TrainOptions], Any], voice: Voice) -> Any:
    """A rank's process: its output goes to its own log, and it ends when the launcher does."""
    # Ctrl-C reaches the ranks too when it is typed; they end at once and the launcher reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_launcher()
    rank = int(os.environ["RANK"])
    voice.started(rank)
    try:
        log = log_path(options.run_dir / run_folder.LOGS_FOLDER, rank)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        stacks.write_when_stopped()
        print(f"rank {rank} of {os.environ['WORLD_SIZE']}, process {os.getpid()}", flush=True)
        answer = body(plan, options)
    except BaseException as error:
        voice.failed(rank, told(error))
        with suppress(OSError):  # of a full disk
            traceback.print_exc()
            sys.stderr.flush()
        time.sleep(3 * MONITOR_SECONDS)  # so that a rank whose death made this one raise is found before it
        # Not sys.exit: what a gloo thread still waits for would hold the process, and the others with it.
        os._exit(RAISED)
    voice.done(rank)
    return answer


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
def _signals_as_before() -> Iterator[None]:
    """Put back what handled signals: torch's handlers, which raise an error of its own, are for while ranks run."""
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # LaunchConfig.signals_to_handle
    before = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _stops_ranks() -> Iterator[None]:
    """While ranks run, torch ends them with STOP_SIGNAL where it would take SIGTERM: in its agent, and before that in
    what waits for the first rank to fail."""
    close = PContext.close

    def stop(context: Any, death_sig: signal.Signals | None = None, *rest: Any, **more: Any) -> None:
        by_default = death_sig in (None, signal.SIGTERM)
        close(context, stacks.STOP_SIGNAL if by_default else death_sig, *rest, **more)

    def terminate(process: Any) -> None:
        process._send_signal(stacks.STOP_SIGNAL)

    with mock.patch.object(PContext, "close", stop), mock.patch.object(popen_fork.Popen, "terminate", terminate):
        yield


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
