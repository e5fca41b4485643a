"""Probes of what a step costs besides kernels: the loop, a microbatch's forward and backward, sharded modules."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from .timing import Rank, median_seconds

_WIDTH, _TOKENS = 16, 16


class _Mlp(nn.Module):
    """Two linears, small enough that only what surrounds the kernels costs anything."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.down = nn.Linear(_WIDTH, _WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def measure_overheads(rank: Rank, groups: dict[int, dist.ProcessGroup]) -> dict[str, float]:
    """Seconds and bytes that no kernel explains.

    A block has two sharded pairs of linears (attention's and the MLP's), so `shard_overhead_seconds`, per
    forward or backward of a block, is what sharding adds to two such pairs beyond their collectives.
    """
    plain = nn.Sequential(*(_Mlp() for _ in range(2))).to(rank.device)
    x = torch.randn(1, _TOKENS, _WIDTH, device=rank.device, requires_grad=True)
    plain_seconds = median_seconds(rank, lambda: _forward_backward(plain, x), repeats=9)
    found = {
        "microbatch_overhead_seconds": _autograd_seconds(rank),
        "step_overhead_seconds": 0.0,
        "shard_overhead_seconds": 0.0,
        "communicator_bytes": 0.0,
    }
    if not groups:
        return found
    group = groups[max(groups)]
    mesh = DeviceMesh.from_group(group, rank.device.type, mesh_dim_names=("tp",))
    sharded = nn.Sequential(*(_Mlp() for _ in range(2))).to(rank.device)
    for mlp in sharded:
        parallelize_module(
            mlp,
            mesh,
            {
                "": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
                "up": ColwiseParallel(),
                "down": RowwiseParallel(),
            },
        )
    small = torch.zeros(_TOKENS * _WIDTH, device=rank.device)
    reduce_seconds = median_seconds(rank, lambda: dist.all_reduce(small, group=group), repeats=9)
    sharded_seconds = median_seconds(rank, lambda: _forward_backward(sharded, x), repeats=9)
    # Two all-reduces forward and two backward are booked as communication.
    extra = sharded_seconds - plain_seconds - 4 * reduce_seconds
    found["shard_overhead_seconds"] = max(0.0, extra) / 2
    found["step_overhead_seconds"] = 2 * reduce_seconds
    return found


def _forward_backward(module: nn.Module, x: torch.Tensor) -> None:
    module(x).sum().backward()


def _autograd_seconds(rank: Rank) -> float:
    """Seconds of starting and ending one backward over next to nothing."""
    x = torch.ones((), device=rank.device, requires_grad=True)
    return median_seconds(rank, lambda: (x * 1.0).backward(), repeats=9)
