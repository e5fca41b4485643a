"""Probes of communication: collectives and point-to-point by operation, group size, placement and bytes.

[Note: Placement]
A group is `size` ranks, `stride` apart: (size, 1) are neighbours as tp's are, (2, k) with k ranks a node are pairs
across nodes as dp's or pp's are. All groups of one kind run at once, since that is how axes of a mesh use a link.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from ..points import SCALARS_BYTES, SUM_OF_SCALARS, CollectivePoint
from .timing import Rank, time_alone, time_together

Placement = tuple[int, int]

# Renamed in torch 2.13.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor

BETWEEN_SECONDS = 1e-3  # of compute before each collective on CPUs; a block's linears take about as long
GAP_SECONDS = 2e-2  # of quiet before each message on CPUs; a stage works so long on a small model's microbatch


@dataclass(frozen=True)
class PlacedGroup:
    """The group of one placement that this rank is in."""

    group: dist.ProcessGroup
    ranks: list[int]
    stride: int

    @property
    def size(self) -> int:
        return len(self.ranks)


def placements(world_size: int) -> list[Placement]:
    """(size, stride) of every mesh axis that divides the world evenly, the narrow ones first."""
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    found = [
        (size, stride) for size in divisors for stride in divisors if size > 1 and world_size % (size * stride) == 0
    ]
    return sorted(found, key=lambda placement: (placement[0] * placement[1], placement[0]))


def make_groups(rank: Rank) -> dict[Placement, PlacedGroup]:
    """For each placement the group of this rank; every rank creates every group, in the same order."""
    mine: dict[Placement, PlacedGroup] = {}
    for size, stride in placements(rank.world_size):
        for block in range(0, rank.world_size, size * stride):
            for offset in range(stride):
                ranks = [block + offset + stride * i for i in range(size)]
                group: Any = dist.new_group(ranks)
                if rank.rank in ranks:
                    mine[size, stride] = PlacedGroup(group, ranks, stride)
    return mine


def measure_collective(
    rank: Rank, placed: PlacedGroup, operation: str, size_bytes: int, uneven: bool = False
) -> CollectivePoint:
    """Seconds of one collective while every group of this placement runs the same one.

    As DTensor issues them, through functional collectives; on gloo an all-to-all is one only there (a
    redistribution from shard to shard is an all-gather).

    A message from stage to stage comes after a microbatch's work, when a link that was shaped has saved up a burst and
    the next message goes at full speed; and the schedule prices who waits for whom, so both sides start together. On
    CPUs all go one way at once, the other way the next time, and are there when the last one is: those that share a
    wire take turns on it, and the two ways at once would each have it to themselves.
    """
    n = placed.size
    elements = max(2 * n, size_bytes // 4 // (2 * n) * (2 * n))
    whole = torch.zeros(elements, device=rank.device)
    alone = operation == "send_recv" and rank.device.type != "cuda"
    action = _message(placed, whole) if alone else collective_action(rank, placed, operation, whole, uneven)
    rank.barrier()  # every rank has its buffers before any of them communicates
    between = _quiet(rank) if alone else work_between(rank, BETWEEN_SECONDS)
    timing = time_together(rank, action, between, until_all=alone)
    seconds = timing.seconds / 2 if operation == "send_recv" and not alone else timing.seconds
    return CollectivePoint(
        operation=operation,
        ranks=n,
        stride=placed.stride,
        bytes=elements * 4,
        uneven=uneven,
        seconds=seconds,
        spread=timing.spread,
    )


def measure_scalars(rank: Rank, placed: PlacedGroup) -> CollectivePoint:
    """Seconds of summing a step's loss and gradient norm over all ranks, as a step does it."""
    scalars = torch.zeros(SCALARS_BYTES // 8, dtype=torch.float64, device=rank.device)
    between = work_between(rank, BETWEEN_SECONDS)
    timing = time_together(rank, lambda: dist.all_reduce(scalars, group=placed.group), between)
    return CollectivePoint(
        operation=SUM_OF_SCALARS,
        ranks=placed.size,
        stride=placed.stride,
        bytes=SCALARS_BYTES,
        seconds=timing.seconds,
        spread=timing.spread,
    )


def collective_action(
    rank: Rank, placed: PlacedGroup, operation: str, whole: torch.Tensor, uneven: bool = False
) -> Callable[[], object]:
    """One call of the operation over `whole`, which is on every rank; it returns when the rank has its result."""
    group, n = placed.group, placed.size
    part = whole[: len(whole) // n].clone()
    other = torch.zeros_like(whole)
    position = placed.ranks.index(rank.rank)
    # Rank 0 of the group gets half of what each sends, the others share the rest; even otherwise.
    half = len(whole) // 2
    rest = [half // (n - 1) + (i < half % (n - 1)) for i in range(n - 1)]
    splits = [half, *rest] if uneven else [len(whole) // n] * n
    received = [splits[position]] * n

    message = _message(placed, whole)

    def send_recv() -> None:
        """One way and back over each pair of neighbours; half of it is one way."""
        message()
        message()

    def exchange() -> None:
        """As the ring of context parallelism does it: to the next rank and from the one before."""
        following, before = placed.ranks[(position + 1) % n], placed.ranks[position - 1]
        sent = dist.P2POp(dist.isend, whole, following, group)
        for work in dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, other, before, group)]):
            work.wait()

    of = collective_functions(placed)
    return {
        "all_reduce": lambda: of["all_reduce"](whole),
        "all_gather": lambda: of["all_gather"](part),
        "reduce_scatter": lambda: of["reduce_scatter"](whole),
        "all_to_all": lambda: functional.wait_tensor(functional.all_to_all_single(whole, received, splits, group)),
        "broadcast": lambda: dist.broadcast(whole, placed.ranks[0], group=group),
        "send_recv": send_recv,
        "exchange": exchange,
    }[operation]


def collective_functions(placed: PlacedGroup) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The collectives of tp by name, of a vector, as DTensor issues them."""
    group, wait = placed.group, functional.wait_tensor
    return {
        "all_reduce": lambda vector: wait(functional.all_reduce(vector, "sum", group)),
        "all_gather": lambda vector: wait(_all_gather(vector, 0, group)),
        "reduce_scatter": lambda vector: wait(_reduce_scatter(vector, "sum", 0, group)),
    }


def _message(placed: PlacedGroup, whole: torch.Tensor) -> Callable[[], object]:
    """One message between each pair of neighbours, all up or all down in turn."""
    position, turns = placed.ranks.index(dist.get_rank()), itertools.count()

    def send_or_receive() -> None:
        peer = placed.ranks[position ^ 1]
        if (position + next(turns)) % 2 == 0:
            dist.send(whole, peer, group=placed.group)
        else:
            dist.recv(whole, peer, group=placed.group)

    return send_or_receive


def work_between(rank: Rank, seconds: float) -> Callable[[], object] | None:
    """Compute that comes before a collective on CPUs; a GPU's collectives are queued behind its kernels anyway."""
    if rank.device.type == "cuda":
        return None
    a, b = torch.randn(128, 256), torch.randn(256, 256)
    once = replace(rank, control=None, effort_seconds=0.002)
    loops = max(1, round(seconds / time_alone(once, lambda: torch.mm(a, b)).seconds))

    def compute() -> None:
        for _ in range(loops):
            torch.mm(a, b)

    return compute


def _quiet(rank: Rank) -> Callable[[], object]:
    def wait() -> None:
        time.sleep(GAP_SECONDS)
        rank.barrier()

    return wait


def measure_bandwidths(rank: Rank, size_bytes: int) -> list[list[float]]:
    """Bytes per second from each rank to each other, many pairs at once.

    In two rounds for each distance all pairs of that distance meet, each rank in one pair at most.
    """
    n = rank.world_size
    matrix = torch.zeros(n, n, dtype=torch.float64)
    data = torch.zeros(size_bytes // 4, device=rank.device)
    for shift in range(1, n):
        for first in range(2):
            # Blocks of `shift` ranks pair up with the block above, the even ones first, then the odd ones.
            position = (rank.rank // shift) % 2
            up = rank.rank + shift
            down = rank.rank - shift
            peer = up if position == first else down
            valid = 0 <= peer < n and ((peer // shift) % 2) != position
            rank.barrier()
            if not valid:
                continue
            seconds = _ping(rank, data, peer, leads=rank.rank < peer)
            matrix[rank.rank, peer] = data.nbytes / seconds
    if rank.control is not None:
        dist.all_reduce(matrix, op=dist.ReduceOp.MAX, group=rank.control)
    return matrix.tolist()


def _ping(rank: Rank, data: torch.Tensor, peer: int, *, leads: bool, repeats: int = 4) -> float:
    """Seconds of one message between this rank and `peer`: half of there and back, the best of some."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        if leads:
            dist.send(data, peer)
            dist.recv(data, peer)
        else:
            dist.recv(data, peer)
            dist.send(data, peer)
        rank.synchronize()
        best = min(best, (time.perf_counter() - started) / 2)
    return best
