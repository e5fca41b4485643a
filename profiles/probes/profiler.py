"""The profiler's conduct: ranks started together (or joined), a time budget kept, what is found kept at any moment."""

from __future__ import annotations

import os
import queue
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.multiprocessing as mp

from ..hardware import HardwareProfile
from ..input_error import InputError
from ..parent_process import ctrl_c_waits, die_with_parent
from . import worker
from .cases import DEFAULT, FULL, QUICK
from .findings import Findings, Request

LEVELS = {"quick": QUICK, "default": DEFAULT, "full": FULL}
_LEAVING_SECONDS = 3.0  # of the budget, for ranks to end
BUDGET_SECONDS = {"quick": 29.0, "default": 290.0, "full": 3600.0}
_PATIENCE_SECONDS = 90.0  # beyond the budget, before a silent rank is taken for lost
_KEEP_SECONDS = 10.0  # between two times that an unfinished profile is kept


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """How thoroughly to measure, with how many ranks and which dtypes, and what to go on from.

    `dtypes` None: what the device and the thoroughness ask for. The budget counts from `began`, a `time.time()`; None:
    from when the ranks are started.
    """

    ranks: int
    thoroughness: str = "default"
    dtypes: tuple[str, ...] | None = None
    budget_seconds: float | None = None
    resume: HardwareProfile | None = None
    began: float | None = None

    def request(self) -> Request:
        level = LEVELS[self.thoroughness]
        budget = self.budget_seconds or BUDGET_SECONDS[self.thoroughness]
        began = time.time() if self.began is None else self.began
        done = self.resume.provenance.get("cases", {}).get("done", []) if self.resume is not None else []
        return Request(
            level=level,
            deadline=began + max(5.0, budget - _LEAVING_SECONDS),
            dtypes=self.dtypes or _dtypes(level),
            done=frozenset(done),
        )


@dataclass(frozen=True)
class Progress:
    """What the profiler is at, and the share of its work or its time that is over, 0 to 1, whichever is more."""

    phase: str
    case: str
    share: float


def default_ranks() -> int:
    """All GPUs, else the CPU cores this process may use, at most 8."""
    return torch.cuda.device_count() or min(8, len(os.sched_getaffinity(0)))


def _dtypes(level: int) -> tuple[str, ...]:
    """fp32 and bf16, on CPUs that are in a hurry fp32 alone; on GPUs also what the rest of them is for."""
    if not torch.cuda.is_available():
        return ("fp32",) if level == QUICK else ("fp32", "bf16")
    if level == QUICK:
        return ("bf16",)
    dtypes = ("bf16", "fp32") if level == DEFAULT else ("bf16", "fp32", "tf32", "fp16")
    newest = torch.cuda.get_device_capability() >= (8, 9)
    return (*dtypes, "fp8") if level == FULL and newest else dtypes


def profile_machine(
    options: ProfileOptions,
    command: str,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    keep: Callable[[Findings], None] = lambda findings: None,
) -> Findings:
    """Measure this machine with `options.ranks` ranks at once; under torchrun, all machines as one of its ranks.

    `keep` is called with what there is every few seconds, at the end, and when a person interrupts, so that
    nothing measured is lost.

    Raises:
        InputError: more ranks than GPUs, or a rank that died or went silent.
        KeyboardInterrupt: after `keep`, with no rank left behind.
    """
    if joins():
        return _join(options, command, on_progress, keep)
    cuda = torch.cuda.is_available()
    if cuda and options.ranks > torch.cuda.device_count():
        raise InputError(
            "more ranks than GPUs",
            where="--nproc",
            expected=f"at most {torch.cuda.device_count()}",
            got=str(options.ranks),
        )
    context = mp.get_context("spawn")
    messages: Any = context.Queue()
    request = options.request()
    address = f"tcp://127.0.0.1:{_free_port()}"
    workers = [
        context.Process(target=_spawned, args=(rank, options.ranks, address, request, messages), daemon=True)
        for rank in range(options.ranks)
    ]
    with ctrl_c_waits():
        for process in workers:
            process.start()
    recorder = _Recorder(options, command, request, on_progress, keep)
    try:
        _listen(workers, messages, recorder)
    finally:
        for process in workers:
            process.join(timeout=2 if recorder.ended else 0)
            if process.is_alive():
                process.kill()
        recorder.flush()
    return recorder.findings


