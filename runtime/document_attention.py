"""Attention within documents: causal, and to tokens of the same document alone.

[Note: Documents]
Documents are runs of tokens, so that no mask [sequence, sequence] is needed: of the queries in one span of a row and
the keys in another, those that may meet form rectangles. In the same span each document is a causal square of its own.
Of an earlier span only the document that goes on beyond its end is met: its keys there, by its queries here. What is
computed is so the sum of the squares of the documents' lengths, whatever the row's.

On CUDA in half precision flash attention's kernel takes all documents of a microbatch at once (varlen); the host waits,
once a call, to read where documents end. This has never run here. Elsewhere each document is one call.

RoPE needs no positions of its own: it turns queries and keys by the difference of their positions (arXiv 2104.09864,
equation 16), which the place of a document in its row does not change. As in ring_attention.py it is an operation of
our own: recomputation can keep it, compiled code calls it as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention_kernels import Attended, at_once, attend, attend_backward, attend_documents, attend_documents_backward

Spans = Sequence[tuple[int, int]]


def document_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Attention of each query to the keys of its document that are not later ([Note: Documents]).

    q [batch, heads, sequence, head_dim], k and v with fewer heads, if grouped, and v with a head_dim of its own;
    starts [batch, sequence], where the document of each token begins -> as q, of v's head_dim.
    """
    return torch.ops.meshwright.document_attention(q, k, v, starts)[0]


@dataclass(frozen=True)
class Meeting:
    """Queries that attend to keys, as slices of the batch and of what a rank holds of the sequence; `causal` where
    they are the same tokens."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def document_ends(starts: torch.Tensor) -> list[list[int]]:
    """Where the documents of each row of `starts` [batch, sequence] begin, and the sequence's length last.

    >>> document_ends(torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0]]))
    [[0, 2, 4], [0, 4]]
    """
    begins: list[list[int]] = [[] for _ in starts]
    for row, position in (starts == torch.arange(starts.shape[1], device=starts.device)).nonzero().tolist():
        begins[row].append(position)
    return [[*row, starts.shape[1]] for row in begins]


def meetings(bounds: Sequence[Sequence[int]], queries: Spans, keys: Spans) -> Iterator[Meeting]:
    """What meets of queries and keys at the positions of these spans, given the bounds of each row's documents.

    A span of queries and one of keys are the same or have nothing in common.

    >>> [(m.queries, m.keys, m.causal) for m in meetings([[0, 3, 8]], [(4, 8)], [(0, 4)])]
    [(slice(0, 4, None), slice(3, 4, None), False)]
    """
    for row, ends in enumerate(bounds):
        for (first, last), query in _placed(queries):
            for (start, end), key in _placed(keys):
                for begin, stop in itertools.pairwise(ends):
                    if start == first and begin < last and stop > first:
                        own = slice(max(begin, first) - first + query, min(stop, last) - first + query)
                        yield Meeting(slice(row, row + 1), own, own, causal=True)
                    elif start < first and begin < end and stop > first:
                        ours = slice(query, min(stop, last) - first + query)
                        theirs = slice(max(begin, start) - start + key, end - start + key)
                        yield Meeting(slice(row, row + 1), ours, theirs, causal=False)


def _placed(spans: Spans) -> Iterator[tuple[tuple[int, int], int]]:
    """Each span, and where it lies in what holds all of them."""
    place = 0
    for start, end in spans:
        yield (start, end), place
        place += end - start


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, logarithms of the sums of exponentials [batch, heads, sequence])."""
    bounds = document_ends(starts)
    if at_once(q):
        found = attend_documents(q, k, v, bounds)
        return found.outputs, found.logarithms
    outputs, logarithms = empty_outputs(q, v)
    for meeting in squares(bounds):
        rows, tokens = meeting.rows, meeting.queries
        found = attend(*(tensor[rows, :, tokens] for tensor in (q, k, v)), causal=True)
        outputs[rows, :, tokens] = found.outputs
        logarithms[rows, :, tokens] = found.logarithms
    return outputs, logarithms


def _backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outputs: torch.Tensor,
    logarithms: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bounds = document_ends(starts)
    if at_once(q):
        return attend_documents_backward(gradient, q, k, v, Attended(outputs, logarithms), bounds)
    gradients = [torch.empty_like(tensor) for tensor in (q, k, v)]
    for meeting in squares(bounds):
        rows, tokens = meeting.rows, meeting.queries
        here, queries, keys, values = (tensor[rows, :, tokens] for tensor in (gradient, q, k, v))
        found = Attended(outputs[rows, :, tokens], logarithms[rows, :, tokens])
        parts = attend_backward(here, queries, keys, values, found, causal=True)
        for whole, part in zip(gradients, parts, strict=True):
            whole[rows, :, tokens] = part
    return gradients[0], gradients[1], gradients[2]


def squares(bounds: Sequence[Sequence[int]]) -> Iterator[Meeting]:
    """Each document of whole rows, which meets itself."""
    whole = [(0, bounds[0][-1])]
    return meetings(bounds, whole, whole)


def empty_outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for outputs and logarithms; outputs in the order [batch, sequence, heads, head_dim], which the product
    after attention takes as it lies."""
    batch, heads, tokens, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)
    return outputs, q.new_empty((batch, heads, tokens), dtype=wide)


_attention = torch.library.custom_op("meshwright::document_attention", _forward, mutates_args=())
_attention_backward = torch.library.custom_op("meshwright::document_attention_backward", _backward, mutates_args=())


@_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q, v)


@_attention_backward.register_fake
def _(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outputs: torch.Tensor,
    logarithms: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, starts = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _gradients(ctx: Any, gradient: torch.Tensor, _of_logarithms: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *torch.ops.meshwright.document_attention_backward(gradient, *ctx.saved_tensors), None


_attention.register_autograd(_gradients, setup_context=_keep)

DOCUMENTS = torch.ops.meshwright.document_attention.default
BODIES: dict[Any, Any] = {DOCUMENTS: _forward, torch.ops.meshwright.document_attention_backward.default: _backward}
