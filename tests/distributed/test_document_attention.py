"""Attention within documents against torch's own with a mask: in one call, document by document, and over cp."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import runtime.document_attention
from runtime import attention_kernels
from runtime.attention_kernels import Attended, attend, attend_backward
from runtime.context_parallel import SequenceShard, self_attention
from runtime.data.packing import document_starts
from runtime.document_attention import document_attention, document_ends, meetings
from runtime.whole_attention import Reach
from tests.distributed.harness import run_ranks
from tests.distributed.test_context_parallel import SEQUENCE, SHAPES, with_gradients
from tests.distributed.test_context_parallel import whole_inputs as inputs_of

END = 0
# Rows of two: short documents and long ones; one and as many as there are tokens; ends at all borders of chunks.
ROWS = {
    "some": np.random.default_rng(2).integers(0, 7, size=(2, SEQUENCE)),
    "one and all": np.stack([np.ones(SEQUENCE, np.int64), np.zeros(SEQUENCE, np.int64)]),
    "at borders": np.stack([np.arange(SEQUENCE) % 3 - 2, np.arange(SEQUENCE) % 12 - 11]),
}
STARTS = {name: torch.from_numpy(document_starts(ids, END)) for name, ids in ROWS.items()}


def masked(starts: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Torch's attention with a mask [sequence, sequence] of each row."""
    places = torch.arange(SEQUENCE)
    seen = (places[None, None] >= starts[:, :, None]) & (places[None, None] <= places[None, :, None])
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[:, None], enable_gqa=q.shape[1] != k.shape[1]
    )


def most(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.double() - theirs).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_attention_with_a_mask(shape: str, rows: str) -> None:
    whole, starts = inputs_of(shape, torch.float64), STARTS[rows]
    found = with_gradients(lambda *qkv: document_attention(*qkv, starts), *whole)
    for ours, theirs in zip(found, with_gradients(masked(starts), *whole), strict=True):
        assert most(ours, theirs) < 1e-12


def kernel_of_several_lengths(q: Any, k: Any, v: Any, ends: Any, *_: Any, scale: float) -> tuple[torch.Tensor, ...]:
    """What flash attention's kernel gives on CUDA: q [tokens, heads, head_dim], logarithms [heads, tokens]."""
    outputs, logarithms = [], []
    for begin, end in itertools.pairwise(ends.tolist()):
        found = attend(*(tensor[begin:end].transpose(0, 1)[None] for tensor in (q, k, v)), causal=True)
        outputs.append(found.outputs[0].transpose(0, 1))
        logarithms.append(found.logarithms[0])
    assert scale == q.shape[-1] ** -0.5
    return torch.cat(outputs), torch.cat(logarithms, dim=1)


def its_backward(
    of_outputs: Any, q: Any, k: Any, v: Any, outputs: Any, logarithms: Any, ends: Any, *_: Any, scale: float
) -> list[torch.Tensor]:
    parts = []
    for begin, end in itertools.pairwise(ends.tolist()):
        here, *qkv, there = (t[begin:end].transpose(0, 1)[None] for t in (of_outputs, q, k, v, outputs))
        found = Attended(there, logarithms[None, :, begin:end])
        parts.append([t[0].transpose(0, 1) for t in attend_backward(here, *qkv, found, causal=True)])  # pyright: ignore
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("shape", ["grouped", "all alike"])
def test_all_documents_in_one_call(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How tensors are packed for CUDA's kernel, which has never run here and is stood in for."""

    class Kernels:
        _flash_attention_forward = staticmethod(kernel_of_several_lengths)
        _flash_attention_backward = staticmethod(its_backward)
        _scaled_dot_product_flash_attention_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention_for_cpu_backward = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        )

    monkeypatch.setattr(attention_kernels, "_aten", Kernels)
    monkeypatch.setattr(runtime.document_attention, "at_once", lambda _q: True)
    whole, starts = inputs_of(shape, torch.float64), STARTS["some"]
    found = with_gradients(lambda *qkv: document_attention(*qkv, starts), *whole)
    for ours, theirs in zip(found, with_gradients(masked(starts), *whole), strict=True):
        assert most(ours, theirs) < 1e-12


def differences() -> dict[tuple[str, str, str, torch.dtype], list[float]]:
    """The largest differences of outputs and gradients on this cp rank, by style, shape, rows and dtype."""
    group, found = dist.group.WORLD, {}
    assert group is not None
    for style, shape, rows in itertools.product(("ring", "all-to-all"), SHAPES, ROWS):
        if style == "all-to-all" and SHAPES[shape][1] % group.size():
            continue
        shard, starts = SequenceShard(group.rank(), group.size(), style, group), STARTS[rows]
        positions = [p for start, end in shard.spans(SEQUENCE // group.size()) for p in range(start, end)]
        for dtype in (torch.float64, torch.bfloat16):
            whole = inputs_of(shape, dtype)
            expected = with_gradients(masked(starts), *(tensor.double() for tensor in whole))
            local = with_gradients(
                lambda *qkv, shard=shard, starts=starts: self_attention(*qkv, shard, Reach(), starts),
                *(tensor[:, :, positions] for tensor in whole),
            )
            found[style, shape, rows, dtype] = [
                most(ours, right[:, :, positions]) for ours, right in zip(local, expected, strict=True)
            ]
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.full), 4])
def test_over_cp(ranks: int) -> None:
    for rank in run_ranks(differences, ranks):
        assert len(rank) == (24 if ranks == 3 else 48)
        for case, errors in rank.items():
            assert max(errors) < (1e-12 if case[-1] == torch.float64 else 0.25), (case, errors)


def test_no_more_is_computed_than_documents_need() -> None:
    """Of a row on a ring of two ranks: all pairs of a document once, and nothing else."""
    bounds, spans = document_ends(STARTS["some"]), [SequenceShard(rank, 2, "ring").spans(12) for rank in (0, 1)]
    for row, (begins, ids) in enumerate(zip(bounds, ROWS["some"], strict=True)):
        seen = np.zeros((SEQUENCE, SEQUENCE), dtype=int)
        for queries, keys in itertools.product(spans, spans):
            held = [np.concatenate([np.arange(*span) for span in of]) for of in (queries, keys)]
            for meeting in meetings([begins], queries, keys):
                pairs = np.ix_(held[0][meeting.queries], held[1][meeting.keys])
                square = np.ones((len(pairs[0]), pairs[1].shape[1]), dtype=int)
                seen[pairs] += np.tril(square) if meeting.causal else square
        documents = np.cumsum(np.append(0, ids[:-1] == END))
        wanted = np.tril(documents[:, None] == documents[None, :])
        assert np.array_equal(seen, wanted.astype(int)), row


def test_the_worked_examples() -> None:
    assert doctest.testmod(runtime.document_attention) == doctest.TestResults(failed=0, attempted=2)
