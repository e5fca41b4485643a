"""The verbs that run a plan: train it, run one rank of it dry, hold it against a single process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli_parts import Json, command_line, print_json, print_report

if TYPE_CHECKING:
    from profiles.input_error import InputError


def train(
    plan_file: Annotated[Path | None, typer.Argument(metavar="[PLAN.YAML]", help="None: plan first.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model to plan for, or that the plan must be for.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Text file or folder; default Python's library.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 300,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Run folder; default runs/DATE-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --run-dir.")] = False,
    global_batch: Annotated[int, typer.Option("--global-batch", min=1, help="Without a plan: sequences a step.")] = 16,
    sequence: Annotated[int, typer.Option("--seq", min=1, help="Without a plan: tokens a sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.")] = 3e-3,
    min_learning_rate: Annotated[float, typer.Option("--min-lr", min=0.0, help="Where the cosine ends.")] = 3e-4,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Warm-up steps.")] = 20,
    clip: Annotated[float, typer.Option("--clip", min=0.0, help="Gradient norm to clip at; 0 for never.")] = 1.0,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", min=0, help="Steps; 0: at the end.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds a collective may take.")] = 120.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights and data order.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: one rank's memory, for a plan of any size.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", help="With --dry-run: which; default one that should hold the most.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON document.")] = False,
) -> None:
    """Train as a plan says; without one, profile this machine, plan, and train a small model."""
    if dry_run:
        _dry_run(plan_file, model, rank, as_json)
        return
    for flag, given in (("--rank", rank is not None), ("--json", as_json)):
        if given:
            raise _goes_with_dry_run(flag)
    joins = "RANK" in os.environ  # one of the ranks that torchrun has started
    if joins and (run_dir is None or (plan_file is None and not resume)):
        from runtime.run_folder import torchrun_needs_files

        raise torchrun_needs_files()

    from planner.planning import PlanAnswer, plan_to_train
    from planner.record import RECORD_FILE
    from planner.report import record_report
    from profiles.catalogue import resolve_hardware_path
    from profiles.hardware import load_hardware
    from profiles.store import parse_yaml, read_text
    from runtime.launch import train as launch
    from runtime.progress import step_progress
    from runtime.run_folder import default_run_dir
    from runtime.trainer import TrainOptions

    found = plan_to_train(plan_file, model, run_dir, resume, global_batch, sequence, command_line())
    if isinstance(found, PlanAnswer):
        print_report(found.report())
    chosen = found.plan if isinstance(found, PlanAnswer) else found
    assert chosen is not None
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
        data=data,
        checkpoint_every=checkpoint_every,
        resume=resume,
        timeout_seconds=timeout,
        peak_flops_per_second=hardware.peak_flops_per_second[chosen.job.precision],
    )
    try:
        with step_progress(steps, chosen.job.tokens) as on_progress:
            launch(chosen, options, on_progress)
    except KeyboardInterrupt:
        print_report(f"interrupted; the ranks have ended, and {folder} holds what was done", error=True)
        raise typer.Exit(130) from None
    record = folder / RECORD_FILE
    if record.exists() and os.environ.get("RANK", "0") == "0":
        print_report(record_report(parse_yaml(read_text(record, "record"), str(record))))
        print_report(f"run folder: {folder}")


def _dry_run(plan_file: Path | None, model: str | None, rank: int | None, as_json: bool) -> None:
    from planner.planning import plan_of_file
    from planner.rank_memory import chosen_rank, rank_memory
    from planner.rank_memory_report import rank_memory_report
    from profiles.catalogue import resolve_hardware_path
    from profiles.hardware import load_hardware
    from runtime.dry_run import dry_run, forwards
    from runtime.gpu_rank import run_on_gpu
    from runtime.progress import counted_progress
    from runtime.target import check_target

    if plan_file is None:
        raise _goes_with_dry_run("PLAN.YAML")
    plan = plan_of_file(plan_file, model)
    check_target(plan)
    rank = chosen_rank(plan, rank)
    on_gpus = load_hardware(resolve_hardware_path(plan.cluster.hardware)).backend == "nccl"
    start = time.perf_counter()
    with counted_progress(f"rank {rank} of {plan.layout.world_size}, forward passes", forwards(plan)) as on_forward:
        run = dry_run(plan, rank, gpu_kernels=on_gpus, on_forward=on_forward)
    seconds = time.perf_counter() - start
    gpu = run_on_gpu(plan, rank)
    found = rank_memory(
        plan,
        rank,
        run.parts,
        gpu_kernels=on_gpus,
        seconds=seconds,
        gpu=gpu.to_dict() if gpu is not None else None,
    )
    print_json(found.to_dict()) if as_json else print_report(rank_memory_report(found))


def verify(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.YAML", help="A plan that `plan -o` has written.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps in each precision.")] = 3,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds a collective may take.")] = 120.0,
    as_json: Json = False,
) -> None:
    """Run the plan at reduced size on this machine's cores: does it compute what one process does?"""
    from planner.plan import load
    from planner.reduced_plan import reduce_plan
    from planner.verify_report import verify_report
    from runtime.progress import spinner
    from runtime.target import check_target
    from runtime.verify import verify as run_beside_one_process

    plan = load(plan_file)
    check_target(plan)
    reduced = reduce_plan(plan)
    with spinner(f"{reduced.plan.layout.world_size} ranks beside one process"):
        verdict = run_beside_one_process(reduced.plan, reduced.loss_tokens, steps=steps, timeout_seconds=timeout)
    if as_json:
        print_json(reduced.to_dict() | verdict.to_dict())
    else:
        print_report(verify_report(reduced, verdict.to_dict()))
    if not verdict.holds:
        raise typer.Exit(1)


def _goes_with_dry_run(what: str) -> InputError:
    from profiles.input_error import InputError

    if what.startswith("--"):
        return InputError(f"{what} goes with --dry-run", where=what, expected="--dry-run beside it", got="no --dry-run")
    return InputError(
        "a dry run is of a plan",
        where="train --dry-run",
        expected="a file that `plan -o` has written",
        got="no file",
        hint="cli.py train plan.yaml --dry-run",
    )
