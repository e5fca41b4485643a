"""Probes of what a step costs besides kernels: starting a microbatch, modules sharded over tp, a rank's memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from .collectives import measure_collective
from .timing import Rank, median_seconds

_WIDTH, _TOKENS = 16, 16
_REPEATS = 9


class _Pair(nn.Module):
    """Some linears cut by columns and one by rows, small enough that only what surrounds the kernels costs."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(columns))
        self.down = nn.Linear(_WIDTH, _WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(sum(up(x) for up in self.up))


def _block(rank: Rank) -> nn.Sequential:
    """The linears of a block: wq, wk, wv and wo; w1, w3 and w2."""
    return nn.Sequential(_Pair(3), _Pair(2)).to(rank.device)


def measure_overheads(rank: Rank, groups: dict[int, dist.ProcessGroup]) -> dict[str, float]:
    """Seconds that no kernel and no collective explains.

    `shard_overhead_seconds` is what DTensor adds to one forward or backward of a block whose linears are cut
    over tp, `sequence_shard_overhead_seconds` the same under sequence parallelism.
    """
    found = {
        "microbatch_overhead_seconds": _autograd_seconds(rank),
        "shard_overhead_seconds": 0.0,
        "sequence_shard_overhead_seconds": 0.0,
    }
    if not groups:
        return found
    ranks = min(groups)
    mesh = DeviceMesh.from_group(groups[ranks], rank.device.type, mesh_dim_names=("tp",))
    x = torch.randn(1, _TOKENS, _WIDTH, device=rank.device, requires_grad=True)
    shard = torch.randn(1, _TOKENS // ranks, _WIDTH, device=rank.device, requires_grad=True)
    plain = _passes_seconds(rank, _block(rank), x)

    def small(operation: str) -> float:
        return measure_collective(rank, groups[ranks], ranks, operation, 4 * _TOKENS * _WIDTH).seconds

    # Two pairs, each with one collective (or one of two kinds) forward and one backward.
    whole = _passes_seconds(rank, _sharded(_block(rank), mesh, Replicate()), x) - 4 * small("all_reduce")
    cut = _passes_seconds(rank, _sharded(_block(rank), mesh, Shard(1)), shard)
    cut -= 4 * (small("all_gather") + small("reduce_scatter"))
    found["shard_overhead_seconds"] = max(0.0, whole - plain) / 2
    found["sequence_shard_overhead_seconds"] = max(0.0, cut - plain) / 2
    return found


def _sharded(block: nn.Sequential, mesh: DeviceMesh, stream: Placement) -> nn.Sequential:
    """The block cut over `mesh` as a training rank cuts it; `stream` is the placement between the pairs."""
    for pair in block:
        plan: dict[str, ParallelStyle] = {
            "": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
            "up.*": ColwiseParallel(),
            "down": RowwiseParallel(output_layouts=stream),
        }
        parallelize_module(pair, mesh, plan)
    return block


def _passes_seconds(rank: Rank, module: nn.Module, x: torch.Tensor) -> float:
    """Median seconds of a forward and a backward."""
    return median_seconds(rank, lambda: module(x).sum().backward(), repeats=_REPEATS)


def _autograd_seconds(rank: Rank) -> float:
    """Seconds of starting and ending one backward over next to nothing."""
    x = torch.ones((), device=rank.device, requires_grad=True)
    return median_seconds(rank, lambda: (x * 1.0).backward(), repeats=_REPEATS)
