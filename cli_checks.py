"""The verbs that check: a rank of a plan dry, all of it small beside one process, predictions beside measured runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli_parts import A_YEAR, Json, amount, print_json, print_report

if TYPE_CHECKING:
    from profiles.input_error import InputError


def run_dry(plan_file: Path | None, model: str | None, rank: int | None, as_json: bool, *, asked: bool) -> None:
    """`train --dry-run`; `asked` is whether that flag was among those given."""
    if not asked:
        raise _goes_with_dry_run("--json" if rank is None else "--rank")
    if plan_file is None:
        raise _no_plan_to_run_dry()

    from planner.planning import plan_of_file
    from planner.rank_memory import chosen_rank, rank_memory
    from planner.rank_memory_report import rank_memory_report
    from profiles.catalogue import resolve_hardware_path
    from profiles.hardware import load_hardware
    from runtime.dry_run import check_plan, dry_run, forwards
    from runtime.gpu_rank import run_on_gpu
    from runtime.progress import counted_progress
    from runtime.target import check_target

    plan = plan_of_file(plan_file, model)
    check_target(plan)
    check_plan(plan)
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
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", parser=amount("--timeout", 1, A_YEAR), metavar="X", help="Seconds a collective may take."
        ),
    ] = 120.0,
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


def _goes_with_dry_run(flag: str) -> InputError:
    from profiles.input_error import InputError

    return InputError(f"{flag} goes with --dry-run", where=flag, expected="--dry-run beside it", got="no --dry-run")


def _no_plan_to_run_dry() -> InputError:
    from profiles.input_error import InputError

    return InputError(
        "a dry run is of a plan",
        where="--dry-run",
        expected="a file that `plan -o` has written",
        got="no file",
        hint="cli.py train plan.yaml --dry-run",
    )


def validate(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="CSV of published runs, or a folder of our own.")],
    as_json: Json = False,
) -> None:
    """Predict what was measured, and print how far off the predictions are."""
    from planner.validate import validate as compare
    from planner.validate_report import validation_report

    found = compare(runs)
    print_json(found.to_dict()) if as_json else print_report(validation_report(found))
