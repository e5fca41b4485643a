"""Operations that the host issues for one eager layer of Megatron's kind, and its CPU time for each.

python benchmarks/host_operations.py

Counted by a dispatch mode, views and autograd's own included; torch's CPU dropout is five operations where CUDA's
is one. The time is this process's CPU time with tensors too small to matter, kernels included, launches not. And what
autograd functions in Python take: four that pass their input on and four around a kernel, as Megatron's layers have
them, in operations of which a launch is LAUNCH_SHARE.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.operations import Operations

HIDDEN, HEADS, SEQUENCE, BATCH = 64, 4, 16, 2
CPU_DROPOUT = 5  # empty_like, bernoulli_, div_, and the product; the mode sees one more view
ROUNDS, REPEATS = 40, 10
LAUNCH_SHARE = 5 / 12  # launch_seconds over host_operation_seconds of the catalogue
CHAIN = 20


class Layer(nn.Module):
    """Joined queries, keys and values; attention as batched products around a softmax; GELU; biases added after."""

    def __init__(self) -> None:
        super().__init__()
        h = HIDDEN
        self.first, self.second = nn.LayerNorm(h), nn.LayerNorm(h)
        self.joined, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h, bias=False)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h, bias=False)
        self.out_bias, self.down_bias = nn.Parameter(torch.zeros(h)), nn.Parameter(torch.zeros(h))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s, b, a = SEQUENCE, BATCH, HEADS
        mixed = self.joined(self.first(x)).view(s, b, a, 3 * HIDDEN // a)
        query, key, value = (part.reshape(s, b * a, -1) for part in torch.split(mixed, HIDDEN // a, -1))
        scores = torch.baddbmm(
            torch.empty(b * a, s, s), query.transpose(0, 1), key.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=0.5
        )
        weights = F.dropout(torch.softmax(scores.view(b, a, s, s), -1), 0.1).view(b * a, s, s)
        mixed = torch.bmm(weights, value.transpose(0, 1)).view(b, a, s, -1).permute(2, 0, 1, 3).contiguous()
        x = x + F.dropout(self.out(mixed.view(s, b, HIDDEN)) + self.out_bias, 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(self.second(x)))) + self.down_bias, 0.1)


class PassedOn(torch.autograd.Function):
    """As copy_to and reduce_from of Megatron-LM's mpu/mappings.py do on one rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0]


class AroundKernel(torch.autograd.Function):
    """One kernel whose inputs are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x + y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, _ = ctx.saved_tensors
        return gradients[0], gradients[0].view_as(x)


def function_seconds(call: Callable[[torch.Tensor], Any]) -> tuple[float, float]:
    """CPU seconds of one call, forward and backward, of a chain of them."""
    x, gradient = torch.randn(8, requires_grad=True), torch.ones(8)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(CHAIN):
            y = call(y)
        return y

    there = cpu_seconds(chain)
    return there / CHAIN, (cpu_seconds(lambda: chain().backward(gradient)) - there) / CHAIN


def cpu_seconds(run: Callable[[], object]) -> float:
    """Least CPU seconds of a run among many."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            run()
        found.append((time.process_time() - start) / REPEATS)
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    layer, x = Layer(), torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
    with Operations() as forward:
        y = layer(x)
    gradient = torch.ones_like(y)
    with Operations() as backward:
        y.backward(gradient)
    there = cpu_seconds(lambda: layer(x))
    both = cpu_seconds(lambda: layer(x).backward(gradient))
    as_on_cuda = forward.number - 3 * (CPU_DROPOUT - 1)
    print(f"forward:  {forward.number} operations, {as_on_cuda} on CUDA, {1e6 * there / forward.number:.1f} us each")
    back = 1e6 * (both - there) / backward.number
    print(f"backward: {backward.number} operations, {back:.1f} us each")
    other = torch.randn(8, requires_grad=True)
    passed, kernel = function_seconds(PassedOn.apply), function_seconds(lambda z: z + other)
    around = function_seconds(lambda z: AroundKernel.apply(z, other))
    each = (there / forward.number, back / 1e6)
    for way, one, p, a, k in zip(("forward", "backward"), each, passed, around, kernel, strict=True):
        operations = 4 * (p + max(0.0, a - k)) / one * (1 - LAUNCH_SHARE)
        took = f"{1e6 * p:.1f} us to pass on, {1e6 * (a - k):.1f} us around a kernel"
        print(f"functions {way}: {took}; eight are {operations:.1f} operations")


if __name__ == "__main__":
    main()
