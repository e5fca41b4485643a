"""Ring attention: queries stay on their cp rank, keys and values travel around the group while it computes.

[Note: Ring]
Of 2·cp chunks of a sequence rank i holds the i-th from the front and the i-th from the end, so that under the causal
mask every rank has equally much to do in every step. In step t it attends to the keys and values of rank
j = i - t (mod cp), while they are under way to rank i + 1 (arXiv 2310.01889, section 3):

- t = 0, its own: causal, since its two chunks are in order;
- j < i: all its queries to the first chunk of j, whose second comes after them all;
- j > i: the queries of its second chunk to both of j, which come after its first.

Without the mask all its queries attend to all keys in every step.

Each step gives outputs and the logarithms of their sums of exponentials; by these they are weighted into one, in
fp32 at least (arXiv 2205.14135, section 3.1). Backward, the same steps are taken once more, each given the merged
outputs and logarithms. The gradients of keys and values follow them: they leave the rank of step 1, are added to
by every later one, and go home after the last step, behind which nothing hides; those of step 0 wait there.
They travel, and are added up, in the dtype of the keys. A step of torch's autograd is one operation of a library of
our own: recomputation can keep it, compiled code calls it, and a dispatch mode can see through it.

Where documents end within sequences ([Note: Documents] in document_attention.py), the same steps are taken, and in each
only what may meet meets. Keys go all the way round all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from .attention_kernels import Attended, attend, attend_backward, merge
from .document_attention import BODIES as DOCUMENT_BODIES
from .document_attention import Meeting, document_ends, meetings
from .windowed_attention import BODIES as WINDOWED_BODIES


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup,
    starts: torch.Tensor | None = None,
    *,
    causal: bool,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of the whole sequences ([Note: Ring]), or of their documents.

    q [batch, heads, sequence / cp, head_dim], k and v with fewer heads, if grouped, and v with a head_dim of its own;
    starts [batch, sequence], where the document of each token begins, if sequences have some
    -> [batch, heads, sequence / cp, head_dim of v]. Every rank of the group must call it.
    """
    return torch.ops.meshwright.ring_attention(q, k, v, group.group_name, starts, causal)[0]


@dataclass(frozen=True)
class _Step:
    """The queries and keys of a rank's two chunks that meet in a step, as slices of the sequence dim."""

    source: int
    queries: slice
    keys: slice
    causal: bool = False


def _steps(rank: int, ranks: int, tokens: int, *, causal: bool) -> list[_Step]:
    """The steps of a rank that holds `tokens` of each sequence.

    >>> [(step.source, step.queries.start, step.keys.stop) for step in _steps(1, 3, 8, causal=True)]
    [(1, 0, 8), (0, 0, 4), (2, 4, 8)]
    """
    half, steps = tokens // 2, [_Step(rank, slice(0, tokens), slice(0, tokens), causal=causal)]
    for source in ((rank - step) % ranks for step in range(1, ranks)):
        if not causal:
            steps.append(_Step(source, slice(0, tokens), slice(0, tokens)))
        elif source < rank:
            steps.append(_Step(source, slice(0, tokens), slice(0, half)))
        else:
            steps.append(_Step(source, slice(half, tokens), slice(0, tokens)))
    return steps


def ring_spans(rank: int, ranks: int, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The positions that a rank holds, `tokens` of each sequence, as [start, end) of its two chunks."""
    chunk, mirrored = tokens // 2, 2 * ranks - 1 - rank
    return (rank * chunk, (rank + 1) * chunk), (mirrored * chunk, (mirrored + 1) * chunk)


def _met(step: _Step, ring: _Ring, tokens: int, bounds: list[list[int]] | None) -> Sequence[Meeting]:
    """What meets in a step of a rank that holds `tokens` of each sequence; `bounds` are of documents, if there are."""
    if bounds is None:
        return (Meeting(slice(None), step.queries, step.keys, step.causal),)
    own, theirs = ring_spans(ring.rank, ring.ranks, tokens), ring_spans(step.source, ring.ranks, tokens)
    return tuple(meetings(bounds, own, theirs))


WAIT = "CP::wait"  # the span of torch's profiler in which the ring waits for a message


class _Ring:
    """Messages to the next rank of the group and from the one before."""

    def __init__(self, group_name: str) -> None:
        self.group = _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]
        self.rank, self.ranks = self.group.rank(), self.group.size()

    def pass_on(self, sent: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Send a contiguous tensor; the function returned waits for the one of that shape that comes."""
        received = torch.empty_like(sent)
        following, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=self.group, group_peer=following),
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=before),
            ]
        )

        def arrived() -> torch.Tensor:
            with torch.profiler.record_function(WAIT):
                for work in works:
                    work.wait()
            return received

        return arrived


def _joined(pair: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys and values, or their gradients, as one message."""
    return torch.cat([tensor.flatten() for tensor in pair])


def _parted(message: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = message.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: str, starts: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, logarithms of the sums of exponentials [batch, heads, tokens])."""
    ring, bounds = _Ring(group), None if starts is None else document_ends(starts)
    first, *others = _steps(ring.rank, ring.ranks, q.shape[2], causal=causal)
    held = _joined((k, v))
    coming = ring.pass_on(held)
    if bounds is None:
        outputs, logarithms = _own(attend(q, k, v, causal=first.causal), q)
    else:
        outputs, logarithms = _none(q, v)
        _attend_to(_met(first, ring, q.shape[2], bounds), q, k, v, outputs, logarithms)
    for step in others:
        held = coming()
        if step is not others[-1]:
            coming = ring.pass_on(held)
        keys, values = _parted(held, (k, v))
        _attend_to(_met(step, ring, q.shape[2], bounds), q, keys, values, outputs, logarithms)
    return outputs.to(q.dtype), logarithms


def _attend_to(
    met: Sequence[Meeting],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outputs: torch.Tensor,
    logarithms: torch.Tensor,
) -> None:
    """Merge attention to these keys into outputs and logarithms."""
    for meeting in met:
        rows, queries, keys = meeting.rows, meeting.queries, meeting.keys
        found = attend(q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], causal=meeting.causal)
        merge(outputs[rows, :, queries], logarithms[rows, :, queries], found)


