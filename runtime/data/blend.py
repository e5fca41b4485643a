"""Several datasets as one: `w1 a w2 b` read, how many samples each gives, and which gives the next.

[Note: Blends]
Sample i comes from the dataset that is furthest behind its share, the largest w·max(i, 1) − given, the first of equals.
Weighted datasets are asked for N·w samples and half a percent more; without weights each gives one epoch, in proportion
to its samples. Source: Megatron-LM core 0.16, megatron/core/datasets: blended_megatron_dataset_builder.py, helpers.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profiles.input_error import InputError

_SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus
MOST_DATASETS = 32_767  # what the index's int16 can name


@dataclass(frozen=True)
class Blend:
    """Prefixes of datasets, and their weights as given; None: by their sizes."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The weights over their sum."""
        return None if self.weights is None else normalized(self.weights)


def parse_blend(entries: Sequence[str]) -> Blend:
    """Prefixes alone, or each behind its weight.

    Raises InputError where weights and prefixes do not take turns, or a weight is no finite number above 0.
    """
    numbers = [_number(entry) for entry in entries]
    weights, prefixes = numbers[0::2], tuple(entries[1::2])
    if len(entries) % 2 or all(weight is None for weight in weights):
        if any(number is not None for number in numbers):
            raise _mixed(entries)
        return Blend(tuple(entries))
    given = tuple(weight for weight in weights if weight is not None)
    if len(given) < len(weights) or any(number is not None for number in numbers[1::2]):
        raise _mixed(entries)
    if not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise InputError(
            "a weight of --data cannot be used",
            where="--data " + " ".join(entries),
            expected="finite numbers above 0",
            got=", ".join(entries[0::2]),
        )
    if len(prefixes) > MOST_DATASETS:
        raise InputError(
            "too many datasets in a blend", where="--data", expected=f"at most {MOST_DATASETS}", got=str(len(prefixes))
        )
    return Blend(prefixes, given)


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Each over their sum."""
    of = np.array(weights, dtype=np.float64)
    return tuple((of / of.sum()).tolist())


def blend_sizes(shares: Sequence[float], samples: int) -> tuple[int, list[int]]:
    """The samples of the whole blend, no fewer than asked for, and how many to have of each dataset."""
    wanted = [math.ceil(samples * share) for share in shares]
    return sum(wanted), [math.ceil(number * (1 + _SURPLUS)) for number in wanted]


def blending_index(shares: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """[samples] int16, the dataset of each sample, and [samples] int64, its number there; [Note: Blends].

    Each choice rests on those before, so this is a loop: about a microsecond a sample and dataset.
    """
    datasets, numbers = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    given = [0] * len(shares)
    for sample in range(samples):
        turn = float(max(sample, 1))
        behind = [share * turn - number for share, number in zip(shares, given, strict=True)]
        chosen = behind.index(max(behind))
        datasets[sample], numbers[sample] = chosen, given[chosen]
        given[chosen] += 1
    return datasets, numbers


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


def _mixed(entries: Sequence[str]) -> InputError:
    return InputError(
        "weights and datasets of --data do not take turns",
        where="--data " + " ".join(entries),
        expected="prefixes alone, or a weight before each: 0.3 a_text_document 0.7 b_text_document",
        got=f"{len(entries)} entries",
    )
