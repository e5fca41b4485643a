"""All-to-all attention over cp: heads for pieces of the sequence, attention to whole sequences, and back.

arXiv 2309.14509 (DeepSpeed Ulysses), section 3: of queries, of keys and values, and of outputs a rank sends each
other one its share and gets as much, and backward the same of their gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from .whole_attention import Reach, whole_attention

_HEADS, _SEQUENCE = 1, 2  # dims of [batch, heads, sequence, head_dim]


def all_to_all_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup,
    reach: Reach,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of the whole sequences, of which rank i holds the i-th piece, or of
    their documents, as far as they reach.

    q [batch, heads, sequence / cp, head_dim], k and v with fewer heads, if grouped, and v with a head_dim of its own;
    starts [batch, sequence], where the document of each token begins, if sequences have some
    -> [batch, heads, sequence / cp, head_dim of v]. cp divides all heads. Every rank of the group must call it.
    """
    q = _exchanged(q, _HEADS, _SEQUENCE, group)
    both = _exchanged(torch.cat((k, v), dim=-1), _HEADS, _SEQUENCE, group)
    k, v = both.split([k.shape[-1], v.shape[-1]], dim=-1)
    mixed = whole_attention(q, k, v, reach.of_heads(group.rank(), group.size()), starts)
    return _exchanged(mixed, _SEQUENCE, _HEADS, group)


def _exchanged(x: torch.Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Whole along `cut` and a piece along `joined` -> a piece along `cut` and whole along `joined`."""
    pieces = x.unflatten(cut, (group.size(), -1)).movedim(cut, 0).contiguous()
    received = collectives.wait_tensor(collectives.all_to_all_single_autograd(pieces, None, None, group))
    return received.movedim(0, joined).flatten(joined, joined + 1)
