"""python cli.py plan --model gpt3-175b --cluster dgx-a100:128 --global-batch 1536 --seq 2048"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a verb runs: no traceback of the imports below

from pathlib import Path
from typing import Annotated

import typer

from cli_answers import estimate, explain, print_answer, question_of
from cli_checks import run_dry, validate, verify
from cli_data import (
    Data,
    DataCache,
    DocumentLength,
    Eod,
    EodMaskLoss,
    ResetAttention,
    ResetPositions,
    Split,
    Tokenizer,
    ValidationEvery,
    data_app,
    data_document_length,
    data_options,
    packed_options,
)
from cli_ending import exit_code_of
from cli_export import export
from cli_life import (
    AsyncCheckpoint,
    CheckpointMinutes,
    Elastic,
    KeepCheckpoints,
    Resume,
    RunDir,
    TimeLimit,
    elastic_plan,
    remembered,
    replan,
    tell_changes,
)
from cli_megatron import megatron
from cli_parts import (
    A_YEAR,
    Cluster,
    Devices,
    GlobalBatch,
    Imbalance,
    Json,
    MemoryLimit,
    Model,
    Offload,
    Precision,
    Price,
    SequenceLength,
    Target,
    amount,
    command_line,
    described,
    print_report,
)
from cli_precision import (
    Hysteresis,
    InitialLossScale,
    LossScale,
    LossScaleWindow,
    MinLossScale,
    loss_scaling,
    refuse_without_fp16,
)
from cli_profile import profile
from cli_training import (
    Betas,
    Cooldown,
    LogEvery,
    LrSchedule,
    Mlflow,
    ProfileSteps,
    SpikeGuard,
    Wandb,
    WeightDecay,
    launch_and_report,
    training_options,
)

app = typer.Typer(
    name="meshwright",
    help="Plan how to train a transformer on many devices, provably best under the memory limit, and train it so.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")


# ---- verbs -----------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: cli.py plan --model llama3-8b --cluster dgx-h100:4 --global-batch 512 --seq 8192 -o plan.yaml | "
    "… --pin 'pp=2|4' --ban cp --top 5 --price 2.5 | … --pareto devices"
)
def plan(
    model: Model,
    cluster: Cluster,
    global_batch: GlobalBatch,
    sequence: SequenceLength,
    devices: Devices = None,
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", help="Hold a degree or knob: tp=8, pp=2|4, tp=4..16, reshard=true; repeatable."),
    ] = None,
    ban: Annotated[list[str] | None, typer.Option("--ban", help="Keep an axis at 1, as pp; repeatable.")] = None,
    precision: Precision = None,
    memory_limit: MemoryLimit = None,
    target: Target = "meshwright",
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the best layouts to list.")] = 1,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds after which to settle.")] = 60.0,
    price: Price = None,
    expert_imbalance: Imbalance = 1.0,
    offload: Offload = "none",
    documents: DocumentLength = None,
    allow_idle: Annotated[bool, typer.Option("--allow-idle", help="Leave nodes idle where that is faster.")] = False,
    pareto: Annotated[
        str | None, typer.Option("--pareto", help="devices or memory: the best step against less of it, as a plot.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan here, as YAML.")] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest layout that fits, with proof."""
    from planner.planning import make

    question = question_of(
        model,
        cluster,
        global_batch,
        sequence,
        documents,
        devices=devices,
        precision=precision,
        memory_limit=memory_limit,
        target=target,
        pins=pin or (),
        bans=ban or (),
        expert_imbalance=expert_imbalance,
        offload=offload,
    )
    answer = make(
        question,
        top=top,
        time_limit_seconds=time_limit,
        price=price,
        allow_idle=allow_idle,
        pareto=pareto,
        output=output,
    )
    print_answer(answer, as_json)
    if output is not None and not as_json:
        print_report(f"\nplan written to {output}; train it with: cli.py train {output}")


