"""Context parallelism: which tokens of each sequence a cp rank holds, and how its attention reaches the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from planner.layout import Layout

from .head_exchange import all_to_all_attention
from .ring_attention import ring_attention, ring_spans
from .whole_attention import Reach, whole_attention

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SequenceShard:
    """The part of each sequence that a rank holds, and the group of those that hold the rest."""

    rank: int = 0
    ranks: int = 1
    style: str = "none"
    group: dist.ProcessGroup | None = None

    def spans(self, tokens: int) -> Spans:
        """The positions of the `tokens` that the rank holds of a sequence, as [start, end) in order.

        Under the ring a piece from the front and one from the end ([Note: Ring] in ring_attention.py), else one piece:

        >>> SequenceShard(1, 4, "ring").spans(4), SequenceShard(1, 4, "all-to-all").spans(4)
        (((2, 4), (12, 14)), ((4, 8),))
        """
        if self.style != "ring":
            return ((self.rank * tokens, (self.rank + 1) * tokens),)
        return ring_spans(self.rank, self.ranks, tokens)


WHOLE = SequenceShard()


def pick(whole: torch.Tensor, spans: Spans, dim: int) -> torch.Tensor:
    """The positions of `spans` of a tensor that has all along `dim`."""
    pieces = [whole.narrow(dim, start, end - start) for start, end in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def inputs_and_targets(samples: torch.Tensor, layout: Layout, cp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples as a TokenSource has them -> inputs and targets [rows, sequence / cp] of a cp rank."""
    inputs, targets = whole_inputs_and_targets(samples)
    spans = SequenceShard(cp_rank, layout.cp, layout.cp_style).spans(inputs.shape[1] // layout.cp)
    return pick(inputs, spans, 1).contiguous(), pick(targets, spans, 1).contiguous()


def whole_inputs_and_targets(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, sequence + 1] ids: each token's target is the next one; or [rows, 2, sequence], both as they are."""
    return (samples[:, 0], samples[:, 1]) if samples.ndim == 3 else (samples[:, :-1], samples[:, 1:])


def self_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shard: SequenceShard,
    reach: Reach,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the rank's queries to those of all keys that are in their reach, and of their document where
    `starts` are given.

    q [batch, heads, sequence / cp, head_dim], k and v with fewer heads, if grouped; starts [batch, sequence], where
    the document of each token of the whole sequences begins -> as q, of v's head_dim.
    """
    assert reach.causal or starts is None, "documents are attended to causally"
    if shard.group is None:
        return whole_attention(q, k, v, reach, starts)
    if shard.style == "ring":
        assert reach.plain, "no window and no sinks go round a ring"
        return ring_attention(q, k, v, shard.group, starts, causal=reach.causal)
    return all_to_all_attention(q, k, v, shard.group, reach, starts)
