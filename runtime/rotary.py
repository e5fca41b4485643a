"""Rotary position embedding: tables of cosine and sine, and the turn they give to queries and keys."""

from __future__ import annotations

import math
from dataclasses import astuple, fields
from functools import lru_cache
from typing import Any

import torch

from profiles.attention_spec import RopeScaling, RopeStretch

Scaling = RopeScaling | RopeStretch | None


def inverse_frequencies(head_dim: int, theta: float, scaling: Scaling) -> torch.Tensor:
    """Radians per position of each pair of a head, shape [head_dim / 2], float64 (arXiv 2104.09864, section 3.2.2).

    With `scaling`, wavelengths beyond original / low_frequency_factor positions are stretched by `factor`,
    those under original / high_frequency_factor stay, and between them the two are blended (Llama 3.1); a RopeStretch
    is linear (arXiv 2306.15595) or YaRN.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    if isinstance(scaling, RopeStretch):
        linear = scaling.kind == "linear"
        return frequencies / scaling.factor if linear else frequencies * _yarn_shares(head_dim, theta, scaling)
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # full turns over the original context
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = ((turns - scaling.low_frequency_factor) / span).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def _yarn_shares(head_dim: int, theta: float, stretch: RopeStretch) -> torch.Tensor:
    """What YaRN leaves of each frequency (arXiv 2309.00071, section 3.2): 1 for pairs of many turns, 1 / factor for
    those of few, and in between what falls evenly from pair to pair, as in the authors' code."""
    assert stretch.kind == "yarn", f"{stretch.kind} is not trained here"
    original = stretch.original_max_positions
    assert original is not None

    def pair_of(turns: float) -> float:
        """The pair that turns so often over the original positions."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(stretch.beta_fast), pair_of(stretch.beta_slow)
    if stretch.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001  # as there, so that nothing is divided by zero
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float64) - first) / width).clamp(0.0, 1.0)
    return 1.0 - slowed + slowed / stretch.factor


@lru_cache(maxsize=8)
def rotary_tables(
    spans: tuple[tuple[int, int], ...],
    head_dim: int,
    theta: float,
    scaling: Scaling,
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
    magnitude = scaling.magnitude if isinstance(scaling, RopeStretch) else 1.0
    cosine, sine = magnitude * angles.cos(), magnitude * angles.sin()
    tables = torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
    return torch.stack(tables).to(device, dtype)


# A scaling as its name and its numbers.
PlainScaling = tuple[Any, ...]
_SCALINGS = {kind.__name__: kind for kind in (RopeScaling, RopeStretch)}


def plain_scaling(scaling: Scaling) -> PlainScaling:
    """What a module keeps of `scaling` for `constant_tables`: torch 2.11 compiles no call with a frozen dataclass."""
    return () if scaling is None else (type(scaling).__name__, *astuple(scaling))


def _scaling_of(plain: PlainScaling) -> Scaling:
    if not plain:
        return None
    kind, *values = plain
    names = (field.name for field in fields(_SCALINGS[kind]))
    return _SCALINGS[kind](**dict(zip(names, values, strict=True)))


@torch.compiler.assume_constant_result
def constant_tables(
    spans: tuple[tuple[int, int], ...],
    head_dim: int,
    theta: float,
    scaling: PlainScaling,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`rotary_tables`, which compiled code takes as it finds them; it would else compute them anew in each block."""
    return rotary_tables(spans, head_dim, theta, _scaling_of(scaling), device, dtype)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn `heads` [batch, heads, sequence, head_dim]; element i pairs with i + head_dim / 2, as in Hugging Face.

    Computed in the dtype of the tables, since bfloat16 cannot tell positions beyond a few hundred apart.
    """
    turned = heads * cosine + heads.roll(heads.shape[-1] // 2, dims=-1) * sine
    return turned.to(heads.dtype)
