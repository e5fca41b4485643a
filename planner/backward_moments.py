"""What passes within a layer's backward, moment by moment, where FSDP2 keeps the weights.

The order is that of autograd: the feed-forward's last product and activation, the norm before it, attention, the first
norm. What an operation kept goes when its backward is over (but not in the input's half of a split one,
`stage_backward_input`). Gradients of weights in 16 bits stay until the layer's backward is over and FSDP2 widens them
(torch 2.13, `to_accumulated_grad_if_needed`).
"""

from __future__ import annotations

from typing import NamedTuple

from profiles.model import ModelSpec

from .layout import Layout
from .local_shapes import local_kv_width, local_linear_shape

_FP32_BYTES = 4
_WIDENED_BY_A_NORM = 5  # tensors of its input's shape in fp32, while torch's CPU rms_norm runs backward


class BackwardMoment(NamedTuple):
    """Bytes that pass, bytes of what the layer kept that are gone, and weights whose gradients are there."""

    passing: float
    gone: float = 0.0
    weights: float = 0.0


class KeptOfLayer(NamedTuple):
    """Bytes that a layer keeps in all, of its feed-forward, of one norm, of attention's inputs and outputs; and those
    that pass in its activation's backward."""

    whole: float
    feed_forward: float
    norm: float
    heads: float
    activation: float


def backward_moments(
    model: ModelSpec, layout: Layout, tokens: float, outside: float, element_bytes: int, kept: KeptOfLayer, wide: bool
) -> tuple[BackwardMoment, ...]:
    """Those of a dense layer, with `tokens` within tp's region and `outside` of it; `wide`: norms compute in fp32."""
    names = model.linear_shapes
    sizes = {
        name: outputs * inputs for name in names for outputs, inputs in [local_linear_shape(model, name, layout.tp)]
    }
    feed_forward = float(sum(size for name, size in sizes.items() if name not in model.attention_shapes))
    hidden = model.hidden_size
    # Of the last product: its gradient, which sequence parallelism gathers first, and those of both its factors.
    gathered = tokens * hidden if layout.sequence_parallel else 0.0
    stream = outside * hidden if model.norm_placement == "post" else 0.0
    factor = element_bytes * tokens * model.ffn_hidden_size / layout.tp
    product = element_bytes * (gathered + stream + sizes["w2"]) + factor
    attention = _ring(model, layout, tokens, element_bytes) if layout.cp_style == "ring" else kept.heads
    if layout.splits_backward:
        product -= element_bytes * sizes["w2"]
        return BackwardMoment(product), BackwardMoment(kept.activation), BackwardMoment(attention)
    norm = _WIDENED_BY_A_NORM * _FP32_BYTES * outside * hidden if wide else 0.0
    return (
        BackwardMoment(product),
        BackwardMoment(kept.activation, factor, float(sizes["w2"])),
        BackwardMoment(norm, kept.feed_forward, feed_forward),
        BackwardMoment(attention, kept.feed_forward + kept.norm, feed_forward),
        BackwardMoment(norm, kept.whole - kept.norm, float(sum(sizes.values()))),
    )


def _ring(model: ModelSpec, layout: Layout, tokens: float, element_bytes: int) -> float:
    """A ring's last step: keys and values as they came, their gradients of the first step, of this one as they come out
    of the kernel, as they are added up and as they are received, and of queries in fp32 and half of them as they come
    out. With more than two ranks the rank's own keys and values on their way besides."""
    message = 2 * local_kv_width(model, layout.tp) * (5 + (layout.cp > 2))
    queries = model.query_width / layout.tp
    return tokens * (element_bytes * (message + queries / 2) + _FP32_BYTES * queries)
