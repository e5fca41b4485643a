"""`--split 969,30,1`: which documents of a dataset are for training, for validation and for test."""

from __future__ import annotations

import re
from itertools import pairwise

from profiles.input_error import InputError

SPLITS = ("train", "validation", "test")
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


def parse_split(text: str) -> tuple[float, float, float]:
    """The shares of training, validation and test, which add up to 1; those left out are 0.

    Raises InputError where there are no three numbers >= 0 or fewer, or no share for training.
    """
    parts = [part.strip() for part in text.split(",")]
    numbers = [float(part) for part in parts if _NUMBER.fullmatch(part)]
    if len(numbers) < len(parts) or len(parts) > len(SPLITS) or numbers[0] == 0:
        raise InputError(
            "the split cannot be used",
            where="--split",
            expected="shares of training, validation and test, that of training above 0, as 969,30,1",
            got=text,
        )
    numbers += [0.0] * (len(SPLITS) - len(numbers))
    total = sum(numbers)
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def split_bounds(shares: tuple[float, float, float], sequences: int) -> list[tuple[int, int] | None]:
    """For each split the half-open range of sequences, None where its share is 0.

    int(round(cumulative share · n)), as megatron/core/datasets/blended_megatron_dataset_builder.py has it.
    """
    ends = [0.0]
    for share in shares:
        ends.append(ends[-1] + share)
    return [
        (round(begin * float(sequences)), round(end * float(sequences))) if end > begin else None
        for begin, end in pairwise(ends)
    ]
