"""Linears whose three products run in fp8, in torch's scaled product, each tensor by a scale of its own.

[Note: fp8]
Before a product each tensor is divided by its largest element over what the format holds, and cast: weights and
activations to e4m3, gradients of outputs to e5m2, whose range is wider (arXiv 2209.05433). Sums are fp32 inside the
kernel. The scale is found anew each time ("dynamic"). Kept for the backward pass is what a linear in bf16 keeps, and
cast again there. Norms, attention, embedding and head stay in bf16, weights and moments in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from planner.plan import Plan
from profiles.input_error import InputError

from .transformer import Chunk

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 1e-12  # of a largest element: a tensor of zeros is divided by it
_CAPABILITY = (8, 9)  # from Ada on GPUs have fp8 products


def check_device(plan: Plan) -> None:
    """Raise InputError for a plan in fp8 where this machine's GPUs lack it, or there are none."""
    if plan.job.precision != "fp8":
        return
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found < _CAPABILITY:
        raise InputError(
            "the plan is in fp8, and this machine has no products in fp8",
            where="plan: job.precision",
            expected="GPUs of compute capability 8.9 or above (Ada, Hopper, Blackwell)",
            got="no GPU" if found is None else f"compute capability {found[0]}.{found[1]}",
            hint="plan again with --precision bf16",
        )


def apply_float8(chunk: Chunk) -> None:
    """Make every linear of the blocks a Float8Linear, of the same parameters by the same names."""
    for block in chunk.blocks.values():
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Float8Linear.of(child))


class Float8Linear(nn.Linear):
    """x [..., in] -> x Wᵀ + b [..., out], the products in fp8 ([Note: fp8]).

    Tokens and both widths are multiples of 16, as torch's kernel on CUDA wants them (a rule of the planner).
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> Float8Linear:
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight = linear.weight
        if linear.bias is not None:
            made.bias = linear.bias
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x [tokens, in], weight [out, in] -> x Wᵀ [tokens, out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _scaled(x, _FORWARD, weight, _FORWARD, fast=True)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        (of_y,) = outputs
        of_x = _scaled(of_y, _BACKWARD, weight.t(), _FORWARD)
        of_weight = _scaled(of_y.t(), _BACKWARD, x.t(), _FORWARD)
        return of_x, of_weight


def _scaled(
    left: torch.Tensor, of_left: torch.dtype, right: torch.Tensor, of_right: torch.dtype, *, fast: bool = False
) -> torch.Tensor:
    """left [m, k] · rightᵀ, right [n, k] -> [m, n] in their precision. `fast` sums with fewer bits in between."""
    (a, a_scale), (b, b_scale) = _cast(left, of_left), _cast(right, of_right)
    # The kernel takes its left operand by rows and its right one by columns; casting lays both out by rows.
    return torch.ops.aten._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=left.dtype, use_fast_accum=fast)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x over its scale in fp8, by rows; the fp32 scale)."""
    limit = torch.finfo(dtype).max
    largest = torch.linalg.vector_norm(x, torch.inf)
    scale = largest.clamp(min=_SMALLEST) / limit  # in the precision of x, whose quotient may round beyond the limit
    return (x / scale).clamp_(-limit, limit).to(dtype).contiguous(), scale.float()
