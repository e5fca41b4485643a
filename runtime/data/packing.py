"""Documents that share a sample: where each begins, and what their ends change.

[Note: Packed documents]
A sample is cut from documents that stand after each other; the token `end` closes each. Of a row of inputs the part
behind an end is the next document, and the row's first part one of its own, wherever in its document it lies. With all
resets on, a row is trained on as its parts would be alone; the experts' balance loss stays that of the row. What
Megatron-LM calls --reset-position-ids, --reset-attention-mask and --eod-mask-loss are the three switches; positions,
mask and loss mask equal those of `_get_ltor_masks_and_position_ids` (megatron/core/datasets/gpt_dataset.py of
Megatron-LM core 0.16).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiles.input_error import InputError

from .data_options import DataOptions
from .tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What the token `end` changes ([Note: Packed documents]); at least one of the three.

    Attributes:
        end: the id that closes a document.
        reset_positions: positions begin at 0 in every document.
        reset_attention: tokens attend to those of their own document alone.
        mask_loss: what is predicted from an end, the first token of the next document, counts not.
    """

    end: int
    reset_positions: bool = True
    reset_attention: bool = True
    mask_loss: bool = False

    def __str__(self) -> str:
        changes = {
            "positions reset": self.reset_positions,
            "attention within documents": self.reset_attention,
            "no loss after ends": self.mask_loss,
        }
        return f"documents end with {self.end}: {', '.join(name for name, on in changes.items() if on)}"


def packing_of(options: DataOptions, positions: str, text_end: int | None) -> Packing | None:
    """What the options ask for, of a model with these `positions`; `text_end` closes the documents of text, and is None
    of indexed datasets.

    Raises InputError where it is not known which token ends a document, or a reset would change nothing.
    """
    if not options.packs:
        if options.eod is not None:
            raise InputError(
                "nothing asks where documents end",
                where="--eod",
                expected="--reset-attention-mask, --reset-position-ids or --eod-mask-loss beside it",
                got="none of them",
            )
        return None
    if options.reset_positions and not options.reset_attention and positions != "learned":
        raise InputError(
            "positions that are reset alone would change nothing that is meant",
            where="--reset-position-ids",
            expected="--reset-attention-mask beside it",
            got=f"positions by {positions}, of which attention sees differences alone",
        )
    return Packing(
        end=_end(options) if text_end is None else text_end,
        reset_positions=options.reset_positions,
        reset_attention=options.reset_attention,
        mask_loss=options.mask_loss,
    )


def _end(options: DataOptions) -> int:
    """The id that ends documents of indexed datasets."""
    if options.tokenizer is None and options.eod is not None and options.eod.isdecimal():
        return int(options.eod)
    found = load_tokenizer(options.tokenizer, options.eod).end_of_document if options.tokenizer is not None else None
    if found is None:
        raise InputError(
            "it is not known which token ends a document",
            where="--eod" if options.tokenizer is None else f"--tokenizer {options.tokenizer}",
            expected="--eod ID, or --tokenizer FOLDER, whose end of sequence it is, or a token of it named by --eod",
            got=f"--eod {options.eod} and no tokenizer" if options.eod is not None else "neither",
        )
    return found


def document_starts(ids: np.ndarray, end: int) -> np.ndarray:
    """Token ids [rows, sequence] -> [rows, sequence] int64: where in its row the document of each token begins.

    >>> document_starts(np.array([[5, 0, 7, 8, 0, 9]]), 0).tolist()
    [[0, 0, 2, 2, 2, 5]]
    """
    begins = np.zeros(ids.shape, np.int64)
    begins[:, 1:] = np.where(ids[:, :-1] == end, np.arange(1, ids.shape[1]), 0)
    return np.maximum.accumulate(begins, axis=1)
