"""The verb `profile`: measure this machine, or look at what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli_ending import say_interrupted
from cli_parts import Json, command_line, print_json, print_report


def profile(
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks; default all GPUs, else cores.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of as `local`.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most 30 s: what no plan can do without.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Everything, up to an hour (default: 5 minutes).")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Measure what an earlier profile lacks.")] = False,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="Measure kernels in this one; repeatable. Default: by device and time."),
    ] = None,
    nccl_tests: Annotated[
        list[Path] | None, typer.Option("--nccl-tests", help="Take collectives from nccl-tests output; repeatable.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None, typer.Option("--calibrate", help="Correct the profile by this run's record; repeatable.")
    ] = None,
    show: Annotated[
        str | None, typer.Option("--show", help="Tables and plots of this profile; measures nothing.")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="With --show: what differs from this one.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Models, clusters and hardware in the catalogue.")] = False,
    as_json: Json = False,
) -> None:
    """Measure this machine, or look at what was measured: what `--cluster local` plans with."""
    from planner.profiling import ProfileOrder, carry_out

    order = ProfileOrder(
        command=command_line(),
        nproc=nproc,
        output=output,
        quick=quick,
        full=full,
        resume=resume,
        precisions=tuple(precision or ()),
        nccl_tests=tuple(nccl_tests or ()),
        calibrate=tuple(calibrate or ()),
        show=show,
        against=against,
        list_all=list_all,
    )
    try:
        answer = carry_out(order)
    except KeyboardInterrupt as error:  # click would drop what it says
        say_interrupted(error)
        raise typer.Exit(130) from None
    if answer is None:  # a rank of torchrun's that is not the first
        return
    if as_json:
        print_json(answer.document)
    else:
        print_report(answer.report)
