"""Seconds of attention in a chain of kernels, whose scores pass through memory."""

from __future__ import annotations

from collections.abc import Callable

from profiles.hardware import HardwareProfile
from profiles.points import HOST_OPERATIONS
from profiles.software import Software

from .compute_seconds import ComputeCost, ComputeSeconds

Memory = Callable[[str, float], ComputeCost]


def chain_attention(
    hardware: HardwareProfile,
    software: Software,
    dtype: str,
    memory: Memory,
    matrices: int,
    sequence: int,
    dim: int,
) -> ComputeCost:
    """Two batched products forward and four backward around a softmax over s × s scores, of so many matrices.

    `memory` prices a memory-bound operation by its name and elements.
    """
    seconds, scores = hardware.batched_gemm_seconds, float(matrices) * sequence**2
    to_scores = seconds(dtype, matrices, sequence, sequence, dim)
    from_scores = seconds(dtype, matrices, sequence, dim, sequence)
    forward, backward = to_scores + from_scores, to_scores + 3 * from_scores
    between = memory("softmax", scores)
    if software.attention == "unfused":
        between = between + memory("scale_mask", scores)
    if software.dropout:
        between = between + memory("dropout", scores)
    there, back = HOST_OPERATIONS["chain"]
    return ComputeCost(
        ComputeSeconds(attention=forward + between.forward.memory, operations=there),
        ComputeSeconds(attention=backward + between.backward.memory, operations=back),
    )
