"""A run's life on the command line: its checkpoints, what a resume remembers, when it leaves, and `replan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli_parts import Devices, Json, amount, folder, print_json, print_report

if TYPE_CHECKING:
    from planner.plan import Plan

_SECONDS_TO_PLAN = 60.0  # while all ranks wait
# Options of `train` that concern one start of a run and not the run.
_OF_ONE_START = {
    *("plan_file", "model", "run_dir", "resume", "global_batch", "sequence", "elastic", "time_limit", "timeout"),
    *("compiled", "dry_run", "rank", "as_json", "profile_steps"),
}


def _remember(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Once both are known, --run-dir and --resume make what the run was started with the defaults of all options."""
    given = {**context.params, parameter.name: value}
    if given.get("run_dir") is not None and given.get("resume"):
        from runtime.checkpoint_folder import RunState, latest

        settings = RunState.read(latest(given["run_dir"])).settings
        context.default_map = {name: setting for name, setting in settings.items() if name not in _OF_ONE_START}
    return value


RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        parser=folder("--run-dir"),
        metavar="PATH",
        help="Run folder; default runs/DATE-TIME.",
        callback=_remember,
        is_eager=True,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the last checkpoint of --run-dir; options not given are those of the run.",
        callback=_remember,
        is_eager=True,
    ),
]
CheckpointMinutes = Annotated[
    float,
    typer.Option(
        "--checkpoint-minutes",
        parser=amount("--checkpoint-minutes", 0),
        metavar="X",
        help="Besides, a checkpoint every so many minutes.",
    ),
]
KeepCheckpoints = Annotated[int, typer.Option("--keep-checkpoints", min=0, help="The newest that stay; 0: all.")]
AsyncCheckpoint = Annotated[
    bool, typer.Option("--async-checkpoint/--sync-checkpoint", help="Write checkpoints while training goes on.")
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        parser=amount("--time-limit", 0),
        metavar="X",
        help="Minutes after which to leave, with a checkpoint.",
    ),
]
Elastic = Annotated[
    bool, typer.Option("--elastic", help="Under torchrun: plan again for as many ranks as there are, and go on.")
]


def remembered(context: typer.Context) -> dict[str, Any]:
    """The options of a run, as plain values that a checkpoint keeps and a resume takes for defaults."""
    return {name: _plain(value) for name, value in context.params.items() if name not in _OF_ONE_START}


def tell_changes(context: typer.Context) -> None:
    """Say which of the run's options the command line of a resume overrules."""
    before: Mapping[str, Any] = context.default_map or {}
    changes: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        typed = source is not None and source.name == "COMMANDLINE"
        if typed and name in before and _plain(context.params[name]) != before[name]:
            changes.append(f"{parameter.opts[0]} {context.params[name]} (until now {before[name]})")
    if changes and os.environ.get("RANK", "0") == "0":
        print_report(f"other than in the run so far: {', '.join(changes)}", error=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def elastic_plan(plan_file: Path | None, run_dir: Path | None) -> tuple[Path, bool]:
    """The plan for the ranks that torchrun has started, and whether the run goes on from a checkpoint."""
    from planner.replanning import plan_again
    from runtime.checkpoint_folder import complete_steps
    from runtime.elastic import check_elastic, plan_for_ranks

    def plan_for(plan: Plan, devices: int) -> Plan:
        return plan_again(plan, plan.cluster.with_devices(devices), _SECONDS_TO_PLAN)[0]

    plan_file, run_dir = check_elastic(plan_file, run_dir)
    return plan_for_ranks(plan_file, run_dir, plan_for), bool(complete_steps(run_dir))


def replan(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that has a checkpoint.")],
    devices: Devices = None,
    lost_nodes: Annotated[
        int | None, typer.Option("--lost-nodes", help="So many nodes fewer than planned for.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="With --devices: another cluster than the run's plan is for.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of the whole run; default what it was started with.")
    ] = None,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds after which to settle.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Plan the rest of a run for other devices: same model, batch and data order; `train --resume` goes on."""
    from dataclasses import replace

    from planner.record import put_plan
    from planner.replan_report import replan_report
    from planner.replanning import Replan, cluster_left, plan_again, steps_in_all
    from profiles.catalogue import resolve_cluster
    from runtime.checkpoint_folder import RunState, latest

    state = RunState.read(latest(run_dir))
    before = state.plan  # what has trained so far, whatever has been planned since
    total = steps_in_all(steps, state.settings, state.step)
    start = replace(before, cluster=resolve_cluster(cluster)) if cluster is not None else before
    after, dropped = plan_again(start, cluster_left(start, devices, lost_nodes, run_dir), time_limit)
    found = Replan(before=before, after=after, steps_done=state.step, steps=total, dropped=dropped)
    kept = put_plan(run_dir, after, state.step)
    print_json(found.to_dict()) if as_json else print_report(replan_report(found, run_dir, kept))
