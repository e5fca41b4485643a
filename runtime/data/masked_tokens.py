"""The TokenSource of a masked language model: the rows of another source, some of their tokens hidden or changed.

Why the number of targets of a row is fixed: [Note: Masked language model] in profiles/masked_language.py. Which tokens
they are and what becomes of them is drawn from (seed, training or validation, step, row), whatever rank asks for the
row, and so anew each time that a text comes round (arXiv 1907.11692, section 4.1). All tokens of the text may be
chosen; what ends a document is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.plan import Plan
from profiles.input_error import InputError
from profiles.masked_language import predicted_tokens

from .byte_text import VOCABULARY
from .token_source import NO_TARGET, TokenSource
from .tokenizer import BYTES, mask_token

_TRAIN, _VALIDATION = 2, 3  # streams of random numbers; 0 and 1 are those of the text itself (byte_text.py)
_HIDDEN, _OTHER = 0.8, 0.1  # shares of the chosen tokens: replaced by the mask token, by any token; the rest stays


@dataclass(frozen=True, kw_only=True)
class Masking:
    """`number` tokens of each row are predicted; `mask` is the mask token, any token is one below `vocabulary`."""

    number: int
    mask: int
    vocabulary: int
    seed: int

    def row(self, ids: np.ndarray, stream: int, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of the ids of one row."""
        draw = np.random.default_rng([self.seed, stream, step, row])
        chosen = draw.permutation(len(ids))[: self.number]
        fate = draw.random(self.number)
        others = draw.integers(0, self.vocabulary, self.number)
        inputs, targets = ids.copy(), np.full_like(ids, NO_TARGET)
        targets[chosen] = ids[chosen]
        changed = np.where(fate < _HIDDEN, self.mask, others)
        inputs[chosen] = np.where(fate < _HIDDEN + _OTHER, changed, ids[chosen])
        return inputs, targets

    def batch(self, samples: np.ndarray, stream: int, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """[rows, sequence + 1] ids -> [rows, 2, sequence], inputs and targets; the last token of a sample goes unused.

        `rows` are the places of the samples in the global batch, None: they are all of it.
        """
        places = np.arange(len(samples)) if rows is None else rows
        pairs = [self.row(ids[:-1], stream, step, int(row)) for ids, row in zip(samples, places, strict=True)]
        return np.array(pairs, samples.dtype).reshape(len(samples), 2, samples.shape[1] - 1)


@dataclass(frozen=True)
class MaskedTokens:
    """Another source's rows, masked."""

    source: TokenSource
    masking: Masking

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def unit(self) -> str:
        return f"masked {self.source.unit}"

    @property
    def vocabulary(self) -> int:
        return max(self.source.vocabulary, self.masking.mask + 1)

    @property
    def has_validation(self) -> bool:
        return self.source.has_validation

    @property
    def order(self) -> str:
        masking = self.masking
        return f"{self.source.order}, {masking.number} of each masked by {masking.mask}, seed {masking.seed}"

    @property
    def packing(self) -> None:
        """Attention that is not causal knows no documents."""

    def batch(self, step: int, samples: int, rows: np.ndarray | None = None) -> np.ndarray:
        return self.masking.batch(self.source.batch(step, samples, rows), _TRAIN, step, rows)

    def validation_batch(self, index: int, samples: int, rows: np.ndarray | None = None) -> np.ndarray:
        return self.masking.batch(self.source.validation_batch(index, samples, rows), _VALIDATION, index, rows)

    def baseline_loss(self) -> None:
        """A bigram model sees what comes before a token alone, so it is none to compare with."""
        return


def masking_of(plan: Plan, *, seed: int = 0) -> Masking:
    """The masking of random ids for the plan's model, of which the last one masks."""
    model = plan.model
    number = predicted_tokens(model, plan.job.sequence)
    return Masking(number=number, mask=model.vocab_size - 1, vocabulary=model.vocab_size, seed=seed)


def masked(source: TokenSource, tokenizer: str | None, plan: Plan, *, seed: int) -> MaskedTokens:
    """The source for the plan's model. The mask token is the tokenizer's; of bytes it is the model's last id.

    Raises InputError where there is no mask token, or a model of bytes has no id for it beside them.
    """
    model = plan.model
    if tokenizer not in (None, BYTES):
        mask, vocabulary = mask_token(tokenizer)
    elif source.unit == "token" and tokenizer is None:
        raise InputError(
            f"{model.name} fills in masked tokens, and which id masks them is not known",
            where="--tokenizer",
            expected="the tokenizer that the data was prepared with, or bytes",
            got="none",
        )
    else:
        mask, vocabulary = model.vocab_size - 1, VOCABULARY
        if mask < vocabulary:
            raise InputError(
                f"{model.name} has no id for the mask token beside the bytes",
                where="plan: model.vocab_size",
                expected=f"at least {vocabulary + 1}: {vocabulary} bytes, and the last id masks",
                got=str(model.vocab_size),
            )
    number = predicted_tokens(model, plan.job.sequence)
    return MaskedTokens(source, Masking(number=number, mask=mask, vocabulary=vocabulary, seed=seed))
