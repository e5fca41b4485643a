"""Probes of what a step costs besides kernels and collectives: autograd, DTensor, FSDP2 and the optimizer's Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from ..points import CollectivePoint, ShardPoint
from .collectives import PlacedGroup, collective_functions, work_between
from .timing import Rank, time_host, trimmed_mean

_WIDTH, _TOKENS = 16, 16
TOUCHED_BYTES = (2**19, 2**23)  # that a linear of a block reads and writes
_FEW_TURNS = 8  # where a pass takes long
_TOUCHING_WIDTH = 32  # of products that touch many bytes in little time
_LINEARS = 7  # of a block: wq, wk, wv, wo, w1, w3, w2
_MODULE_SECONDS = 3e-3  # of compute in a measured module on CPUs, each way
_MOST_SECONDS = 3.0  # after which two turns of passes are enough
_Function = Callable[[torch.Tensor], torch.Tensor]
_UNITS = 4  # modules that FSDP2 handles one by one in a measured pass


def measure_microbatch(rank: Rank) -> dict[str, float]:
    """Seconds of starting and ending one backward over next to nothing."""
    x = torch.ones((), device=rank.device, requires_grad=True)
    return {"microbatch_overhead_seconds": time_host(rank, lambda: (x * 1.0).backward()).seconds}


def measure_parameter(rank: Rank) -> dict[str, float]:
    """Seconds that each parameter tensor costs a step besides its bytes: norm, clipping, update, new gradient."""
    few, many = (_update_seconds(rank, count) for count in (8, 64))
    return {"parameter_overhead_seconds": max(0.0, many - few) / 56}


def _update_seconds(rank: Rank, count: int) -> float:
    weights = [nn.Parameter(torch.randn(_WIDTH, device=rank.device)) for _ in range(count)]
    gradients = [torch.randn_like(weight) for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)

    def update() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).square().sum()
        for gradient in gradients:
            gradient.mul_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return time_host(rank, update).seconds


# ---- DTensor -----------------------------------------------------------------------------------------------


class _Passing(torch.autograd.Function):
    """x, while a product reads and writes as much as a linear of a block, and two in the backward: in a step they drive
    out of the caches of a host that is the device what it needs to issue the next one ([Note: Chains])."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, touched: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ctx.touched = touched
        torch.mm(*touched)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        for _ in range(2):
            torch.mm(*ctx.touched)
        return gradients[0], None


