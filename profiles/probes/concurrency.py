"""Probes of what work side by side costs: kernels beside collectives, ranks beside ranks, the slowest of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..points import ContentionPoint, OverlapPoint, WaitPoint
from .collectives import BETWEEN_SECONDS, PlacedGroup, work_between
from .timing import Rank, time_alone, trimmed_mean

_CPU_SIDE, _CUDA_SIDE = 256, 4096  # of the square GEMM that stands for compute
MESSAGE_BYTES = (2**16, 2**19)  # of a microbatch between stages on CPUs
_MESSAGES, _MESSAGE_TURNS = 16, 8  # each way in one timing; timings at least
_CONTENTION_TURNS, _MEMORY_TURNS = 9, 5
# Of a tensor: where those of several ranks fit the last cache, where they no longer do, and where one does not.
CONTENTION_BYTES = (2**21, 2**22, 2**24)
WAIT_SECONDS = (BETWEEN_SECONDS, 5e-3, 2e-2, 8e-2)  # of work between two meetings; a block's, a stage's, a step's


def _product(rank: Rank) -> Callable[[], object]:
    side = _CUDA_SIDE if rank.device.type == "cuda" else _CPU_SIDE
    kind = torch.bfloat16 if rank.device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=rank.device).to(kind) for _ in range(2))
    return lambda: torch.mm(a, b)


def measure_overlap(rank: Rank, placed: PlacedGroup, operation: str, size_bytes: int) -> OverlapPoint:
    """How much a GEMM and a collective slow each other: each alone, then GEMMs until the collective is done."""
    product = _product(rank)
    whole = torch.zeros(size_bytes // 4 // placed.size * placed.size, device=rank.device)
    part = whole[: len(whole) // placed.size].clone()
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it

    def start() -> dist.Work:
        if operation == "all_reduce":
            work = dist.all_reduce(whole, group=placed.group, async_op=True)
        else:
            work = gather(whole, part, group=placed.group, async_op=True)
        assert work is not None
        return work

    alone = time_alone(rank, product).seconds
    repeats = max(4, round(rank.effort_seconds / 2e-2))
    communication = trimmed_mean([_timed(rank, lambda: start().wait()) for _ in range(repeats)])
    communication = rank.most(communication)
    together, products = [], 0
    spent = 0.0
    for _ in range(repeats):
        rank.barrier()
        begun = time.perf_counter()
        work = start()
        done = 0
        while done == 0 or not work.is_completed():
            product()
            done += 1
            rank.synchronize()
        spent += time.perf_counter() - begun
        products += done
        work.wait()
        rank.synchronize()
        together.append(time.perf_counter() - begun)
    return OverlapPoint(
        operation=operation,
        ranks=placed.size,
        bytes=whole.nbytes,
        compute_slowdown=max(1.0, rank.mean(spent / products / alone)),
        communication_slowdown=max(1.0, rank.mean(trimmed_mean(together)) / communication),
    )


def _timed(rank: Rank, action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    rank.barrier()
    start = clock()
    action()
    rank.synchronize()
    return clock() - start


def measure_contention(rank: Rank) -> list[ContentionPoint]:
    """Seconds of a GEMM with 1, 2, 4 … of the ranks computing, in times of those with one.

    Cores that ranks share, memory bandwidth and power limits make it rise.
    """
    return _contention(rank, _product(rank))


def measure_memory_contention(rank: Rank, size_bytes: int) -> list[ContentionPoint]:
    """The same of a sum of two tensors of so many bytes: ranks share the last cache and the memory behind it."""
    one, other = (torch.randn(size_bytes // 4, device=rank.device) for _ in range(2))
    return _contention(rank, lambda: one + other, size_bytes)


def _contention(rank: Rank, kernel: Callable[[], object], memory_bytes: int = 0) -> list[ContentionPoint]:
    turns = _MEMORY_TURNS if memory_bytes else _CONTENTION_TURNS
    counts = sorted({1, *(2**i for i in range(1, 10) if 2**i < rank.world_size), rank.world_size})
    found: dict[int, list[float]] = {active: [] for active in counts}
    # In turn, since a machine's pace changes by more than what is looked for.
    for _ in range(turns):
        for active, seconds in found.items():
            rank.barrier()
            own = time_alone(_silent(rank, active), kernel).seconds if rank.rank < active else 0.0
            rank.barrier()
            seconds.append(rank.mean(own) * rank.world_size / active)
    points: list[ContentionPoint] = []
    for active, seconds in found.items():
        ratio = statistics.median(s / alone for s, alone in zip(seconds, found[1], strict=True))
        slowdown = max(ratio, points[-1].slowdown if points else 1.0)
        points.append(ContentionPoint(active=active, memory_bytes=memory_bytes, slowdown=slowdown))
    return points


def _silent(rank: Rank, active: int) -> Rank:
    """The same rank, timing for itself beside so many: the others are not asked to join."""
    share = max(1.0, rank.ranks_per_core * active / rank.world_size)
    return replace(rank, control=None, effort_seconds=rank.effort_seconds * 0.5, ranks_per_core=share)


def measure_stragglers(rank: Rank, placed: PlacedGroup) -> dict[str, Any]:
    """What ranks of equal work wait for the slowest of them, after little and after much of it.

    `straggler_slowdown` is how many times its mean rank's seconds the longest stretch takes until all are there. On
    CPUs those of `placed` meet in a collective, since who wakes when its threads do is part of what is waited for; what
    others compute meanwhile is not lost where ranks share cores.
    """
    on_cpus = rank.device.type == "cpu"
    work = block_work() if on_cpus else _product(rank)
    once = rank.mean(time_alone(rank, work).seconds)
    stretch_to_all = partial(_until_met, placed=placed) if on_cpus else _until_all
    waits = []
    # By how often the work goes into each: on a slow machine the shortest may be one and the same.
    for loops, wanted in {max(1, round(wanted / once)): wanted for wanted in WAIT_SECONDS}.items():
        repeats = max(12, min(150, round(rank.effort_seconds * 30 / wanted)))
        stretch, wait = stretch_to_all(rank, lambda loops=loops: [work() for _ in range(loops)], repeats)
        waits.append(WaitPoint(compute_seconds=stretch, wait_seconds=max(0.0, wait)))
    longest = waits[-1].wait_seconds - (waits[0].wait_seconds if on_cpus else 0.0)
    return {"waits": waits, "straggler_slowdown": 1.0 + max(0.0, longest) / waits[-1].compute_seconds}


def block_work() -> Callable[[], object]:
    """As a block works on a CPU: products and what is between them, over more than a core's own cache holds."""
    x, up, down = torch.randn(512, 192), torch.randn(192, 256), torch.randn(256, 192)

    def work() -> torch.Tensor:
        y = torch.mm(x, up)
        return torch.mm(F.silu(y) * y, down) + x

    return work


