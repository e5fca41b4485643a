"""What is cheap to find wrong with a run, found before a machine is measured and a plan is made for it."""

from __future__ import annotations

from pathlib import Path

from .data.data_options import DataOptions
from .data.open_tokens import require_readable
from .data.tokenizer import load_tokenizer
from .learning_rate import RateSchedule
from .run_folder import refuse_another_run
from .trackers import check_reachable
from .watching import Watching


def check_early(
    run_dir: Path | None, data: DataOptions, watching: Watching, schedule: RateSchedule, *, steps: int, warmup: int
) -> None:
    """Raise InputError for what needs no plan to be found wrong with a run from the start.

    `launch.train` looks at all of it again, with the plan.
    """
    schedule.check(steps=steps, warmup_steps=warmup)
    if run_dir is not None:
        refuse_another_run(run_dir)
    require_readable(data.paths)
    if data.tokenizer is not None:
        load_tokenizer(data.tokenizer)
    check_reachable(watching.wandb, watching.mlflow)