app.command(
    epilog="Example: cli.py estimate --model llama3-8b --cluster dgx-h100:1 --global-batch 64 --seq 8192 "
    "--layout tp=8,zero=0,recompute=full"
)(estimate)
app.command(
    epilog="Examples: cli.py explain plan.yaml | cli.py explain plan.yaml --against tp=4,pp=8 "
    "(keys left out are chosen best)"
)(explain)
app.command(
    epilog="Examples: cli.py profile --quick | cli.py profile --nproc 4 -o hardware.yaml | torchrun --nnodes 2 "
    "--nproc-per-node 8 … cli.py profile -o hardware.yaml | cli.py profile --show a.yaml --against b.yaml | "
    "cli.py profile --calibrate runs/20261121-101500 | cli.py profile --list"
)(profile)


@app.command(
    epilog="Examples: cli.py train (this machine, a small model) | cli.py train plan.yaml --steps 1000 | "
    "cli.py train plan.yaml --dry-run (the memory of one rank, for a plan of any size)"
)
def train(
    context: typer.Context,
    plan_file: Annotated[Path | None, typer.Argument(metavar="[PLAN.YAML]", help="None: plan first.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model to plan for, or that the plan must be for.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--from", help="Start from the weights in this Hugging Face folder.")
    ] = None,
    data: Data = None,
    split: Split = None,
    tokenizer: Tokenizer = None,
    data_cache: DataCache = None,
    reset_positions: ResetPositions = None,
    reset_attention: ResetAttention = None,
    eod_mask_loss: EodMaskLoss = False,
    eod: Eod = None,
    validation_every: ValidationEvery = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 300,
    run_dir: RunDir = None,
    resume: Resume = False,
    global_batch: Annotated[int, typer.Option("--global-batch", min=1, help="Without a plan: sequences a step.")] = 16,
    sequence: Annotated[int, typer.Option("--seq", min=1, help="Without a plan: tokens a sequence.")] = 256,
    learning_rate: Annotated[
        float, typer.Option("--lr", parser=amount("--lr", 0), metavar="X", help="Peak learning rate.")
    ] = 3e-3,
    min_learning_rate: Annotated[
        float, typer.Option("--min-lr", parser=amount("--min-lr", 0), metavar="X", help="Where it falls to.")
    ] = 3e-4,
    lr_schedule: LrSchedule = "cosine",
    cooldown: Cooldown = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Warm-up steps.")] = 20,
    clip: Annotated[
        float,
        typer.Option("--clip", parser=amount("--clip", 0), metavar="X", help="Gradient norm to clip at; 0 for never."),
    ] = 1.0,
    weight_decay: WeightDecay = 0.1,
    betas: Betas = "0.9,0.95",
    spike_guard: SpikeGuard = None,
    loss_scale: LossScale = None,
    initial_loss_scale: InitialLossScale = 2.0**32,
    min_loss_scale: MinLossScale = 1.0,
    loss_scale_window: LossScaleWindow = 1000,
    hysteresis: Hysteresis = 2,
    log_every: LogEvery = 1,
    wandb: Wandb = None,
    mlflow: Mlflow = None,
    profile_steps: ProfileSteps = None,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", min=0, help="Steps; 0: at the end.")] = 0,
    checkpoint_minutes: CheckpointMinutes = 0.0,
    keep_checkpoints: KeepCheckpoints = 0,
    async_checkpoint: AsyncCheckpoint = False,
    time_limit: TimeLimit = None,
    elastic: Elastic = False,
    skip_limit: Annotated[int, typer.Option("--skip-limit", min=1, help="End after so many bad steps in a row.")] = 3,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", parser=amount("--timeout", 1, A_YEAR), metavar="X", help="Seconds a collective may take."
        ),
    ] = 120.0,
    compiled: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Default: on CUDA.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of weights and data order.")] = 0,
    balance_loss: Annotated[
        float,
        typer.Option(
            "--balance-loss",
            parser=amount("--balance-loss", 0),
            metavar="X",
            help="Weight of the experts' balance loss; 0 for none.",
        ),
    ] = 1e-3,
    balance_over: Annotated[
        str,
        typer.Option(
            "--balance-over",
            metavar="WHAT",
            help="The balance loss is of each sequence, or batch: depends on the layout.",
        ),
    ] = "sequence",
    bias_rate: Annotated[
        float,
        typer.Option(
            "--bias-rate",
            parser=amount("--bias-rate", 0),
            metavar="X",
            help="Step of routers' selection biases, where they have them.",
        ),
    ] = 1e-3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: one rank's memory, for a plan of any size.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", help="With --dry-run: which; default one that should hold the most.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON document.")] = False,
) -> None:
    """Train as a plan says; without one, profile this machine, plan, and train a small model."""
    if dry_run or rank is not None or as_json:
        run_dry(plan_file, model, rank, as_json, asked=dry_run)
        return
    from runtime.slurm import joins

    if joins() and (run_dir is None or (plan_file is None and not resume)):
        from runtime.run_folder import torchrun_needs_files

        raise torchrun_needs_files()

    from planner.planning import PlanAnswer, plan_to_train
    from profiles.catalogue import resolve_hardware_path
    from profiles.hardware import load_hardware
    from runtime.early_checks import check_early
    from runtime.experts import Balance
    from runtime.hf_weights import model_to_start_from
    from runtime.run_folder import default_run_dir
    from runtime.trainer import TrainOptions

    tell_changes(context)
    if elastic:
        plan_file, resume = elastic_plan(plan_file, run_dir)
    model = model_to_start_from(weights, plan_file, model, resume=resume)
    plans = plan_file is None and not resume
    scaling = loss_scaling(loss_scale, initial_loss_scale, min_loss_scale, loss_scale_window, hysteresis)
    wishes = training_options(
        lr_schedule, cooldown, weight_decay, betas, spike_guard, log_every, wandb, mlflow, profile_steps
    )
    read = data_options(data, split, tokenizer, data_cache)
    if plans:
        check_early(run_dir, read, wishes["watching"], wishes["schedule"], steps=steps, warmup=warmup)
    asked = described(model, sequence) if model is not None and plans else model
    lengths = data_document_length(data, sequence) if plans and reset_attention else None
    found = plan_to_train(plan_file, asked, run_dir, resume, global_batch, sequence, command_line(), lengths)
    if isinstance(found, PlanAnswer):
        print_report(found.report())
    chosen = found.plan if isinstance(found, PlanAnswer) else found
    assert chosen is not None
    refuse_without_fp16(context, chosen.job.precision)
    folder = run_dir or default_run_dir()
    hardware = load_hardware(resolve_hardware_path(chosen.cluster.hardware))
    options = TrainOptions(
        run_dir=folder,
        steps=steps,
        learning_rate=learning_rate,
        min_learning_rate=min(min_learning_rate, learning_rate),
        warmup_steps=warmup,
        clip_norm=clip or None,
        seed=seed,
        data=packed_options(read, chosen, reset_positions, reset_attention, eod_mask_loss, eod),
        validation_every=validation_every,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
        keep_checkpoints=keep_checkpoints,
        async_checkpoint=async_checkpoint,
        time_limit_seconds=time_limit * 60 if time_limit is not None else None,
        settings=remembered(context),
        resume=resume,
        skip_limit=skip_limit,
        timeout_seconds=timeout,
        peak_flops_per_second=hardware.peak_flops_per_second[chosen.job.precision],
        compile=compiled,
        balance=Balance(balance_loss, bias_rate, balance_over),
        weights=weights,
        scaling=scaling,
        **wishes,
    )
    launch_and_report(chosen, options)


app.command(
    epilog="Examples: cli.py verify plan.yaml | cli.py verify plan.yaml --steps 10 --json (exit code 1: it differs)"
)(verify)
app.command(epilog="Examples: cli.py validate runs.csv | cli.py validate runs/ (our own run folders)")(validate)
app.command(epilog="Example: cli.py export runs/mine --to hf --out my-model --dtype bf16")(export)
app.command(
    epilog="Examples: cli.py replan runs/mine --devices 16 | cli.py replan runs/mine --lost-nodes 1; then "
    "cli.py train --run-dir runs/mine --resume"
)(replan)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: cli.py megatron --cluster dgx-h100:4 --plan-only --tensor-model-parallel-size 4 --num-layers 32 … "
    "(all flags of pretrain_gpt.py; without --plan-only it trains)",
)(megatron)


# ---- running it ----------------------------------------------------------------------------------------------


def main() -> None:
    """Run a verb, and exit with its code."""
    sys.exit(exit_code_of(app))


if __name__ == "__main__":
    main()
