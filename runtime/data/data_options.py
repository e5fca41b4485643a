"""DataOptions: what to train on, as a person says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_SPLIT = "969,30,1"  # Megatron-LM's default of --split


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What to train on.

    Attributes:
        paths: nothing for Python's standard library as bytes; one text file or folder, also as bytes; or prefixes of
            indexed datasets, each alone or each behind its weight: ("0.3", "a_text_document", "0.7",
            "b_text_document"). An entry may hold several, separated by blanks, unless a file has that name.
        split: shares of documents for training, validation and test, of indexed datasets; None is `DEFAULT_SPLIT`.
        tokenizer: model folder or tokenizer.json the dataset was made with, or `bytes`: the model must know its ids.
        cache: folder for the indices of indexed datasets; None is beside each dataset.
    """

    paths: tuple[str, ...] = ()
    split: str | None = None
    tokenizer: str | None = None
    cache: Path | None = None
