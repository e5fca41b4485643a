"""Causal attention with a window, sinks or both, of sequences that a rank holds whole.

[Note: Window]
A token attends to the `window` latest ones, itself among them. Sequences are cut into blocks of that many tokens: in
its own block a query meets what is not later, as ever, and of the block before only keys at later places than its own
place in the block. Reversed, that triangle is a causal one too, a token smaller. So two calls of a causal kernel do no
more than the band asks for: with r = window / sequence, 1 - (1 - r)² of the causal half (`ModelSpec.attended_share`).
The parts are merged as the steps of a ring are. Where a sequence ends within a block it is filled up: no query meets
what comes later.

[Note: Sinks]
A learned number s of each head joins the sum under its softmax and has no value (arXiv 2309.17453, section 3.3;
gpt-oss). With L the logarithm of the sum without it, L' = log(exp L + exp s), and outputs shrink by exp(L - L'). Given
outputs and L' the backward kernels leave the right gradients, as of a merged part; that of s is minus the sum of
exp(s - L') (gradient · outputs) over the head's queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .attention_kernels import Attended, attend, attend_backward, merge
from .document_attention import document_ends, empty_outputs, squares

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_SEQUENCE = 2  # dim of [batch, heads, sequence, head_dim]


def windowed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int | None,
    sinks: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query to the `window` latest keys ([Note: Window]), of its document where `starts` are given.

    q [batch, heads, sequence, head_dim], k and v with fewer heads, if grouped; sinks [heads] ([Note: Sinks]); starts
    [batch, sequence], where the document of each token begins -> as q, of v's head_dim. `window` None: all before.
    """
    return torch.ops.meshwright.windowed_attention(q, k, v, sinks, starts, window)[0]


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, logarithms of the sums of exponentials [batch, heads, sequence])."""
    outputs, logarithms = empty_outputs(q, v)
    for run in _runs(starts):
        found = _attend_band(q[run], k[run], v[run], window)
        if sinks is not None:
            found = _with_sinks(found, sinks)
        outputs[run] = found.outputs.to(outputs.dtype)
        logarithms[run] = found.logarithms
    return outputs, logarithms


def _backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outputs: torch.Tensor,
    logarithms: torch.Tensor,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, and of the sinks, which are empty where there are none."""
    gradients = [torch.empty_like(tensor) for tensor in (q, k, v)]
    for run in _runs(starts):
        parts = _attend_band_backward(
            gradient[run], (q[run], k[run], v[run]), Attended(outputs[run], logarithms[run]), window
        )
        for whole, part in zip(gradients, parts, strict=True):
            whole[run] = part
    of_q, of_k, of_v = gradients
    if sinks is None:
        return of_q, of_k, of_v, q.new_empty(0)
    shares = (sinks.to(logarithms.dtype).view(1, -1, 1) - logarithms).exp_()
    met = (gradient.to(logarithms.dtype) * outputs).sum(dim=-1)
    return of_q, of_k, of_v, -(shares * met).sum(dim=(0, 2)).to(sinks.dtype)


def _runs(starts: torch.Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """The tokens that attend to each other as (rows, heads, tokens): all, or those of one document after the other."""
    if starts is None:
        yield slice(None), slice(None), slice(None)
        return
    for meeting in squares(document_ends(starts)):
        yield meeting.rows, slice(None), meeting.queries


def _with_sinks(found: Attended, sinks: torch.Tensor) -> Attended:
    total = torch.logaddexp(found.logarithms, sinks.to(found.logarithms.dtype).view(1, -1, 1))
    return Attended(found.outputs * (found.logarithms - total).exp_().unsqueeze(-1), total)


def _attend_band(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> Attended:
    tokens, batch = q.shape[_SEQUENCE], len(q)
    if window is None or window >= tokens:
        return attend(q, k, v, causal=True)
    q, k, v = (_blocks(tensor, window) for tensor in (q, k, v))
    own = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), causal=True)
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs, logarithms = (part.to(wide).unflatten(0, (batch, -1)) for part in (own.outputs, own.logarithms))
    if window > 1:
        before = attend(*_before(q, k, v), causal=True)
        found, sums = (part.flip(2).unflatten(0, (batch, -1)) for part in (before.outputs, before.logarithms))
        merge(outputs[:, 1:, :, :-1], logarithms[:, 1:, :, :-1], Attended(found, sums))
    return Attended(_joined(outputs, tokens), _joined(logarithms, tokens))


