"""Options of `train` about optimization and watching, and how a run is started and told; `megatron` shares it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli_parts import amount, print_report

if TYPE_CHECKING:
    from planner.plan import Plan
    from runtime.trainer import TrainOptions

LrSchedule = Annotated[
    str, typer.Option("--lr-schedule", help="cosine, linear, constant, wsd or inverse-square-root, down to --min-lr.")
]
Cooldown = Annotated[int | None, typer.Option("--cooldown", min=1, help="wsd: steps of it; default a fifth of all.")]
WeightDecay = Annotated[
    float,
    typer.Option(
        "--weight-decay",
        parser=amount("--weight-decay", 0),
        metavar="X",
        help="Of matrices; norms and biases have none.",
    ),
]
Betas = Annotated[str, typer.Option("--betas", help="Of AdamW.")]
SpikeGuard = Annotated[
    float | None,
    typer.Option(
        "--spike-guard",
        parser=amount("--spike-guard", 1),
        metavar="X",
        help="Leave out steps with a gradient norm above so many medians.",
    ),
]
LogEvery = Annotated[int, typer.Option("--log-every", min=1, help="Steps a line of train.log sums up.")]
Wandb = Annotated[str | None, typer.Option("--wandb", metavar="PROJECT", help="Weights & Biases too.")]
Mlflow = Annotated[str | None, typer.Option("--mlflow", metavar="URI", help="MLflow too.")]
ProfileSteps = Annotated[
    str | None, typer.Option("--profile-steps", metavar="FIRST:LAST", help="Trace these steps, beside the plan.")
]


def training_options(
    lr_schedule: str,
    cooldown: int | None,
    weight_decay: float,
    betas: str,
    spike_guard: float | None,
    log_every: int,
    wandb: str | None,
    mlflow: str | None,
    profile_steps: str | None,
) -> dict[str, Any]:
    """The fields of TrainOptions that these options are about."""
    from runtime.learning_rate import RateSchedule
    from runtime.optimizer import Adam
    from runtime.watching import Watching, parse_steps

    return {
        "schedule": RateSchedule(shape=lr_schedule, cooldown_steps=cooldown),
        "weight_decay": weight_decay,
        "adam": Adam(betas=_betas(betas)),
        "watching": Watching(
            log_every=log_every,
            wandb=wandb,
            mlflow=mlflow,
            profile_steps=parse_steps(profile_steps, "--profile-steps") if profile_steps is not None else None,
            spike_guard=spike_guard,
        ),
    }


def _betas(text: str) -> tuple[float, float]:
    from profiles.input_error import InputError

    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        first = second = -1.0
    if not (0.0 <= first < 1.0 and 0.0 <= second < 1.0):
        raise InputError(
            f"{text!r} are no betas", where="--betas", expected="two numbers from 0 to below 1, as 0.9,0.95", got=text
        )
    return first, second


def launch_and_report(plan: Plan, options: TrainOptions) -> None:
    """Train, show progress meanwhile, and say at the end what was predicted and what was measured."""
    from planner.record import RECORD_FILE
    from planner.report import record_report
    from planner.timeline import write_timeline
    from profiles.store import parse_yaml, read_text
    from runtime import slurm
    from runtime.launch import train
    from runtime.progress import step_progress
    from runtime.trace_window import MEASURED_FILE, TRACE_FOLDER

    folder: Path = options.run_dir
    try:
        with step_progress(options.steps, plan.job.tokens) as on_progress:
            train(plan, options, on_progress)
    except KeyboardInterrupt as error:
        print_report(
            f"{str(error) or 'interrupted'}; the ranks have ended, and {folder} holds what was done", error=True
        )
        raise typer.Exit(getattr(error, "exit_code", 130)) from None
    record = folder / RECORD_FILE
    if not record.exists() or not slurm.is_first():
        return
    print_report(record_report(parse_yaml(read_text(record, "record"), str(record))))
    measured = folder / TRACE_FOLDER / MEASURED_FILE
    if options.watching.profile_steps is not None and measured.exists():
        print_report(f"planned and measured timeline, for ui.perfetto.dev: {write_timeline(plan, measured)}")
    print_report(f"run folder: {folder}")
