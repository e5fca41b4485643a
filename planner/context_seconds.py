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
    gradients of queries and of keys and values. Recomputation that keeps attention's outputs does none of it again.
    All-to-all (runtime/head_exchange.py): keys joined to values, and whatever is exchanged is put in order before and
    after.
    """
    if layout.cp_style == "all-to-all":
        forward = once("copy", keys_values) + once("copy", queries + keys_values + outputs) * 2
        there, back = HOST_OPERATIONS["head_exchange"]
        return ComputeCost(forward, forward, NO_SECONDS, forward).issuing(there, back)
    steps = layout.cp - 1
    merge, add = once("copy", outputs) + once("residual", outputs), once("residual", queries)
    forward = once("copy", keys_values) + once("copy", outputs) + merge * steps
    backward = once("copy", keys_values) * 3 + (add + once("residual", keys_values)) * steps
    first, more = HOST_OPERATIONS["ring"], HOST_OPERATIONS["ring_step"]
    there, back = (alone + steps * each for alone, each in zip(first, more, strict=True))
    return ComputeCost(forward, backward).issuing(there, back)
