"""Probes of communication: collectives and point-to-point by operation, group size and bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..hardware import COLLECTIVES, CollectivePoint
from .timing import Rank, median_seconds

CPU_BYTES = (1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
CUDA_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 28)


def group_sizes(world_size: int) -> list[int]:
    """The powers of two up to the world, and the world itself."""
    sizes = {2**i for i in range(1, 11) if 2**i <= world_size and world_size % 2**i == 0}
    return sorted(sizes | {world_size}) if world_size > 1 else []


def make_groups(rank: Rank) -> dict[int, dist.ProcessGroup]:
    """For each group size, the group of neighbours that this rank is in; every rank creates every group."""
    mine = {}
    for size in group_sizes(rank.world_size):
        for start in range(0, rank.world_size, size):
            members = list(range(start, start + size))
            group = dist.new_group(members)
            if rank.rank in members:
                mine[size] = group
    return mine


def measure_collective(
    rank: Rank, group: dist.ProcessGroup, ranks: int, operation: str, size_bytes: int
) -> CollectivePoint:
    """Seconds of one collective while every group of this size runs the same one."""
    elements = max(ranks, size_bytes // 4 // ranks * ranks)
    whole = torch.zeros(elements, device=rank.device)
    part = torch.zeros(elements // ranks, device=rank.device)
    other = torch.zeros_like(whole)
    first = dist.get_global_rank(group, 0)
    # torch 2.13 renamed the two; the old names warn there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def send_recv() -> None:
        """One way and back over each pair of neighbours; half of it is one way."""
        position = dist.get_rank(group)
        peer = dist.get_global_rank(group, position ^ 1)
        if position % 2 == 0:
            dist.send(whole, peer, group=group)
            dist.recv(other, peer, group=group)
        else:
            dist.recv(other, peer, group=group)
            dist.send(whole, peer, group=group)

    actions: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: gather(whole, part, group=group),
        "reduce_scatter": lambda: scatter(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, first, group=group),
        "send_recv": send_recv,
    }
    seconds = median_seconds(rank, actions[operation], warmups=3)  # the first ones open connections
    if operation == "send_recv":
        seconds /= 2
    return CollectivePoint(operation=operation, ranks=ranks, bytes=elements * 4, seconds=seconds)


def collective_cases(world_size: int, cuda: bool) -> list[tuple[int, str, int]]:
    """(ranks, operation, bytes) of everything to measure, small messages first; point-to-point in pairs only."""
    sizes = CUDA_BYTES if cuda else CPU_BYTES
    return [
        (ranks, operation, size)
        for size in sizes
        for ranks in group_sizes(world_size)
        for operation in COLLECTIVES
        if operation != "send_recv" or ranks == 2
    ]
