"""Attention to packed documents: how many there are in a row, and how long the one that a token is in.

Rows of s tokens are cut anywhere from documents after each other. Two tokens of a row d apart are of one document with
probability Σ max(0, l − d) / Σ l over the documents' lengths l, so that of all s² pairs

    E Σ L² = Σ f(l) / Σ l,    f(l) = Σ (s − |d|) (l − |d|) over |d| < min(s, l)

are of one document, L the lengths of a row's pieces. What attention costs follows from Σ L²; a single length, the one
that would give as much if all documents had it, stands for all of them in a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from profiles.hardware import HardwareProfile

from .compute_seconds import DOCUMENT_OPERATIONS, ComputeCost, ComputeSeconds
from .context_seconds import Once
from .job import TrainingJob
from .layout import Layout


@dataclass(frozen=True)
class RowPieces:
    """A row's documents as attention prices them: `number` of `length` tokens each, number · length = s and number ·
    length² = E Σ L²; and how many `pieces` the row is in the mean, which small ones at its ends add to."""

    number: float
    length: float
    pieces: float


def row_pieces(sequence: int, document_length: float) -> RowPieces:
    """Of rows of so many tokens, cut from documents of one length each.

    >>> row_pieces(6, 1.0)
    RowPieces(number=6.0, length=1.0, pieces=6.0)
    """
    length = float(_pairs(sequence, document_length)) / document_length / sequence
    return RowPieces(sequence / length, length, 1 + (sequence - 1) / document_length)


def even_length(parts: Sequence[tuple[float, np.ndarray]], sequence: int) -> float:
    """The length that stands for documents in rows of `sequence` tokens.

    `parts` are the share of tokens that each has, in any unit, and the lengths of its documents; empty ones are none.
    """
    there = [(share, lengths[lengths > 0].astype(np.float64)) for share, lengths in parts]
    shares = [share * _pairs(sequence, lengths).sum() / lengths.sum() for share, lengths in there]
    share = sum(shares) / sum(share for share, _ in there)
    low, high = min(float(lengths.min()) for _, lengths in there), max(float(lengths.max()) for _, lengths in there)
    for _ in range(100):
        middle = (low + high) / 2
        if _pairs(sequence, middle) / middle < share:
            low = middle
        else:
            high = middle
        if high - low <= 1e-9 * high:
            break
    return (low + high) / 2


def attended_documents(layout: Layout, job: TrainingJob) -> tuple[float, float]:
    """(how many sequences, of how many tokens each) attention sees in a microbatch: rows, or their documents."""
    if job.document_length is None:
        return float(layout.micro_batch), float(job.sequence)
    row = row_pieces(job.sequence, job.document_length)
    return layout.micro_batch * row.number, row.length


def document_work(
    layout: Layout,
    job: TrainingJob,
    hardware: HardwareProfile,
    once: Once,
    queries: float,
    keys_values: float,
    outputs: float,
    *,
    dtype: str,
) -> ComputeCost:
    """What our runtime does around attention to documents (runtime/document_attention.py), of one layer and microbatch.

    Sizes in elements of one rank, keys and values together. Each document's outputs are put where they belong, and
    backward its gradients. Where no kernel takes them at once each is a call, of which one is attention's own, and
    on CPUs its operations hide behind nothing.
    """
    assert job.document_length is not None
    on_cpu = hardware.backend == "gloo"
    at_once = not on_cpu and dtype in ("bf16", "fp16")
    calls = 0.0 if at_once else layout.micro_batch * row_pieces(job.sequence, job.document_length).pieces - 1
    there, back = (calls * operations for operations in DOCUMENT_OPERATIONS)
    each = hardware.launch_seconds if on_cpu else 0.0
    return ComputeCost(
        once("copy", outputs) + ComputeSeconds(overhead=there * each, operations=there),
        once("copy", queries + keys_values) + ComputeSeconds(overhead=back * each, operations=back),
    )


def _pairs(sequence: int, length: Any) -> Any:
    """f(l), in closed form; of a length that is no whole number as the terms with |d| < l have it."""
    m = np.minimum(float(sequence), np.ceil(length))  # d from 1 to m − 1
    ones, firsts, squares = m - 1, (m - 1) * m / 2, (m - 1) * m * (2 * m - 1) / 6
    return sequence * length + 2 * (sequence * length * ones - (sequence + length) * firsts + squares)
