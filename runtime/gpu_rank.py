"""One rank of a plan's whole world on this machine's GPU: what the allocator hands out, and how long a step computes.

Untested: it has not run on a GPU yet.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from planner.plan import Plan
from profiles.parent_process import die_with_parent

from .dry_run import in_its_world, no_tokens, skip_vote
from .step import build_state, training_step

STEPS = 3  # the first makes the optimizer's state and loads kernels, the rest are timed


@dataclass(frozen=True)
class GpuRank:
    """Peaks of the allocator over all steps, and the seconds of the fastest step but the first.

    `allocated_bytes` are in tensors and kernels' workspaces, `reserved_bytes` with what the allocator could not use.
    Collectives move nothing and take no time, so the seconds are compute and the host's. `failed` says why there are
    none of these.
    """

    device: str
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    step_seconds: float = 0.0
    failed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_on_gpu(plan: Plan, rank: int) -> GpuRank | None:
    """Train as `rank` does, in a process of its own; None on a machine without CUDA."""
    if not torch.cuda.is_available():
        return None
    # Spawned: a fork would take a used CUDA context with it.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(plan, rank, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    process.join()
    return found or GpuRank(torch.cuda.get_device_name(), failed=f"its process ended with exit code {process.exitcode}")


def _child(plan: Plan, rank: int, sender: Connection) -> None:
    die_with_parent()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device)
    try:
        sender.send(_run(plan, rank, device, name))
    except torch.cuda.OutOfMemoryError:
        sender.send(GpuRank(name, failed="it runs out of memory"))


def _run(plan: Plan, rank: int, device: torch.device, name: str) -> GpuRank:
    with in_its_world(plan, rank):
        state = build_state(plan, device, dtype=torch.float32, seed=0, weight_decay=0.1)
        skip_vote(state.runner)
        inputs, targets = no_tokens(plan, device)
        seconds = []
        for _ in range(STEPS):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            training_step(state, inputs, targets, learning_rate=1e-3, clip_norm=1.0)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return GpuRank(
            name,
            torch.cuda.max_memory_allocated(device),
            torch.cuda.max_memory_reserved(device),
            min(seconds[1:]),
        )
