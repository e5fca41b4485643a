"""Attention of sequences, or heads of them, that a rank holds whole: which of the operations does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .document_attention import document_attention
from .windowed_attention import windowed_attention


@dataclass(frozen=True)
class Reach:
    """What a query attends to: under `causal` what is not later, of that the `window` latest tokens, if it is not None,
    and under its softmax the `sinks` [heads], if there are some."""

    causal: bool = True
    window: int | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.window is None and self.sinks is None

    def of_heads(self, piece: int, pieces: int) -> Reach:
        """The same for a piece of the heads."""
        own = None if self.sinks is None else self.sinks.unflatten(0, (pieces, -1))[piece]
        return Reach(self.causal, self.window, own)


def whole_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reach: Reach, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of each query to the keys in its reach, and of its document where `starts` are given.

    q [batch, heads, sequence, head_dim], k and v with fewer heads, if grouped; starts [batch, sequence], where the
    document of each token begins -> as q, of v's head_dim.
    """
    if not reach.plain:
        assert reach.causal, "a window and sinks are of causal attention"
        return windowed_attention(q, k, v, window=reach.window, sinks=reach.sinks, starts=starts)
    if starts is not None:
        assert reach.causal, "documents are attended to causally"
        return document_attention(q, k, v, starts)
    return F.scaled_dot_product_attention(q, k, v, is_causal=reach.causal, enable_gqa=q.shape[1] != k.shape[1])
