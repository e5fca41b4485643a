"""The TokenSource of indexed datasets: the samples of training and of validation, in Megatron's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profiles.input_error import InputError

from .blend import Blend, blend_sizes
from .indexed_dataset import IndexedDataset, open_indexed, tokens_path
from .packing import Packing
from .split import SPLITS, parse_split, split_bounds
from .split_samples import BlendedSamples, DatasetSamples, Samples, blended_samples, dataset_samples

_TRAINING, _VALIDATION = 0, 1  # in SPLITS
_LOOKED_AT = 1 << 20  # tokens of each dataset that are held against the vocabulary before training starts


@dataclass(frozen=True, kw_only=True)
class IndexedTokens:
    """Each step takes the samples that follow those of the step before; validation batches are always the same."""

    name: str
    vocabulary: int
    sequence: int
    training: DatasetSamples | BlendedSamples
    validation: DatasetSamples | BlendedSamples | None
    order: str
    packing: Packing | None = None

    unit = "token"

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    def batch(self, step: int, samples: int, rows: np.ndarray | None = None) -> np.ndarray:
        return self._read(self.training, (step - 1) * samples, samples, rows)

    def validation_batch(self, index: int, samples: int, rows: np.ndarray | None = None) -> np.ndarray:
        assert self.validation is not None
        return self._read(self.validation, index * samples, samples, rows)

    def baseline_loss(self) -> float | None:
        return None

    def _read(self, of: Samples, first: int, samples: int, rows: np.ndarray | None) -> np.ndarray:
        """[rows, sequence + 1] int64. Raises InputError where the model does not know a token."""
        numbers = (first + (np.arange(samples) if rows is None else rows)).tolist()
        ids = np.empty((len(numbers), self.sequence + 1), np.int64)
        for row, number in zip(ids, numbers, strict=True):
            of.read(number, row)
        if ids.size and (ids.max() >= self.vocabulary or ids.min() < 0):
            unknown = np.argwhere((ids >= self.vocabulary) | (ids < 0))[0]
            raise unknown_token(int(ids[tuple(unknown)]), self.vocabulary, of.origin(numbers[unknown[0]]))
        return ids


def open_indexed_tokens(
    blend: Blend,
    split: str,
    *,
    cache: Path | None,
    vocabulary: int,
    training_samples: int,
    validation_samples: int,
    sequence: int,
    seed: int,
    packing: Packing | None = None,
) -> IndexedTokens:
    """The datasets of a blend, split, with at least so many samples in each part; indices are built or found kept.

    Raises InputError for whatever is wrong with the files, the split, or the ids in the part that is looked at.
    """
    datasets = [open_indexed(prefix) for prefix in blend.prefixes]
    for dataset in datasets:
        _check_ids(dataset, vocabulary)
        if packing is not None:
            _check_ends(dataset, packing.end)
    shares = parse_split(split)
    wanted = {_TRAINING: training_samples, _VALIDATION: validation_samples}
    found = {
        part: _samples_of(datasets, blend, shares, part, samples, sequence=sequence, seed=seed, cache=cache)
        for part, samples in wanted.items()
    }
    training = found[_TRAINING]
    assert training is not None  # a split without training is no split
    if len(training) < training_samples:
        raise InputError(
            "the data is over before the run",
            where="--data",
            expected=f"{training_samples:,} samples of {sequence} + 1 tokens",
            got=f"{len(training):,}, one epoch of each dataset",
            hint="give each dataset a weight: then it is gone through as often as that takes; or train fewer steps",
        )
    return IndexedTokens(
        name=_name(blend),
        vocabulary=vocabulary,
        sequence=sequence,
        training=training,
        validation=found[_VALIDATION],
        order=_order(training, blend, split, sequence, seed),
        packing=packing,
    )


def unknown_token(token: int, vocabulary: int, where: str) -> InputError:
    return InputError(
        "the data has a token that the model does not know",
        where=where,
        expected=f"ids from 0 to {vocabulary - 1}, the model's vocabulary",
        got=f"id {token}",
        hint="prepare the text with the tokenizer of this model, or plan for the model that the tokenizer is of",
    )


def _samples_of(
    datasets: Sequence[IndexedDataset],
    blend: Blend,
    shares: tuple[float, float, float],
    part: int,
    samples: int,
    *,
    sequence: int,
    seed: int,
    cache: Path | None,
) -> DatasetSamples | BlendedSamples | None:
    """The samples of a split, None where it has no share; [Note: Blends]."""

    def of(dataset: IndexedDataset, number: int | None) -> DatasetSamples | None:
        bounds = split_bounds(shares, len(dataset))[part]
        if bounds is None:
            return None
        return dataset_samples(dataset, bounds, number, split=SPLITS[part], sequence=sequence, seed=seed, cache=cache)

    if len(datasets) == 1 and blend.weights is None:
        return of(datasets[0], samples)
    if blend.shares is not None:
        total, sizes = blend_sizes(blend.shares, samples)
        parts = [of(dataset, size) for dataset, size in zip(datasets, sizes, strict=True)]
    else:
        parts = [of(dataset, None) for dataset in datasets]
        total = min(samples, sum(len(found) for found in parts if found is not None))
    found = [each for each in parts if each is not None]
    if not found:
        return None
    weights = blend.shares if blend.shares is not None else tuple(float(len(each)) for each in found)
    return blended_samples(found, weights, total, split=SPLITS[part], cache=cache)


def _check_ids(dataset: IndexedDataset, vocabulary: int) -> None:
    """Hold the first documents against the vocabulary, so that a wrong tokenizer is found before ranks start."""
    looked_at = 0
    for sequence in range(len(dataset)):
        ids = dataset.tokens(sequence)
        looked_at += len(ids)
        if len(ids) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            wrong = ids[(ids >= vocabulary) | (ids < 0)][0]
            raise unknown_token(int(wrong), vocabulary, f"{tokens_path(dataset.prefix)}: document {sequence}")
        if looked_at > _LOOKED_AT:
            return


def _check_ends(dataset: IndexedDataset, end: int) -> None:
    """That documents end with the token that is said to end them: of the first ones, one is enough."""
    looked_at = 0
    for sequence in range(len(dataset)):
        ids = dataset.tokens(sequence)
        looked_at += len(ids)
        if end in ids:
            return
        if looked_at > _LOOKED_AT:
            break
    raise InputError(
        "the data does not say where documents end",
        where=str(tokens_path(dataset.prefix)),
        expected=f"id {end}, the end of a document, among the tokens",
        got=f"none among the first {looked_at:,}",
        hint="prepare it with --append-eod; or name the token that ends its documents with --eod",
    )


def _name(blend: Blend) -> str:
    if blend.weights is None:
        return " ".join(blend.prefixes)
    return " ".join(f"{weight:g} {prefix}" for weight, prefix in zip(blend.weights, blend.prefixes, strict=True))


def _order(training: DatasetSamples | BlendedSamples, blend: Blend, split: str, sequence: int, seed: int) -> str:
    """All that the samples' order depends on; how many of them a run takes only through the epochs."""
    parts = [training] if isinstance(training, DatasetSamples) else training.parts
    epochs = ", ".join(
        f"{part.epochs.number}{', the last one apart' if part.epochs.last_apart else ''}"
        for part in parts
        if isinstance(part, DatasetSamples)
    )
    return f"{_name(blend)} split {split}, {sequence} + 1 tokens a sample, seed {seed}, epochs {epochs}"
