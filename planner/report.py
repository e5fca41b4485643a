"""What reports share, what a run prints, and errors: rich renderables built from values. Nothing here prints."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.input_error import InputError

from .errors import NoPlanError
from .quantity_text import bytes_text, seconds_text
from .record import perplexity


def plain_table(title: str, *columns: str) -> Table:
    """A table whose first column is words and whose others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


# ---- a run -------------------------------------------------------------------------------------------------


def record_report(record: dict[str, Any]) -> RenderableType:
    """Predicted beside measured, part by part, and what the training reached.

    `record` is the content of RUN/record.yaml. A measured step cannot tell recomputation from compute nor
    waiting for a message from waiting for a stage, so those are summed on the predicted side too.
    """
    predicted, measured = record["predicted"], record["measured"]
    parts, found = predicted["breakdown_seconds"], measured["parts"]
    rows = [
        ("compute + recompute", parts["compute"] + parts["recompute"], found["compute"]),
        ("tp communication", parts["tp"], found["tp"]),
        ("cp communication", parts["cp"], found.get("cp", 0.0)),
        ("ep communication", parts["ep"], found.get("ep", 0.0)),
        ("pp + bubble", parts["pp"] + parts["bubble"], found["pp_bubble"]),
        ("dp exposed", parts["dp_exposed"], found["dp_exposed"]),
        ("optimizer", parts["optimizer"], found["optimizer"] + found["other"]),
        ("step", predicted["step_seconds"], measured["step_seconds"]),
    ]
    table = plain_table("\npredicted beside measured", "part", "predicted", "measured", "difference", "of the step")
    for name, expected, seen in rows:
        if expected == 0 and abs(seen) < 1e-6:
            continue
        share = (expected - seen) / measured["step_seconds"]
        table.add_row(
            name,
            seconds_text(expected),
            seconds_text(seen),
            f"{expected / seen - 1:+.1%}" if seen > 0 else "",
            f"{share:+.1%}",
            end_section=name == "optimizer",
        )
    expected, seen = predicted["peak_memory_bytes"], measured["peak_memory_bytes"]
    table.add_row("peak memory", bytes_text(expected), bytes_text(seen), f"{expected / seen - 1:+.1%}", "")
    loss, skipped = Text(_reached(record)), record.get("skipped_steps", 0)
    if written := record.get("checkpoints"):
        loss.append(f"\n{_checkpoints_text(written)}")
    if spiked := record.get("spiked_steps"):
        loss.append(f"\n{spiked} steps made no update: the gradient norm was above --spike-guard", style="bold")
    if overflowed := record.get("overflowed_steps"):
        loss.append(f"\n{overflowed} steps made no update: gradients were too large for fp16 under their loss scale")
    if left := skipped - (spiked or 0) - (overflowed or 0):
        loss.append(f"\n{left} steps made no update: loss or gradient norm was not finite", style="bold")
    for slow in measured.get("stragglers", ()):
        loss.append(
            f"\nrank {slow['rank']} (pipeline rank {slow['stage']}) is slow: its kernels take {slow['slower']:.2f} "
            f"times as long as those of its stage's other ranks, in {slow['steps']} steps",
            style="bold",
        )
    return Group(table, loss)


def _reached(record: dict[str, Any]) -> str:
    """The losses at the end; a run on data without validation, or a baseline, has none to show."""
    said = f"\ntrain loss {_loss_text(record.get('train_loss'))}"
    if "validation_loss" in record:
        validation = record["validation_loss"]
        said += f", validation loss {_loss_text(validation)}"
    said += f" nats per {record.get('token_unit', 'byte')}"
    if record.get("validation_loss") is not None:
        said += f" (perplexity {perplexity(record['validation_loss']):.4g})"
    said += f" after {record['steps']} steps"
    if record.get("bigram_loss") is not None:
        said += f"; a bigram model of the same text reaches {record['bigram_loss']:.3f}"
    return said


def _checkpoints_text(written: dict[str, Any]) -> str:
    seconds, stall = written["median_seconds"], written["median_stall_seconds"]
    waited = "" if stall == seconds else f", training waited {seconds_text(stall)} for it"
    many = written["written"] > 1
    return (
        f"{written['written']} checkpoint{'s' * many} of {bytes_text(written['bytes'])}, "
        f"{seconds_text(seconds)}{' each' * many}{waited}"
    )


def _loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


# ---- errors --------------------------------------------------------------------------------------------------


def input_error_report(error: InputError) -> RenderableType:
    """What, where, expected, got, try: one line each."""
    grid = Table.grid(padding=(0, 2))
    for label, text in error.lines():
        grid.add_row(Text(label, style="bold red" if label == "error" else "bold"), Text(text))
    return grid


def no_plan_report(error: NoPlanError) -> RenderableType:
    """The answer no, and its reasons."""
    return Group(Text(error.what, style="bold red"), *(Text(f"  {line}") for line in error.lines))
