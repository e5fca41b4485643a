"""What a run shows of itself: a line at times, and the losses at the end, for bytes and for tokens."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from planner.record import PARTS, perplexity
from planner.report import record_report
from runtime.progress import step_progress


def shown(**reached: Any) -> str:
    """The last paragraph of the report of a record."""
    parts = dict.fromkeys((*PARTS, "recompute", "pp", "bubble"), 1.0)
    side = {"step_seconds": 2.0, "breakdown_seconds": parts, "parts": parts, "peak_memory_bytes": 1e9}
    console = Console(file=io.StringIO(), width=120)
    console.print(record_report({"predicted": side, "measured": side, "steps": 30, "train_loss": 1.5} | reached))
    return console.file.getvalue().split("\n\n")[-1].strip()  # pyright: ignore


def test_losses_of_bytes_have_a_bigram_model_beside_them() -> None:
    assert shown(validation_loss=2.0, bigram_loss=2.5, token_unit="byte") == (
        "train loss 1.500, validation loss 2.000 nats per byte (perplexity 7.389) after 30 steps; a bigram model of "
        "the same text\nreaches 2.500"
    )


def test_losses_of_tokens_stand_alone_and_validation_may_be_missing() -> None:
    tokens = {"token_unit": "token", "bigram_loss": None}
    assert shown(validation_loss=2.0, **tokens) == (
        "train loss 1.500, validation loss 2.000 nats per token (perplexity 7.389) after 30 steps"
    )
    assert shown(**tokens) == "train loss 1.500 nats per token after 30 steps"
    assert shown(validation_loss=None, **tokens) == (
        "train loss 1.500, validation loss not finite nats per token after 30 steps"
    )


def test_perplexity_of_a_loss_that_overflows_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == float("inf")


def test_a_validation_is_shown_when_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    with step_progress(100, 1000) as on_progress:
        for step in range(1, 8):
            record = {"step": step, "loss": 3.0, "step_seconds": 0.5, "skipped": False}
            on_progress(record | ({"validation_loss": 2.0} if step == 7 else {}))
    assert capsys.readouterr().err == (
        "step 5/100  loss 3.000  2,000 tokens/s\n"
        "step 7/100  loss 3.000  2,000 tokens/s  validation loss 2.000, perplexity 7.389\n"
    )