def _none(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to nothing yet, which others are merged into."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, tokens, _ = q.shape
    outputs = q.new_zeros((batch, tokens, heads, v.shape[-1]), dtype=wide).transpose(1, 2)
    return outputs, q.new_full((batch, heads, tokens), float("-inf"), dtype=wide)


def _own(found: Attended, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first step gives, in memory that the others are merged into: outputs in the order [batch, tokens, heads,
    head_dim], which the product after attention takes as it lies."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, tokens, width = found.outputs.shape
    outputs = q.new_empty((batch, tokens, heads, width), dtype=wide).transpose(1, 2)
    return outputs.copy_(found.outputs), found.logarithms.to(wide, copy=True).contiguous()


def _backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outputs: torch.Tensor,
    logarithms: torch.Tensor,
    group: str,
    starts: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q, and of k and v as one message."""
    ring, bounds = _Ring(group), None if starts is None else document_ends(starts)
    first, *others = _steps(ring.rank, ring.ranks, q.shape[2], causal=causal)
    found, wide = Attended(outputs, logarithms), torch.promote_types(q.dtype, torch.float32)
    held = _joined((k, v))
    coming = ring.pass_on(held)
    if bounds is None:
        own, *of_keys = attend_backward(gradient, q, k, v, found, causal=first.causal)
        of_queries, home = own.to(wide), _joined(of_keys)
        del own, of_keys
    else:
        of_queries, home = torch.zeros_like(q, dtype=wide), torch.zeros_like(held)
        met = _met(first, ring, q.shape[2], bounds)
        _add(met, _gradients_of(met, gradient, (q, k, v), found), (of_queries, *_parted(home, (k, v))))
    following: Callable[[], torch.Tensor] | None = None  # gradients of what is held, from the rank before
    for step in others:
        held = coming()
        if step is not others[-1]:
            coming = ring.pass_on(held)
        met = _met(step, ring, q.shape[2], bounds)
        parts = _gradients_of(met, gradient, (q, *_parted(held, (k, v))), found)
        gathered = torch.zeros_like(held) if following is None else following()
        _add(met, parts, (of_queries, *_parted(gathered, (k, v))))
        following = ring.pass_on(gathered)
    if following is not None:
        home += following()
    return of_queries.to(q.dtype), home


def _gradients_of(
    met: Sequence[Meeting], gradient: torch.Tensor, qkv: Sequence[torch.Tensor], found: Attended
) -> list[tuple[torch.Tensor, ...]]:
    """What each meeting contributes to the gradients of queries, keys and values."""
    parts = []
    for meeting in met:
        rows, queries, keys = meeting.rows, meeting.queries, meeting.keys
        here, q, outputs, logarithms = (
            tensor[rows, :, queries] for tensor in (gradient, qkv[0], found.outputs, found.logarithms)
        )
        k, v = (tensor[rows, :, keys] for tensor in qkv[1:])
        parts.append(attend_backward(here, q, k, v, Attended(outputs, logarithms), causal=meeting.causal))
    return parts


def _add(met: Sequence[Meeting], parts: Sequence[tuple[torch.Tensor, ...]], gradients: Sequence[torch.Tensor]) -> None:
    """Add each meeting's part to the gradients of queries, keys and values."""
    for meeting, part in zip(met, parts, strict=True):
        places = (meeting.queries, meeting.keys, meeting.keys)
        for whole, tokens, added in zip(gradients, places, part, strict=True):
            whole[meeting.rows, :, tokens] += added


_ring = torch.library.custom_op("meshwright::ring_attention", _forward, mutates_args=())
_ring_backward = torch.library.custom_op("meshwright::ring_attention_backward", _backward, mutates_args=())


@_ring.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: str, starts: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)
    return outputs, q.new_empty((batch, heads, tokens), dtype=wide)


@_ring_backward.register_fake
def _(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outputs: torch.Tensor,
    logarithms: torch.Tensor,
    group: str,
    starts: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), k.new_empty(k.numel() + v.numel())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.group, starts, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _gradients(ctx: Any, gradient: torch.Tensor, _of_logarithms: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, outputs, logarithms, starts = ctx.saved_tensors
    of_q, message = torch.ops.meshwright.ring_attention_backward(
        gradient, q, k, v, outputs, logarithms, ctx.group, starts, ctx.causal
    )
    return of_q, *_parted(message, (k, v)), None, None, None


_ring.register_autograd(_gradients, setup_context=_keep)

RING = torch.ops.meshwright.ring_attention.default
_BODIES: dict[Any, Callable[..., Any]] = {
    **DOCUMENT_BODIES,
    **WINDOWED_BODIES,
    RING: _forward,
    torch.ops.meshwright.ring_attention_backward.default: _backward,
}


def seen_through(mode: TorchDispatchMode, operation: Any) -> Callable[..., Any] | None:
    """What an operation of attention of ours is made of, to be called in the handler of `mode`, which then sees it all;
    None for every other operation."""
    body = _BODIES.get(operation)
    if body is None:
        return None

    def watched(*args: Any) -> Any:
        TorchDispatchMode.__enter__(mode)  # and nothing that a kind of mode does besides when it is first entered
        try:
            return body(*args)
        finally:
            TorchDispatchMode.__exit__(mode, None, None, None)

    return watched
