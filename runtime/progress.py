"""Progress on a terminal: a run's loss, tokens per second and time left; a count; or that something goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from planner.record import perplexity

_PLAIN_LINES = 20  # how many lines stand for the bar where the output is no terminal


@contextmanager
def step_progress(steps: int, tokens_per_step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callable that takes each step's record; on a terminal it moves a bar, elsewhere it prints a line at times."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        every = max(1, steps // _PLAIN_LINES)

        def print_line(record: dict[str, Any]) -> None:
            if record["step"] % every == 0 or record["step"] == steps or "validation_loss" in record:
                console.print(f"step {record['step']}/{steps}  {_figures(record, tokens_per_step)}")

        yield print_line
        return
    with _bar("training", console) as bar:
        task = bar.add_task("starting the ranks", total=steps)
        yield lambda record: bar.update(task, completed=record["step"], description=_figures(record, tokens_per_step))


@contextmanager
def counted_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A callable to call `total` times; elsewhere than on a terminal nothing is shown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    with _bar(what, console) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


@contextmanager
def bytes_progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A callable that takes how many more bytes are done; elsewhere than on a terminal nothing is shown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda done: bar.advance(task, done)


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Says `what` goes on; elsewhere than on a terminal nothing is shown."""
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else nullcontext():
        yield


def _bar(title: str, console: Console) -> Progress:
    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _figures(record: dict[str, Any], tokens_per_step: int) -> str:
    if record["skipped"]:
        return f"no update: {_why_skipped(record)}"
    said = f"loss {record['loss']:.3f}  {tokens_per_step / record['step_seconds']:,.0f} tokens/s"
    validation = record.get("validation_loss")
    if validation is not None:
        said += f"  validation loss {validation:.3f}, perplexity {perplexity(validation):.4g}"
    if "checkpoint_bytes" in record:
        size, seconds = record["checkpoint_bytes"] / 2**20, record["checkpoint_seconds"]
        said += f"  checkpoint {size:,.1f} MiB in {seconds:.2f} s, waited {record['checkpoint_stall_seconds']:.2f} s"
    return said


def _why_skipped(record: dict[str, Any]) -> str:
    if record["loss"] is None or (record["grad_norm"] is None and "loss_scale" not in record):
        return "loss or gradient norm is not finite"
    if record["grad_norm"] is None:
        return f"gradients overflow fp16, loss scale now {record['loss_scale']:g}"
    return f"gradient norm {record['grad_norm']:.3g}"
