"""Timing on one rank while all ranks work: barrier, warm-up, repeat, median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Rank:
    """This process among the ranks that are measured together."""

    rank: int
    world_size: int
    device: torch.device

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def median_seconds(
    rank: Rank, action: Callable[[], object], *, repeats: int = 5, warmups: int = 1, least_seconds: float = 2e-4
) -> float:
    """Median seconds of `action`, all ranks starting each measurement together.

    Actions much shorter than the clock and the interpreter's noise are looped until `least_seconds` pass.
    The loop count is agreed over the ranks, since `action` may be a collective.
    """
    rank.barrier()
    for _ in range(warmups):
        action()
    rank.synchronize()
    started = time.perf_counter()
    action()
    rank.synchronize()
    loops = max(1, min(200, round(least_seconds / max(time.perf_counter() - started, 1e-7))))
    if rank.world_size > 1:
        agreed = torch.tensor([loops], device=rank.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        loops = int(agreed.item())
    samples = []
    for _ in range(repeats):
        rank.barrier()
        started = time.perf_counter()
        for _ in range(loops):
            action()
        rank.synchronize()
        samples.append((time.perf_counter() - started) / loops)
    return statistics.median(samples)
