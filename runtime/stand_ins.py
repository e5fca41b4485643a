"""What keeps the bytes of a GPU's kernels where there is no GPU: for dry runs, whose tensors hold no numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F


@contextmanager
def gpu_norms() -> Iterator[None]:
    """RMSNorm as CUDA's fused kernel: on a CPU torch composes it of operations that keep two more tensors, in fp32."""

    def rms_norm(x: torch.Tensor, _shape: Sequence[int], weight: torch.Tensor, _epsilon: float) -> torch.Tensor:
        return _FusedRmsNorm.apply(x, weight)

    with mock.patch.object(F, "rms_norm", rms_norm):
        yield


class _FusedRmsNorm(torch.autograd.Function):
    """Keeps its input, its weight and a number a row in fp32 (torch 2.13, `_fused_rms_norm`); computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
