"""Gated activations: what a feed-forward makes of its gate and its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_GAIN, _LIMIT = 1.702, 7.0  # of gpt-oss: swiglu_alpha and swiglu_limit in its config


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up under swiglu (arXiv 2002.05202); gate · sigmoid(1.702 gate) · (up + 1) under clamped_swiglu, with
    the gate at most 7 and up within ±7 (arXiv 2508.10925, section 2.1). The three have one shape."""
    if activation == "swiglu":
        return F.silu(gate) * up
    gate = gate.clamp(max=_LIMIT)
    return (up.clamp(-_LIMIT, _LIMIT) + 1) * (gate * torch.sigmoid(_GAIN * gate))
