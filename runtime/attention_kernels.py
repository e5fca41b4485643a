"""Attention of some queries to some keys with the logarithms by which it is merged, through torch's fused kernels.

`torch.nn.functional.scaled_dot_product_attention` gives outputs alone; the operations below it, one a backend, give
the logarithm of each query's sum of exponentials besides, and take a merged one in their backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)  # what CUDA's flash kernel takes
_CUDA_WIDTH = 8  # and of which numbers of elements a head


@dataclass(frozen=True)
class Attended:
    """`outputs` [batch, heads, queries, head_dim of the values], `logarithms` [batch, heads, queries]."""

    outputs: torch.Tensor
    logarithms: torch.Tensor


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Attended:
    """Softmax(q kᵀ / √head_dim) v. k and v may have fewer heads; `causal` only where there are as many keys as queries.

    CUDA's kernel has never run here; in precisions that it does not know the products are written out.
    """
    width, scale = _width(q, v), q.shape[-1] ** -0.5
    kernel = _kernel(q)
    if kernel == "composed":
        return _composed(q, k, v, scale, causal=causal)
    padded = [_padded(tensor, width) for tensor in (q, k, v)]
    if kernel == "cpu":
        outputs, logarithms = _aten._scaled_dot_product_flash_attention_for_cpu(*padded, 0.0, causal, scale=scale)
    else:
        outputs, logarithms, *_ = _aten._scaled_dot_product_flash_attention(*padded, 0.0, causal, scale=scale)
    return Attended(outputs[..., : v.shape[-1]], logarithms)


def attend_backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, found: Attended, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What these keys contribute to the gradients of q, k and v, where `found` is attention to all keys."""
    width, scale = _width(q, v), q.shape[-1] ** -0.5
    kernel = _kernel(q)
    if kernel == "composed":
        return _composed_backward(gradient, q, k, v, found, scale, causal=causal)
    gradient, q_, k_, v_, outputs = (_padded(tensor, width) for tensor in (gradient, q, k, v, found.outputs))
    merged = (gradient, q_, k_, v_, outputs, found.logarithms)
    if kernel == "cpu":
        of_q, of_k, of_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*merged, 0.0, causal, scale=scale)
    else:
        of_q, of_k, of_v = _aten._scaled_dot_product_flash_attention_backward(
            *merged, None, None, q.shape[2], k.shape[2], 0.0, causal, *_no_seed(q.device), scale=scale
        )
    return of_q[..., : q.shape[-1]], of_k[..., : k.shape[-1]], of_v[..., : v.shape[-1]]


def merge(outputs: torch.Tensor, logarithms: torch.Tensor, found: Attended) -> None:
    """Add, in place, attention to other keys: each by its share of all exponentials."""
    total = torch.logaddexp(logarithms, found.logarithms)
    outputs.mul_((logarithms - total).exp_().unsqueeze(-1))
    outputs.addcmul_(found.outputs.to(outputs.dtype), (found.logarithms - total).exp_().unsqueeze(-1))
    logarithms.copy_(total)


def at_once(q: torch.Tensor) -> bool:
    """Whether there is a kernel that takes documents of several lengths in one call."""
    return _kernel(q) == "flash"


def attend_documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Sequence[Sequence[int]]) -> Attended:
    """Causal attention within documents; `bounds` are where those of each row begin, and the row's end.

    Flash attention's kernel for sequences of several lengths (arXiv 2307.08691), which never ran here.
    """
    width, scale = _width(q, v), q.shape[-1] ** -0.5
    packed = [_rows_joined(_padded(tensor, width)) for tensor in (q, k, v)]
    lengths, longest = _lengths(bounds, q.device)
    outputs, logarithms, *_ = _aten._flash_attention_forward(
        *packed, lengths, lengths, longest, longest, 0.0, True, False, scale=scale
    )
    batch, tokens = len(bounds), q.shape[2]
    # The kernel's logarithms are [heads, batch · sequence].
    return Attended(
        _rows_parted(outputs, batch)[..., : v.shape[-1]],
        logarithms.view(q.shape[1], batch, tokens).transpose(0, 1).contiguous(),
    )


def attend_documents_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    found: Attended,
    bounds: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    width, scale = _width(q, v), q.shape[-1] ** -0.5
    packed = [_rows_joined(_padded(tensor, width)) for tensor in (gradient, q, k, v, found.outputs)]
    lengths, longest = _lengths(bounds, q.device)
    logarithms = found.logarithms.transpose(0, 1).flatten(1).contiguous()
    of_qkv = _aten._flash_attention_backward(
        *packed, logarithms, lengths, lengths, longest, longest, 0.0, True, *_no_seed(q.device), scale=scale
    )
    of_q, of_k, of_v = (_rows_parted(tensor, len(bounds)) for tensor in of_qkv)
    return of_q[..., : q.shape[-1]], of_k[..., : k.shape[-1]], of_v[..., : v.shape[-1]]


def _rows_joined(heads: torch.Tensor) -> torch.Tensor:
    """[batch, heads, sequence, head_dim] -> [batch · sequence, heads, head_dim]"""
    return heads.transpose(1, 2).flatten(0, 1)


def _rows_parted(joined: torch.Tensor, batch: int) -> torch.Tensor:
    return joined.unflatten(0, (batch, -1)).transpose(1, 2)


def _lengths(bounds: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, int]:
    """Where each document ends in all rows after each other, from 0 on, and the length of the longest."""
    lengths = [end - begin for row in bounds for begin, end in itertools.pairwise(row)]
    ends = [0, *itertools.accumulate(lengths)]
    return torch.tensor(ends, dtype=torch.int32, device=device), max(lengths)


def _no_seed(device: torch.device) -> tuple[Any, Any]:
    """There is no dropout whose random numbers a backward pass would have to draw once more."""
    seed = torch.empty(2, dtype=torch.uint64, device=device)
    return seed, seed[0]


def _kernel(q: torch.Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    return "flash" if q.dtype in _HALVES else "composed"


def _width(q: torch.Tensor, v: torch.Tensor) -> int:
    """Elements of a head that the kernel is given, the same of keys and values: zeros beyond change nothing."""
    width = max(q.shape[-1], v.shape[-1])
    return width if q.device.type == "cpu" else -(-width // _CUDA_WIDTH) * _CUDA_WIDTH


def _padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(tensor, (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor


def _composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool) -> Attended:
    scores = _scores(q, k, scale, causal=causal)
    logarithms = scores.logsumexp(dim=-1)
    return Attended((scores - logarithms.unsqueeze(-1)).exp_() @ _repeated(v, q), logarithms)


def _composed_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    found: Attended,
    scale: float,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By FlashAttention's algorithm 4 (arXiv 2205.14135, appendix B), of all keys at once."""
    shares = (_scores(q, k, scale, causal=causal) - found.logarithms.unsqueeze(-1)).exp_()
    mean = (gradient * found.outputs).sum(dim=-1, keepdim=True)
    of_scores = shares * (gradient @ _repeated(v, q).transpose(-1, -2) - mean) * scale
    of_k, of_v = (
        whole.unflatten(1, (k.shape[1], -1)).sum(dim=2)
        for whole in (of_scores.transpose(-1, -2) @ q, shares.transpose(-1, -2) @ gradient)
    )
    return of_scores @ _repeated(k, q), of_k, of_v


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, *, causal: bool) -> torch.Tensor:
    scores = q @ _repeated(k, q).transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(later, float("-inf"))
    return scores


def _repeated(heads: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Each key-value head once for every query head that attends to it."""
    return heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1)