def joins() -> bool:
    """Whether this process is one of the ranks that torchrun has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that reports and writes."""
    return os.environ.get("RANK", "0") == "0"


class _Recorder:
    """Takes rank 0's messages, and has what was found kept from time to time."""

    def __init__(
        self,
        options: ProfileOptions,
        command: str,
        request: Request,
        on_progress: Callable[[Progress], None],
        keep: Callable[[Findings], None],
    ) -> None:
        before = options.resume
        self.findings = (
            Findings.of_profile(before, command, options.ranks) if before else Findings(command, options.ranks)
        )
        self.ended = False
        self.deadline = request.deadline
        self._started = time.time()
        self._on_progress, self._keep = on_progress, keep
        self._kept = time.time()

    def take(self, kind: str, content: Any) -> None:
        if kind == "facts":
            self.findings.facts = content
        elif kind == "progress":
            phase, case, share = content
            elapsed = (time.time() - self._started) / max(1e-9, self.deadline - self._started)
            self._on_progress(Progress(phase, case, min(1.0, max(share, elapsed))))
        elif kind == "case":
            self.findings.add_case(**content)
            if time.time() - self._kept > _KEEP_SECONDS:
                self.flush()
        elif kind == "end":
            self.findings.ended = content
            self.ended = True

    def flush(self) -> None:
        """Have what there is kept, if a plan can be made from it."""
        self._kept = time.time()
        if self.findings.usable:
            self._keep(self.findings)


def _join(
    options: ProfileOptions, command: str, on_progress: Callable[[Progress], None], keep: Callable[[Findings], None]
) -> Findings:
    world_size = int(os.environ["WORLD_SIZE"])
    options = replace(options, ranks=world_size)
    request = options.request()
    recorder = _Recorder(options, command, request, on_progress, keep)
    try:
        worker.work(int(os.environ["RANK"]), world_size, "env://", request, recorder.take)
    finally:
        if is_first():
            recorder.flush()
    return recorder.findings


def _spawned(index: int, ranks: int, address: str, request: Request, messages: Any) -> None:
    """A rank's process; Ctrl-C is for the parent, which ends the ranks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    try:
        worker.work(index, ranks, address, request, lambda kind, content: messages.put((kind, index, content)))
    except Exception as error:  # reported to the parent, which names the rank
        messages.put(("failed", index, f"{type(error).__name__}: {error}"))
        messages.close()
        messages.join_thread()
        os._exit(1)


def _listen(workers: list[Any], messages: Any, recorder: _Recorder) -> None:
    """Take messages until rank 0 has ended; a dead or silent rank is an InputError that names it."""
    while not recorder.ended:
        try:
            kind, rank, content = messages.get(timeout=0.5)
        except queue.Empty:
            dead = [i for i, process in enumerate(workers) if process.exitcode is not None]
            if dead:
                raise InputError(
                    f"rank {dead[0]} of the profiler died",
                    where=f"rank {dead[0]}",
                    got=f"exit code {workers[dead[0]].exitcode}",
                    hint="fewer ranks: --nproc",
                ) from None
            if time.time() > recorder.deadline + _PATIENCE_SECONDS:
                alive = [i for i, process in enumerate(workers) if process.is_alive()]
                raise InputError(f"ranks {alive} of the profiler went silent", hint="fewer ranks: --nproc") from None
            continue
        if kind == "failed":
            raise InputError(f"rank {rank} of the profiler failed", where=f"rank {rank}", got=content)
        recorder.take(kind, content)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
