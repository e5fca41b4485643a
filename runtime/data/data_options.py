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
        reset_positions, reset_attention, mask_loss: what the end of a document changes ([Note: Packed documents]).
        eod: the token that ends documents of indexed datasets, a token of `tokenizer` or without one an id; None is
            the tokenizer's end of sequence. Text ends its documents itself.
    """

    paths: tuple[str, ...] = ()
    split: str | None = None
    tokenizer: str | None = None
    cache: Path | None = None
    reset_positions: bool = False
    reset_attention: bool = False
    mask_loss: bool = False
    eod: str | None = None

    @property
    def packs(self) -> bool:
        """Whether the end of a document changes anything."""
        return self.reset_positions or self.reset_attention or self.mask_loss
