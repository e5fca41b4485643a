"""Rotary position embedding: tables of cosine and sine, and the turn they give to queries and keys."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from profiles.model import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Radians per position of each pair of a head, shape [head_dim / 2], float64 (arXiv 2104.09864, section 3.2.2).

    With `scaling`, wavelengths beyond original / low_frequency_factor positions are stretched by `factor`,
    those under original / high_frequency_factor stay, and between them the two are blended (Llama 3.1).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # full turns over the original context
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = ((turns - scaling.low_frequency_factor) / span).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


@lru_cache(maxsize=8)
def rotary_tables(
    spans: tuple[tuple[int, int], ...],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Cosine and sine of the positions of `spans`, each [start, end), of shape [2, positions, head_dim].

    The sine of the first half is negative: what is added to the first element of a pair is minus the second's.
    Cached with every input in the key: the blocks of a stage and its microbatches share one pair.
    """
    frequencies = inverse_frequencies(head_dim, theta, scaling)
    positions = torch.cat([torch.arange(start, end, dtype=torch.float64) for start, end in spans])
    angles = torch.outer(positions, frequencies)
    cosine, sine = angles.cos(), angles.sin()
    tables = torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
    return torch.stack(tables).to(device, dtype)


@torch.compiler.assume_constant_result
def constant_tables(*key: Any) -> torch.Tensor:
    """`rotary_tables`, which compiled code takes as it finds them; it would else compute them anew in each block."""
    return rotary_tables(*key)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn `heads` [batch, heads, sequence, head_dim]; element i pairs with i + head_dim / 2, as in Hugging Face.

    Computed in the dtype of the tables, since bfloat16 cannot tell positions beyond a few hundred apart.
    """
    turned = heads * cosine + heads.roll(heads.shape[-1] // 2, dims=-1) * sine
    return turned.to(heads.dtype)
