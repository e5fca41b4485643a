"""The progress bar of a run: loss, tokens per second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_LINES = 20  # how many lines stand for the bar where the output is no terminal


@contextmanager
def step_progress(steps: int, tokens_per_step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callable that takes each step's record; on a terminal it moves a bar, elsewhere it prints a line at times."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        every = max(1, steps // _PLAIN_LINES)

        def print_line(record: dict[str, Any]) -> None:
            if record["step"] % every == 0 or record["step"] == steps:
                console.print(f"step {record['step']}/{steps}  {_figures(record, tokens_per_step)}")

        yield print_line
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting the ranks", total=steps)
        yield lambda record: bar.update(task, completed=record["step"], description=_figures(record, tokens_per_step))


def _figures(record: dict[str, Any], tokens_per_step: int) -> str:
    if record["skipped"]:
        return "no update: loss or gradient norm is not finite"
    return f"loss {record['loss']:.3f}  {tokens_per_step / record['step_seconds']:,.0f} tokens/s"