def _attend_band_backward(gradient: torch.Tensor, qkv: Triple, found: Attended, window: int | None) -> Triple:
    tokens, batch = gradient.shape[_SEQUENCE], len(gradient)
    if window is None or window >= tokens:
        return attend_backward(gradient, *qkv, found, causal=True)
    of_outputs, q, k, v, outputs = (_blocks(tensor, window) for tensor in (gradient, *qkv, found.outputs))
    logarithms = _blocks(found.logarithms.unsqueeze(-1), window).squeeze(-1)
    own = Attended(outputs.flatten(0, 1), logarithms.flatten(0, 1))
    parts = attend_backward(
        of_outputs.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), own, causal=True
    )
    of_q, of_k, of_v = (part.unflatten(0, (batch, -1)) for part in parts)
    if window > 1:
        met = Attended(_later(outputs), _later(logarithms))
        parts = attend_backward(_later(of_outputs), *_before(q, k, v), met, causal=True)
        for whole, part in zip((of_q[:, 1:, :, :-1], of_k[:, :-1, :, 1:], of_v[:, :-1, :, 1:]), parts, strict=True):
            whole += part.flip(2).unflatten(0, (batch, -1))
    return _joined(of_q, tokens), _joined(of_k, tokens), _joined(of_v, tokens)


def _blocks(tensor: torch.Tensor, window: int) -> torch.Tensor:
    """[batch, heads, sequence, ...] -> [batch, blocks, heads, window, ...], the last block filled up with zeros."""
    filled = F.pad(tensor, (0, 0, 0, -tensor.shape[_SEQUENCE] % window))
    return filled.unflatten(_SEQUENCE, (-1, window)).movedim(_SEQUENCE, 1)


def _joined(blocks: torch.Tensor, tokens: int) -> torch.Tensor:
    return blocks.movedim(1, _SEQUENCE).flatten(_SEQUENCE, _SEQUENCE + 1)[:, :, :tokens]


def _before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Triple:
    """Queries of each block but the first, and what they meet of the block before: both reversed, a causal square."""
    k, v = (tensor[:, :-1, :, 1:].flatten(0, 1).flip(_SEQUENCE) for tensor in (k, v))
    return _later(q), k, v


def _later(blocks: torch.Tensor) -> torch.Tensor:
    """Of each block but the first all tokens but the last, reversed: [batch · (blocks - 1), heads, window - 1, ...]."""
    return blocks[:, 1:, :, :-1].flatten(0, 1).flip(_SEQUENCE)


_attention = torch.library.custom_op("meshwright::windowed_attention", _forward, mutates_args=())
_attention_backward = torch.library.custom_op("meshwright::windowed_attention_backward", _backward, mutates_args=())


@_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q, v)


@_attention_backward.register_fake
def _(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outputs: torch.Tensor,
    logarithms: torch.Tensor,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    of_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, sinks, starts, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, starts)


def _gradients(ctx: Any, gradient: torch.Tensor, _of_logarithms: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    kept = ctx.saved_tensors  # recomputation lets them be asked for once
    *of_qkv, of_sinks = torch.ops.meshwright.windowed_attention_backward(gradient, *kept, ctx.window)
    return *of_qkv, None if kept[5] is None else of_sinks, None, None


_attention.register_autograd(_gradients, setup_context=_keep)

WINDOWED = torch.ops.meshwright.windowed_attention.default
BODIES: dict[Any, Any] = {WINDOWED: _forward, torch.ops.meshwright.windowed_attention_backward.default: _backward}
