"""Which tokens each sample of an indexed dataset has: document, sample and shuffle index, as Megatron builds them.

[Note: Sample order]
The documents of a split stand in a random order, E epochs of them after each other: the document index. Cut every S
tokens, with one token of overlap, they are samples; sample j is tokens [jS, jS + S + 1), and the sample index says in
which entry of the document index, and how many tokens into it, token jS lies. The shuffle index is the order in which
samples are trained on. E is the fewest epochs with E·T >= N·S + 1, for N samples and T tokens an epoch; where the last
epoch gives less than 80 % of its samples it is shuffled apart, so that no document comes up a last time early on.
All of it from one numpy RandomState, drawn from in the order: documents of the first epochs, documents of the last,
samples of the first, samples of the last. Source: megatron/core/datasets/gpt_dataset.py and helpers.cpp of Megatron-LM
core 0.16, whose arrays these equal, dtype and all but the sample index's (here int64).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LAST_EPOCH_SHARE = 0.80  # of its samples; below it the last epoch is shuffled apart


@dataclass(frozen=True)
class Epochs:
    """How often the documents are gone through; `last_apart` as in [Note: Sample order]."""

    number: int
    last_apart: bool


@dataclass(frozen=True)
class SampleOrder:
    """`documents` int32, a sequence's number each; `samples` [n + 1, 2] int64; `shuffle` [n] uint32 or int64."""

    documents: np.ndarray
    samples: np.ndarray
    shuffle: np.ndarray


def epochs_for(samples: int | None, tokens: int, sequence: int) -> Epochs:
    """Of `tokens` an epoch, for so many samples; None is one epoch. `tokens` is at least 1."""
    if samples is None:
        return Epochs(1, False)
    number = max(1, -(-(samples * sequence + 1) // tokens))
    if number == 1:
        return Epochs(1, False)
    before_last = ((number - 1) * tokens - 1) // sequence
    of_an_epoch = (tokens - 1) // sequence
    return Epochs(number, samples - before_last < int(_LAST_EPOCH_SHARE * of_an_epoch))


def build_order(lengths: np.ndarray, first: int, last: int, epochs: Epochs, *, sequence: int, seed: int) -> SampleOrder:
    """The order of the sequences [first, last) of a dataset whose sequences have these lengths."""
    random = np.random.RandomState(seed)
    apart = 1 if epochs.last_apart else 0
    parts = [np.tile(np.arange(first, last, dtype=np.int32), epochs.number - apart)]
    parts += [np.arange(first, last, dtype=np.int32)] * apart
    for part in parts:
        random.shuffle(part)
    documents = np.concatenate(parts)
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    samples = _cut(ends, sequence)
    number = len(samples) - 1
    before_last = number
    if epochs.last_apart:
        before_last = (int(ends[len(parts[0]) - 1]) - 1) // sequence
    kind = np.uint32 if number < np.iinfo(np.uint32).max - 1 else np.int64
    ranges = [np.arange(before_last, dtype=kind), np.arange(before_last, number, dtype=kind)]
    for samples_of in ranges[: 1 + apart]:
        random.shuffle(samples_of)
    return SampleOrder(documents, samples, np.concatenate(ranges))


def _cut(ends: np.ndarray, sequence: int) -> np.ndarray:
    """[samples + 1, 2]: the entry of the document index in which each sample's first token lies, and where in it.

    `ends` [documents] is where each entry ends in the concatenation. The entry that holds token t is the first that
    ends beyond t, so an empty document holds none.
    """
    number = (int(ends[-1]) - 1) // sequence
    tokens = np.arange(number + 1, dtype=np.int64) * sequence
    entries = np.searchsorted(ends, tokens, side="right")
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    samples = np.stack([entries, tokens - begins[entries]], axis=1)
    samples[0] = 0, 0  # also where the first document is empty
    return samples
