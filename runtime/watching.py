"""What rank 0 writes while it trains: metrics.jsonl and TensorBoard, train.log, and trackers that are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from planner.plan import Plan
from profiles.input_error import InputError

from .log_line import TrainLog
from .metrics import MetricsWriter
from .trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class Watching:
    """How a run is watched.

    A line in train.log comes every `log_every` steps. `wandb` is a project's name and `mlflow` a server's URI.
    `profile_steps` are the first and the last step of which a trace is taken. A step whose gradient norm is above
    `spike_guard` times its running median is left out.
    """

    log_every: int = 1
    wandb: str | None = None
    mlflow: str | None = None
    profile_steps: tuple[int, int] | None = None
    spike_guard: float | None = None


PLAIN = Watching()


def parse_steps(text: str, flag: str) -> tuple[int, int]:
    """`5:8` as (5, 8): steps 5 to 8, both among them."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"{text!r} is no window of steps", where=flag, expected="FIRST:LAST, as 5:8", got=text)
    return int(first), int(last)


class RunWriter:
    """Hands each step's record to all that keep it; on rank 0 alone."""

    def __init__(
        self, plan: Plan, run_dir: Path, watching: Watching, *, steps: int, resume: bool, settings: dict[str, Any]
    ) -> None:
        settings = {
            "model": plan.model.name,
            "layout": plan.layout.short(),
            "devices": plan.layout.world_size,
        } | settings
        self._metrics = MetricsWriter(run_dir)
        self._log = TrainLog(run_dir, watching.log_every, steps, plan.job.global_batch)
        self._trackers = Trackers(run_dir, settings, wandb=watching.wandb, mlflow=watching.mlflow, resume=resume)

    def write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        self._log.write(record)
        self._trackers.write(record)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trackers.end(failed=error is not None)
        self._log.close()
        self._metrics.__exit__(kind, error, trace)
