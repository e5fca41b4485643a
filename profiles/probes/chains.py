"""Probes of kernels among others: what an operation of a block costs beyond the same operation timed by itself.

[Note: Chains]
A kernel that is timed over and over finds its code and torch's way to it in the caches, and nothing of autograd
around it; in a block each operation follows another one. Where the host is the device, on CPUs, the difference is part
of the step: so much for each operation that the host issues, as the cost model counts them. The block here is as large
as a core's own cache, so that code and tensors drive each other out as in training; one that fits shows less of it.
Its passes come before the kernels and after them, so that a drift of the machine's pace meets both; the kernels are
timed for as long as the profile's own are, since the first of them after a pause take up to a tenth longer.
Where the host only issues the kernels of another device, what it takes for an operation is timed with a block so small
that the device waits for it.
Under selective recomputation torch has each operation of a forward pass through a mode in Python, which asks whether to
keep what it gives, and once more when it runs again; that is far more than the few kernels that do run again.
A backward in halves (zero bubble) walks the graph in Python besides, once for the gradients of the input and once more
for those of the weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from ..points import HOST_OPERATIONS
from .compute import linear_products, measure_attention, measure_gemm, measure_memory
from .selective import keeping_products
from .timing import Rank

_TOKENS, _HIDDEN, _HEADS, _FFN = 256, 128, 4, 352
_BLOCKS = 4
_KERNELS = {"linear": 7, "memory": 8, "flash": 1}  # of one block
_PASS_SECONDS = 0.012  # of effort for one pass before the kernels and one after them
_WARM_UP_TURNS, _TURNS = 3, 15  # of a pass that is issued
_MEETING = 3  # sums of gradients that a backward has besides


class _Block(nn.Module):
    """A block as decoders have it: norm, attention with rotary positions, norm, gated feed-forward."""

    angles: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        h, f = _HIDDEN, _FFN
        self.first, self.second = nn.RMSNorm(h), nn.RMSNorm(h)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(h, h, bias=False) for _ in range(4))
        self.w1, self.w3, self.w2 = (
            nn.Linear(h, f, bias=False),
            nn.Linear(h, f, bias=False),
            nn.Linear(f, h, bias=False),
        )
        self.register_buffer("angles", torch.randn(2, _TOKENS, h // _HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        q, k, v = (w(y).view(1, _TOKENS, _HEADS, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).reshape(1, _TOKENS, _HIDDEN))
        y = self.second(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        cosine, sine = self.angles
        return x * cosine + x.roll(x.shape[-1] // 2, -1) * sine


def measure_chain(rank: Rank) -> dict[str, float]:
    """Seconds that each operation of a block costs beyond its kernel, and those of a backward in halves and of
    selective recomputation besides."""
    stack = nn.Sequential(*(_Block() for _ in range(_BLOCKS)))
    x = torch.randn(1, _TOKENS, _HIDDEN, requires_grad=True)
    inputs = [x, *stack.parameters()]
    gradient = torch.randn_like(x)

    def whole() -> None:
        torch.autograd.grad(stack(x), inputs, gradient)

    def halves() -> None:
        output = stack(x)
        _, groups = stage_backward_input([output], [gradient], [x], iter(stack.parameters()))
        stage_backward_weight(iter(stack.parameters()), groups)
        for weight in stack.parameters():
            weight.grad = None
        x.grad = None

    def selective() -> None:
        y = x
        for block in stack:
            y = checkpoint(block, y, use_reentrant=False, context_fn=keeping_products, preserve_rng_state=False)
        torch.autograd.grad(y, inputs, gradient)

    def block_seconds(passed: Callable[[], None]) -> float:
        start = rank.computing()
        passed()
        return (rank.computing() - start) / _BLOCKS

    ways = (whole, halves, selective)
    for way in ways:
        way()
    repeats = max(4, round(rank.effort_seconds / _PASS_SECONDS))
    passes = [tuple(map(block_seconds, ways)) for _ in range(repeats)]
    kernels, again = _kernel_seconds(rank)
    passes += [tuple(map(block_seconds, ways)) for _ in range(repeats)]
    together, apart, kept = (rank.mean(statistics.median(seconds)) for seconds in zip(*passes, strict=True))
    forward, backward = _operations()
    each = max(0.0, together - rank.mean(kernels)) / (forward + backward)
    run_again = rank.mean(again) + _KERNELS["memory"] * HOST_OPERATIONS["memory"][0] * each
    return {
        "operation_overhead_seconds": each,
        "split_overhead_seconds": max(0.0, apart - together) / (backward - _MEETING),
        "selective_overhead_seconds": max(0.0, kept - together - run_again) / forward,
    }


def measure_issue(rank: Rank) -> dict[str, float]:
    """Seconds that the host takes to issue an operation of a block to its device, which has nothing else to do."""
    return {"host_operation_seconds": _issue_seconds(rank, compiled=False)}


def measure_compiled_issue(rank: Rank) -> dict[str, float]:
    """The same of a block that is compiled, for each operation that it has uncompiled."""
    return {"compiled_operation_seconds": _issue_seconds(rank, compiled=True)}


def _issue_seconds(rank: Rank, *, compiled: bool) -> float:
    blocks = [_Block() for _ in range(_BLOCKS)]
    stack = nn.Sequential(*blocks).to(rank.device, torch.bfloat16)
    for block in blocks if compiled else ():
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    x = torch.randn(1, _TOKENS, _HIDDEN, device=rank.device, dtype=torch.bfloat16, requires_grad=True)
    inputs, gradient = [x, *stack.parameters()], torch.randn_like(x)
    seconds = []
    for turn in range(max(_TURNS, round(rank.effort_seconds / _PASS_SECONDS))):
        rank.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(stack(x), inputs, gradient)
        if turn >= _WARM_UP_TURNS:
            seconds.append(time.perf_counter() - start)
    return rank.mean(statistics.median(seconds)) / _BLOCKS / sum(_operations())


def _operations() -> tuple[int, int]:
    """Of a block, forward and backward, as the cost model counts them."""
    forward, backward = (
        sum(number * HOST_OPERATIONS[kind][way] for kind, number in _KERNELS.items()) for way in (0, 1)
    )
    return forward, backward + _MEETING


def _kernel_seconds(rank: Rank) -> tuple[float, float]:
    """Seconds of all kernels of a block by themselves, as the profile has them, and of those that selective
    recomputation runs again."""
    t, h, f = _TOKENS, _HIDDEN, _FFN
    seconds, again = [], 0.0
    for number, outputs, inputs in ((4, h, h), (2, f, h), (1, h, f)):
        for operation, *shape in linear_products(t, outputs, inputs):
            seconds.append(number * measure_gemm(rank, "fp32", operation, *shape).seconds)
    for number, operation, elements in (
        *((2, "rmsnorm", t * h), (2, "rope", t * h), (1, "copy", t * h), (2, "residual", t * h)),
        (1, "swiglu", t * f),
    ):
        ways = measure_memory(rank, "fp32", operation, elements)
        seconds += [number * point.seconds for point in ways]
        again += number * ways[0].seconds
        if operation == "residual":
            seconds.append(_MEETING * ways[0].seconds)
    seconds += [point.seconds for point in measure_attention(rank, "fp32", 1, _HEADS, t, h // _HEADS)]
    return sum(seconds), again
