"""Seconds of what our runtime does around attention under cp, besides attending and sending: copies, sums, merges."""

from __future__ import annotations

from collections.abc import Callable

from profiles.points import HOST_OPERATIONS

from .compute_seconds import NO_SECONDS, ComputeCost, ComputeSeconds
from .layout import Layout

Once = Callable[[str, float], ComputeSeconds]


def context_work(layout: Layout, once: Once, queries: float, keys_values: float, outputs: float) -> ComputeCost:
    """Of one layer and microbatch; sizes in elements of one rank, keys and values together.

    `once` prices a memory-bound operation by its name and elements. Ring (runtime/ring_attention.py): keys and values
    joined into one message each way; every step after the first scales and adds the outputs, backward it adds to the
    gradients of queries and of keys and values. Its kernel is issued cp times. Recomputation that keeps attention's
    outputs does none of it again. All-to-all (runtime/head_exchange.py): keys joined to values, and whatever is
    exchanged is put in order before and after.
    """
    if layout.cp_style == "all-to-all":
        sent = queries + keys_values + outputs
        forward = once("copy", keys_values) + _times(2, once("copy", sent))
        return ComputeCost(forward, forward, NO_SECONDS, forward)
    steps = layout.cp - 1
    there, back = HOST_OPERATIONS["flash"]
    merge = once("copy", outputs) + once("residual", outputs) + ComputeSeconds(operations=there)
    add = once("residual", queries) + once("residual", keys_values) + ComputeSeconds(operations=back)
    forward = once("copy", keys_values) + once("copy", outputs) + _times(steps, merge)
    backward = _times(3, once("copy", keys_values)) + _times(steps, add)
    return ComputeCost(forward, backward)


def _times(number: int, each: ComputeSeconds) -> ComputeSeconds:
    """The same so many times over, its operations too."""
    return ComputeSeconds(memory=number * each.memory, operations=number * each.operations)
