"""The line a step that Megatron-LM prints, word for word, so that what reads its logs reads ours."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics import LineFile

LOG_FILE = "train.log"


class TrainLog:
    """Writes a line to RUN/train.log every `every` steps and at the last; a resumed run goes on below."""

    def __init__(self, run_dir: Path, every: int, steps: int, global_batch: int) -> None:
        self._every, self._steps, self._global_batch = every, steps, global_batch
        self._since: list[dict[str, Any]] = []
        self._file = LineFile(run_dir / LOG_FILE)
        self.close = self._file.close

    def write(self, record: dict[str, Any]) -> None:
        """One step's record."""
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        self._since.append(record)
        if record["step"] % self._every == 0 or record["step"] == self._steps:
            self._file.write(f" [{now}]{iteration_line(self._since, self._steps, self._global_batch)}\n")
            self._since.clear()
        if record.get("validation_loss") is not None:
            self._file.write(validation_line(record["step"], record["validation_loss"]) + "\n")


def iteration_line(records: Sequence[dict[str, Any]], steps: int, global_batch: int) -> str:
    """The records since the last line as one: loss and milliseconds are means, skipped steps are counted.

    As `training_log` of Megatron-LM's megatron/training/training.py formats it. A loss that no update was made
    with does not count; the loss scale is the next step's; NaN steps are those whose loss is not finite.
    """
    last = records[-1]
    losses = [record["loss"] for record in records if not record["skipped"]]
    milliseconds = 1e3 * statistics.fmean(record["step_seconds"] for record in records)
    norm = math.nan if last["grad_norm"] is None else last["grad_norm"]
    parts = [
        f" iteration {last['step']:8d}/{steps:8d}",
        f"consumed samples: {last['step'] * global_batch:12d}",
        f"elapsed time per iteration (ms): {milliseconds:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {last['model_tflops_per_device']:.1f}",
        f"learning rate: {last['lr']:.6E}",
        f"global batch size: {global_batch:5d}",
        *([f"lm loss: {statistics.fmean(losses):.6E}"] if losses else []),
        f"loss scale: {last.get('loss_scale', 1.0):.1f}",
        f"grad norm: {norm:.3f}",
        f"number of skipped iterations: {sum(record['skipped'] for record in records):3d}",
        f"number of nan iterations: {sum(record['loss'] is None for record in records):3d}",
    ]
    return " | ".join(parts) + " |"


def validation_line(step: int, loss: float) -> str:
    """The mean loss on held-out samples, and the perplexity, at most e^20."""
    return (
        f" validation loss at iteration {step} | lm loss value: {loss:.6E} | "
        f"lm loss PPL: {math.exp(min(20.0, loss)):.6E} |"
    )