class _Pair(nn.Module):
    """Some linears cut by columns and one by rows, small enough that only what surrounds the kernels costs."""

    def __init__(self, columns: int, touched: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(columns))
        self.down = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.touched = touched

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = (self._pass(up(x)) for up in self.up)
        return self.down(self._pass(sum(others, first)))

    def _pass(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.touched is None else _Passing.apply(x, self.touched)


class _Normed(nn.Module):
    """A pair behind its norm, whose weight is used as a plain tensor though it may be one of DTensor's."""

    def __init__(self, pair: _Pair) -> None:
        super().__init__()
        self.pair = pair
        self.scale = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        if isinstance(scale, DTensor):
            scale = scale.to_local(grad_placements=[Partial()])
        return self.pair(x * scale)


def _block(rank: Rank, touched_bytes: int) -> nn.Sequential:
    """The linears of a block: wq, wk, wv and wo; w1, w3 and w2."""
    touched = None
    if rank.device.type != "cuda":
        rows = touched_bytes // 4 // (2 * _TOUCHING_WIDTH)
        touched = torch.ones(rows, _TOUCHING_WIDTH), torch.ones(_TOUCHING_WIDTH, _TOUCHING_WIDTH)
    return nn.Sequential(_Normed(_Pair(3, touched)), _Normed(_Pair(2, touched))).to(rank.device)


def measure_sharded_block(rank: Rank, placed: PlacedGroup) -> dict[str, Any]:
    """What DTensor adds to one forward or backward of a block cut over tp, without and with sequence parallelism.

    Beside a pass with it goes one that issues the same collectives by hand; they take turns, so that a change of the
    machine's pace meets both. On CPUs what differs is Python of the rank's own thread, and by its seconds the passes
    are told apart: what ranks wait for each other in either scatters by more.
    """
    mesh = DeviceMesh.from_group(placed.group, rank.device.type, mesh_dim_names=("tp",))
    x = torch.randn(1, _TOKENS * placed.size, _WIDTH, device=rank.device, requires_grad=True)
    shard = torch.randn(1, _TOKENS, _WIDTH, device=rank.device, requires_grad=True)
    points = []
    for size in TOUCHED_BYTES if rank.device.type == "cpu" else (0,):
        passes = []
        for stream, inputs in ((Replicate(), x), (Shard(1), shard)):
            passes.append(_pass_of(_ByHand(_block(rank, size), placed, stream), inputs))
            passes.append(_pass_of(_sharded(_block(rank, size), mesh, stream), inputs))
        turns = max(16, round(rank.effort_seconds / 2e-3)) if size < TOUCHED_BYTES[-1] else _FEW_TURNS
        by_hand, whole, cut_by_hand, cut = _seconds_in_turn(rank, passes, turns)
        for sequence, added in ((False, whole - by_hand), (True, cut - cut_by_hand)):
            points.append(ShardPoint(sequence=sequence, bytes=max(1, size), seconds=max(1e-9, added / 2)))
    found: dict[str, Any] = {
        "shard_overhead_seconds": points[0].seconds,
        "sequence_shard_overhead_seconds": points[1].seconds,
    }
    return found | ({"shard_overheads": points} if rank.device.type == "cpu" else {})


class _ByHand(nn.Module):
    """The block with the collectives that cutting it over tp takes, before and after each pair and in the backward."""

    def __init__(self, block: nn.Sequential, placed: PlacedGroup, stream: Placement) -> None:
        super().__init__()
        self.block = block
        functions = collective_functions(placed)
        if isinstance(stream, Shard):
            self.before, self.after = functions["all_gather"], functions["reduce_scatter"]
        else:
            self.before, self.after = None, functions["all_reduce"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.block:
            x = _Collective.apply(x, self.before, self.after)
            x = _Collective.apply(pair(x), self.after, self.before)
        return x


class _Collective(torch.autograd.Function):
    """One collective forward and one backward, None for nothing; what of the tokens lies where does not matter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: _Function | None, back: _Function | None) -> torch.Tensor:
        ctx.back = back
        return there(x.view(-1)).view(1, -1, _WIDTH) if there is not None else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        flat = gradient.contiguous().view(-1)
        return (ctx.back(flat).view(1, -1, _WIDTH) if ctx.back is not None else gradient), None, None


def _sharded(block: nn.Sequential, mesh: DeviceMesh, stream: Placement) -> nn.Sequential:
    """The block cut over `mesh` as a training rank cuts it; `stream` is the placement between the pairs."""
    for normed in block:
        assert isinstance(normed, _Normed)
        normed.scale = nn.Parameter(distribute_tensor(normed.scale, mesh, [Replicate()]))
        plan: dict[str, ParallelStyle] = {
            "": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
            "up.*": ColwiseParallel(),
            "down": RowwiseParallel(output_layouts=stream),
        }
        parallelize_module(normed.pair, mesh, plan)
    return block


def _pass_of(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: module(x).sum().backward()


# ---- FSDP2 -------------------------------------------------------------------------------------------------


def measure_data_parallel(rank: Rank, placed: PlacedGroup, size_bytes: int) -> list[CollectivePoint]:
    """What FSDP2 takes to gather one module's parameters, to reduce its gradients, and to sum them where all is
    replicated, from a forward and a backward with it less the same without; packing, waiting and Python included.

    On CPUs each module computes for a while both ways, as blocks do: ranks then reach a collective at their
    own times, and the threads that serve it have gone to sleep.
    """
    mesh = DeviceMesh.from_group(placed.group, rank.device.type)
    width = max(1, size_bytes // 4 // _LINEARS // _WIDTH)
    compute = work_between(rank, _MODULE_SECONDS) or _nothing

    def stack() -> nn.Sequential:
        units = (
            nn.Sequential(*(_Tiny(width, _nothing) for _ in range(_LINEARS - 1)), _Tiny(width, compute))
            for _ in range(_UNITS)
        )
        return nn.Sequential(*units).to(rank.device)

    plain, sharded, replicated = stack(), stack(), stack()
    for unit in sharded:
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    for unit in replicated:
        replicate(unit, mesh=mesh)
    x = torch.ones(1, device=rank.device, requires_grad=True)
    spans = _passes_in_turn(rank, (plain, sharded, replicated), x)
    forward, backward = zip(*spans, strict=True)
    seconds = {
        "fsdp_all_gather": forward[1] - forward[0],
        "fsdp_reduce_scatter": backward[1] - backward[0],
        "replicate_all_reduce": backward[2] - backward[0] + max(0.0, forward[2] - forward[0]),
    }
    size = 4 * _LINEARS * _WIDTH * width
    return [
        CollectivePoint(
            operation=operation, ranks=placed.size, stride=placed.stride, bytes=size, seconds=max(1e-7, total / _UNITS)
        )
        for operation, total in seconds.items()
    ]


def measure_unsynchronised(rank: Rank, placed: PlacedGroup) -> dict[str, float]:
    """What FSDP2 does around one module in a microbatch that neither gathers nor reduces, forward and backward."""
    mesh = DeviceMesh.from_group(placed.group, rank.device.type)
    plain, replicated = (
        nn.Sequential(*(_Tiny(_WIDTH, _nothing) for _ in range(_UNITS))).to(rank.device) for _ in range(2)
    )
    for unit in replicated:
        replicate(unit, mesh=mesh)
        assert isinstance(unit, FSDPModule)
        unit.set_requires_gradient_sync(False)
        unit.set_reshard_after_backward(False)
    x = torch.ones(1, device=rank.device, requires_grad=True)
    (forward, backward), (around, back) = _passes_in_turn(rank, (plain, replicated), x, gathers=False)
    return {
        "fsdp_forward_overhead_seconds": max(0.0, around - forward) / _UNITS,
        "fsdp_backward_overhead_seconds": max(0.0, back - backward) / _UNITS,
    }


class _Tiny(nn.Module):
    """A parameter of `width` × _WIDTH that costs next to nothing to use, whatever its size, beside `compute`."""

    def __init__(self, width: int, compute: Callable[[], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, _WIDTH))
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Touch.apply(x, self.weight, self.compute)


class _Touch(torch.autograd.Function):
    """x, with a ready-made gradient for the weight, as a backward pass would leave one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, compute: Callable[[], object]) -> torch.Tensor:
        ctx.shape, ctx.compute = weight.shape, compute
        compute()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = gradients
        ctx.compute()
        return gradient, torch.ones(ctx.shape, device=gradient.device), None


def _nothing() -> None:
    pass


def _passes_in_turn(
    rank: Rank, modules: tuple[nn.Module, ...], x: torch.Tensor, *, gathers: bool = True
) -> list[tuple[float, float]]:
    """(forward, backward) seconds of each module, means over ranks and turns, gradients dropped in between.

    Units of FSDP2 give their weights back in between too where each pass `gathers` them."""
    spans: list[list[tuple[float, float]]] = [[] for _ in modules]
    clock = time.perf_counter if gathers else rank.computing
    begun = time.perf_counter()
    fewest = 6 if rank.shares_cores else 10
    for turn in range(1 + max(fewest, min(40, round(rank.effort_seconds / 1e-2)))):
        if turn > 2 and rank.most(time.perf_counter() - begun) > _MOST_SECONDS:
            break
        for module, found in zip(modules, spans, strict=True):
            rank.barrier()
            start = clock()
            output = module(x)
            rank.synchronize()
            middle = clock()
            output.sum().backward()
            rank.synchronize()
            end = clock()
            if turn:
                found.append((middle - start, end - middle))
            module.zero_grad()
            for unit in module.children():
                if gathers and isinstance(unit, FSDPModule):
                    unit.reshard()  # so that the next pass gathers again
    return [
        (rank.mean(trimmed_mean([f for f, _ in found])), rank.mean(trimmed_mean([b for _, b in found])))
        for found in spans
    ]


def _seconds_in_turn(rank: Rank, actions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Mean seconds of each action on the rank's own thread, over ranks and turns; all are run once before."""
    samples: list[list[float]] = [[] for _ in actions]
    for turn in range(repeats + 1):
        for action, found in zip(actions, samples, strict=True):
            rank.synchronize()
            start = rank.own_thread()
            action()
            rank.synchronize()
            if turn:
                found.append(rank.own_thread() - start)
    return [rank.mean(trimmed_mean(found)) for found in samples]
