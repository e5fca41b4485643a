"""Timing on one rank while all ranks work: warm-up, repeated samples, a robust mean, spread and outliers.

[Note: Shared cores]
With more ranks than cores a rank waits for its turn, for as long as the system's scheduler likes: of four ranks on two
cores one may have a core to itself for a while and the other three the other, so that neither the mean nor the median
of their seconds is what the same work takes when all of it must be done. What is only computed is timed in seconds of
the processor there, times the ranks that share a core: cores are never idle while more ranks than cores compute. How
much later the last rank is than that is a figure of its own (`concurrency.measure_stragglers`).

[Note: Behind the host]
A GPU runs behind the host, and in training is kept busy: a kernel takes what it takes on the device, and what the host
takes to issue it is a figure of its own (`chains.measure_issue`). Timed one by one from the host, small kernels would
all take as long as their issue does. So the device is made to sleep until the host has issued all of a sample, and its
own clock is read before and after them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_LEAST_SAMPLE_SECONDS = 1e-4  # actions shorter than this are looped: the clock and its reading cost about 1e-7
_SHORT_SECONDS = 5e-3  # what takes less on a core of its own is ruled by who woke when, and scatters by as much
_SHARING_SECONDS = 0.1  # at least, where ranks share cores: several of the scheduler's slices
_SURE = 0.05  # relative standard error of a mean that needs no more samples
_TRIMMED = 0.1  # share of the samples left out at either end of the mean
_DEVICE_SECONDS = 5e-4  # of a sample on a GPU, about; events tell half a microsecond
_MOST_ISSUED = 16  # actions of a sample: a stream takes about a thousand kernels before the host waits
_SLEEP_HERTZ = 2e9  # at least the clock of today's GPUs, by which they count how long they sleep


@dataclass(frozen=True)
class Timing:
    """Mean seconds of an action, interquartile range over median, and the share of samples far outside of it."""

    seconds: float
    spread: float
    outliers: float


class CaseFailed(Exception):
    """A measurement that some rank could not make, so that no rank goes on with it."""


@dataclass(frozen=True)
class Rank:
    """This process among the ranks that are measured together.

    `control` is a gloo group of all ranks for what the profiler itself has to agree on. `effort_seconds` is how
    long one measurement takes; up to `patience_seconds` go to a collective whose samples scatter. `ranks_per_core` is
    more than 1 where the ranks of a machine are more than its cores.

    Every agreement carries a flag: a rank that failed says so in its next one (`give_up`), and the others, whichever
    agreement they are in, raise CaseFailed there. So none waits for a rank that has run out of memory.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    effort_seconds: float = 0.05
    ranks_per_core: float = 1.0
    patience_seconds: float = 0.0

    @property
    def shares_cores(self) -> bool:
        return self.ranks_per_core > 1.0

    def computing(self) -> float:
        """A clock, in seconds, of what this rank computes while all do ([Note: Shared cores])."""
        return time.process_time() * self.ranks_per_core if self.shares_cores else time.perf_counter()

    def own_thread(self) -> float:
        """The same of this thread alone, which takes no time where it waits for other ranks."""
        return time.perf_counter() if self.device.type == "cuda" else time.thread_time() * self.ranks_per_core

    def barrier(self) -> None:
        self._agree(0.0, dist.ReduceOp.MAX)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def most(self, value: float) -> float:
        """The largest of all ranks' values."""
        return self._agree(value, dist.ReduceOp.MAX)

    def mean(self, value: float) -> float:
        """The mean of all ranks' values."""
        return self._agree(value, dist.ReduceOp.SUM) / self.world_size

    def give_up(self) -> None:
        """Tell the others that this rank does not go on with the case."""
        if self.control is not None:
            dist.all_reduce(torch.ones(2, dtype=torch.float64), op=dist.ReduceOp.MAX, group=self.control)

    def _agree(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.control is None:
            return value
        agreed = torch.tensor([value, 0.0], dtype=torch.float64)
        dist.all_reduce(agreed, op=operation, group=self.control)
        if agreed[1] > 0:
            raise CaseFailed("another rank gave up")
        return float(agreed[0].item())


def time_alone(rank: Rank, action: Callable[[], object]) -> Timing:
    """Time an action without communication, all ranks running it at the same time; on GPUs what the device takes.

    Each rank repeats it until the effort is used up, so that none is timed while others have stopped.
    """
    if rank.device.type == "cuda":
        return _time_device(rank, action)
    return time_host(rank, action)


def time_host(rank: Rank, action: Callable[[], object]) -> Timing:
    """The same from the host, until the device has done it, if there is one."""
    action()
    loops = max(1, round(_LEAST_SAMPLE_SECONDS / max(_sample(rank, action, 1, rank.computing), 1e-7)))
    return _repeated(rank, lambda: _sample(rank, action, loops, rank.computing))


def _time_device(rank: Rank, action: Callable[[], object]) -> Timing:
    """Seconds on the device, with the host ahead ([Note: Behind the host])."""
    action()
    rank.synchronize()
    begun = time.perf_counter()
    action()
    issued = time.perf_counter() - begun
    once = _device_sample(action, 1, issued)
    loops = max(1, min(_MOST_ISSUED, round(_DEVICE_SECONDS / max(once, 1e-7))))
    return _repeated(rank, lambda: _device_sample(action, loops, issued))


def _device_sample(action: Callable[[], object], loops: int, issued_seconds: float) -> float:
    """Seconds of the device for each of so many actions, which take the host so long to issue."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(round((2 * loops * issued_seconds + 1e-4) * _SLEEP_HERTZ))
    start.record()
    for _ in range(loops):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / loops


def _repeated(rank: Rank, sample: Callable[[], float]) -> Timing:
    rank.barrier()
    samples = []
    end = time.perf_counter() + rank.effort_seconds
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(sample())
    return Timing(trimmed_mean(samples), *_scatter(samples))


def time_together(
    rank: Rank, action: Callable[[], object], between: Callable[[], object] | None = None, until_all: bool = False
) -> Timing:
    """Time an action that communicates: every rank runs it equally often.

    `between` runs before each, untimed: in training a collective comes after compute, when the threads that serve
    it have gone to sleep. A step adds up many collectives, so it is their mean that counts; only the few samples
    that a stray process has spoilt are left out. `until_all`: each takes until the last of all ranks is done.
    Who wakes when makes one sample several times another on CPUs, so more are taken while the ranks' patience lasts.
    """
    action()  # the first one opens connections
    rank.synchronize()
    rank.barrier()
    started = time.perf_counter()
    for _ in range(2):
        if between is not None:
            between()
        action()
    rank.synchronize()
    took = rank.most((time.perf_counter() - started) / 2)
    loops = max(1, round(_LEAST_SAMPLE_SECONDS / took)) if rank.device.type == "cuda" else 1
    effort = max(rank.effort_seconds, _SHARING_SECONDS) if rank.shares_cores else rank.effort_seconds
    fewest = 24 if took < _SHORT_SECONDS and not rank.shares_cores else 8 if took < effort else 3
    repeats = int(min(200, max(fewest, effort / took / loops)))
    rank.barrier()
    samples: list[float] = []
    started = time.perf_counter()
    while True:
        for _ in range(repeats):
            if between is not None:
                between()
            own = _sample(rank, action, loops)
            samples.append(rank.most(own) if until_all else own)
        if rank.patience_seconds == 0.0 or rank.most(_doubt(samples)) < _SURE:
            break
        if rank.most(time.perf_counter() - started) * (1 + repeats / len(samples)) > rank.patience_seconds:
            break
    # Where ranks share cores, waiting long for a turn is no accident.
    return Timing(trimmed_mean(samples, 0.0 if rank.shares_cores else 0.05), *_scatter(samples))


def _doubt(samples: Sequence[float]) -> float:
    """Standard error of the mean, relative."""
    return statistics.stdev(samples) / math.sqrt(len(samples)) / statistics.fmean(samples)


def trimmed_mean(samples: Sequence[float], share: float = _TRIMMED) -> float:
    """The mean without the `share` smallest and largest samples."""
    cut = int(len(samples) * share)
    return statistics.fmean(sorted(samples)[cut : len(samples) - cut])


def _sample(
    rank: Rank, action: Callable[[], object], loops: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    started = clock()
    for _ in range(loops):
        action()
    rank.synchronize()
    return (clock() - started) / loops


def _scatter(samples: Sequence[float]) -> tuple[float, float]:
    """(interquartile range over median, share of samples more than three of those ranges from the median)."""
    if len(samples) < 4:
        return (max(samples) - min(samples)) / statistics.median(samples), 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    far = sum(abs(sample - middle) > 3 * max(high - low, 1e-9) for sample in samples)
    return (high - low) / middle, far / len(samples)
