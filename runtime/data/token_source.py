"""What training reads: a source of token ids by step, and the rows of a global batch that are a rank's."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from planner.layout import Layout

from .packing import Packing

NO_TARGET = -1  # of a token that need not be predicted: no row of the vocabulary, on no rank


class TokenSource(Protocol):
    """Token ids of every step, a pure function of step and row: the same under every layout and after every resume.

    Attributes:
        name: what is trained on, for the record.
        unit: what a token is, "byte" or "token", "masked" before it where only those are predicted.
        vocabulary: every id is below it.
        has_validation: whether there are samples that training never sees.
        order: names the order of the samples; another one under the same run would train on other tokens.
        packing: what the ends of documents change; None: nothing.

    A module that makes its own samples (`ExampleSource`) gives (inputs, targets) where others give ids.
    """

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def has_validation(self) -> bool: ...
    @property
    def order(self) -> str: ...
    @property
    def packing(self) -> Packing | None: ...

    def batch(self, step: int, samples: int, rows: np.ndarray | None = None) -> Any:
        """[samples, sequence + 1] ids, int64, of a step (from 1 on) of so many samples; or only `rows` of them.

        For a masked language model [samples, 2, sequence], inputs and their targets, NO_TARGET where there is none.
        """
        ...

    def validation_batch(self, index: int, samples: int, rows: np.ndarray | None = None) -> Any:
        """The same of the held-out samples number `index` (from 0 on)."""
        ...

    def baseline_loss(self) -> float | None:
        """Nats per token that a bigram model reaches on held-out text; None where there is none to count."""
        ...


def own_rows(samples: int, layout: Layout, dp_rank: int) -> np.ndarray:
    """The rows of a global batch of `samples` that a dp rank trains on, microbatch after microbatch.

    A microbatch is the next micro_batch · dp rows; the rank takes its micro_batch of them. With dp=2 and
    micro_batch=1, rank 0 takes rows 0, 2, 4, … and rank 1 rows 1, 3, 5, …
    """
    return np.arange(samples).reshape(-1, layout.dp, layout.micro_batch)[:, dp_rank].reshape(-1)
