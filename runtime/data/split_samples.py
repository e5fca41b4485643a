"""The samples of one split: of one indexed dataset, or of a blend of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from profiles.input_error import InputError

from .blend import blending_index, normalized
from .index_cache import cached_arrays
from .indexed_dataset import IndexedDataset, index_path, tokens_path
from .sample_order import Epochs, SampleOrder, build_order, epochs_for

_ORDER_VERSION = 1  # of what is kept: another number where the arrays come out otherwise


class Samples(Protocol):
    """Numbered samples of sequence + 1 tokens."""

    def __len__(self) -> int: ...

    def read(self, number: int, row: np.ndarray) -> None:
        """Fill `row`, [sequence + 1] int64."""
        ...

    def origin(self, number: int) -> str:
        """The files that sample `number` is from, for errors."""
        ...


@dataclass(frozen=True)
class DatasetSamples:
    """Samples of a dataset's sequences [first, last), in their order."""

    dataset: IndexedDataset
    epochs: Epochs
    order: SampleOrder

    def __len__(self) -> int:
        return len(self.order.shuffle)

    def read(self, number: int, row: np.ndarray) -> None:
        sample = int(self.order.shuffle[number])
        (first, start), (last, end) = self.order.samples[sample : sample + 2].tolist()
        filled = 0
        for entry in range(first, last + 1):
            sequence = int(self.order.documents[entry])
            piece = self.dataset.tokens(sequence, start if entry == first else 0, end + 1 if entry == last else None)
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
        assert filled == len(row)

    def origin(self, number: int) -> str:
        return str(tokens_path(self.dataset.prefix))


@dataclass(frozen=True)
class BlendedSamples:
    """Samples of several datasets; [Note: Blends]. `datasets` and `numbers` [n]: whose, and which of its samples."""

    parts: Sequence[Samples]
    datasets: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.datasets)

    def read(self, number: int, row: np.ndarray) -> None:
        self.parts[self.datasets[number]].read(int(self.numbers[number]), row)

    def origin(self, number: int) -> str:
        return self.parts[self.datasets[number]].origin(int(self.numbers[number]))


def dataset_samples(
    dataset: IndexedDataset,
    bounds: tuple[int, int],
    samples: int | None,
    *,
    split: str,
    sequence: int,
    seed: int,
    cache: Path | None,
) -> DatasetSamples:
    """At least so many samples of the sequences in `bounds`, or those of one epoch.

    Raises InputError where the split has fewer tokens than one sample.
    """
    first, last = bounds
    tokens = int(dataset.lengths[first:last].sum(dtype=np.int64))
    if tokens == 0 or (samples is None and tokens < sequence + 1):
        raise InputError(
            f"the {split} split of {dataset.prefix} is empty" if not tokens else f"the {split} split is too short",
            where="--split",
            expected="at least one document with tokens in each split whose share is not 0"
            if not tokens
            else f"one sample of {sequence} + 1 tokens",
            got=f"sequences {first} to {last} of {len(dataset)}, {tokens} tokens",
            hint="give it a larger share, or 0, as 100,0,0; or prepare more documents",
        )
    epochs = epochs_for(samples, tokens, sequence)
    description = _identity(dataset) | {
        "sequences": [first, last],
        "sequence": sequence,
        "seed": seed,
        "epochs": epochs.number,
        "last_apart": epochs.last_apart,
    }

    def build() -> dict[str, np.ndarray]:
        order = build_order(dataset.lengths, first, last, epochs, sequence=sequence, seed=seed)
        return {"documents": order.documents, "samples": order.samples, "shuffle": order.shuffle}

    arrays = cached_arrays(_cache_folder(dataset.prefix, cache), description, build)
    return DatasetSamples(dataset, epochs, SampleOrder(**arrays))


def blended_samples(
    parts: Sequence[DatasetSamples], shares: Sequence[float], samples: int, *, split: str, cache: Path | None
) -> BlendedSamples:
    """So many samples of the datasets, in these shares, which are normalised once more, as Megatron does.

    Raises InputError where a dataset would have to give more samples than it has.
    """
    shares = normalized(shares)

    def build() -> dict[str, np.ndarray]:
        datasets, numbers = blending_index(shares, samples)
        return {"datasets": datasets, "numbers": numbers}

    folder = _cache_folder(parts[0].dataset.prefix, cache)
    arrays = cached_arrays(folder, {"version": _ORDER_VERSION, "shares": list(shares), "samples": samples}, build)
    taken = np.bincount(arrays["datasets"], minlength=len(parts))
    for part, number in zip(parts, taken.tolist(), strict=True):
        if number > len(part):
            raise InputError(
                f"{part.dataset.prefix} has too few samples for the {split} split of the blend",
                where="--data",
                expected=f"{number:,} samples",
                got=f"{len(part):,}, of one epoch",
                hint="give each dataset a weight: then it is gone through as often as that takes",
            )
    return BlendedSamples(parts, arrays["datasets"], arrays["numbers"])


def _identity(dataset: IndexedDataset) -> dict[str, Any]:
    """What tells the dataset's files from others that had their name before."""
    index, tokens = index_path(dataset.prefix), tokens_path(dataset.prefix)
    status = index.stat()
    return {
        "version": _ORDER_VERSION,
        "index": str(index.resolve()),
        "index_bytes": status.st_size,
        "index_modified_ns": status.st_mtime_ns,
        "tokens_bytes": tokens.stat().st_size,
    }


def _cache_folder(prefix: str, cache: Path | None) -> Path:
    return cache if cache is not None else Path(f"{prefix}_indices")