def _until_all(rank: Rank, work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(seconds of the mean rank, how much longer the slowest takes)."""
    slowest, typical = [], []
    for _ in range(repeats):
        own = _timed(rank, work)
        slowest.append(rank.most(own))
        typical.append(rank.mean(own))
    return trimmed_mean(typical), trimmed_mean([s - t for s, t in zip(slowest, typical, strict=True)])


def _until_met(rank: Rank, work: Callable[[], object], repeats: int, placed: PlacedGroup) -> tuple[float, float]:
    """(seconds of the work, how much longer each time takes with a smallest sum over `placed` after it).

    The sum's own seconds are in it, whatever the work."""
    tiny = torch.zeros(1)
    dist.all_reduce(tiny, group=placed.group)
    rank.barrier()
    began, computed = time.perf_counter(), 0.0
    for _ in range(repeats):
        before = rank.computing()
        work()
        computed += rank.computing() - before
        dist.all_reduce(tiny, group=placed.group)
    spent = time.perf_counter() - began
    return rank.mean(computed) / repeats, rank.mean(spent - computed) / repeats


def measure_messages(rank: Rank, placed: PlacedGroup) -> dict[str, float]:
    """What a message that goes out and one that comes in take from a rank that goes on computing.

    The receives are posted beforehand and nothing is waited for until the end, as in a pipeline on CPUs; what the core
    does for the messages (Python, the copies to and from the sockets, the threads that serve them) the compute beside
    them does not get. So it is timed in seconds of the processor, of which what ranks wait for each other is none. A
    straight line through two sizes.
    """
    assert placed.size == 2, placed
    partner = placed.ranks[1 - placed.ranks.index(rank.rank)]
    compute = work_between(rank, BETWEEN_SECONDS)
    assert compute is not None, "measured on CPUs alone"
    found = []
    for size in MESSAGE_BYTES:
        out = torch.zeros(size // 4)
        into = [torch.zeros(size // 4) for _ in range(_MESSAGES)]
        exchange = partial(_exchange_beside, compute, out, into, partner, placed.group)
        lost = []
        for _ in range(max(_MESSAGE_TURNS, round(rank.effort_seconds / 4e-3))):
            alone = _timed(rank, lambda: [compute() for _ in range(_MESSAGES)], time.process_time)
            lost.append(_timed(rank, exchange, time.process_time) - alone)
        found.append(max(0.0, rank.mean(statistics.median(lost)) * rank.ranks_per_core / _MESSAGES))
    (small, large), (fewer, more) = MESSAGE_BYTES, found
    each_byte = max(0.0, more - fewer) / (large - small)
    return {
        "message_overhead_seconds": max(0.0, fewer - each_byte * small),
        "message_overhead_seconds_per_byte": each_byte,
    }


def _exchange_beside(
    compute: Callable[[], object],
    out: torch.Tensor,
    into: Sequence[torch.Tensor],
    partner: int,
    group: dist.ProcessGroup,
) -> None:
    works = [dist.irecv(tensor, partner, group=group) for tensor in into]
    for _ in into:
        compute()
        works.append(dist.isend(out, partner, group=group))
    for work in works:
        assert work is not None
        work.wait()
