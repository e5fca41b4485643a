"""A plan's precision in torch's dtypes: parameters rest, and gradients are summed, in fp32; computed is in 16 bits."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # around the products in fp8


def compute_dtype(precision: str, parameters: torch.dtype) -> torch.dtype:
    """Of activations, and of weights where they are computed with; `parameters` is the dtype in which those rest."""
    return HALVES.get(precision, parameters)


def fsdp_policy(precision: str) -> MixedPrecisionPolicy:
    """What FSDP2 casts gathered weights to, and sums gradients in."""
    if precision not in HALVES:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=HALVES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
