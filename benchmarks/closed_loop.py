"""python benchmarks/closed_loop.py [--nproc 2] [--turns 3] [--rounds 3]: each legal layout, predicted beside measured.

Profiles this machine, takes the best split of the layers for each legal layout of three small models, and runs all of
a model's in one process group, a step of each in turn. Profiling and running take turns, since a machine that is
shared runs faster and slower by the minute, and the points' medians over the profiles after the turns price the
layouts. The first profile only splits the layers. Prints the errors, the rank correlation and the regret: how much
slower the planner's choice is than the best layout measured. Beside each stands what noise alone makes of it: one half
of the rounds against the other. The profiler's reference work is timed before each step too, and the error is given
also as if the machine had kept the pace it had while it was profiled.
`--parts` adds predicted and measured seconds by part to every layout.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, where `runtime` is a benchmark

from profile_medians import merge_profiles
from scores import show, show_parts
from side_by_side import Case, ranks_of_this_machine, read_cases, save_plans

from planner.assignment import counts_of
from planner.job import TrainingJob
from planner.plan import Certificate, Plan, load
from planner.question import Question
from planner.search import Solved, make_plan, solve_layout
from planner.space import enumerate_layouts
from planner.step_cost import CostModel
from profiles.catalogue import resolve_model
from profiles.cluster import ClusterSpec, load_cluster_file, save_cluster
from profiles.hardware import HardwareProfile, load_hardware, save_hardware
from profiles.link_fit import with_collectives
from profiles.probes.profiler import LEVELS, ProfileOptions, profile_machine

Profile = tuple[HardwareProfile, ClusterSpec]
SHAPES = ("demo", *(str(Path(__file__).parent / "shapes" / f"{name}.yaml") for name in ("wide", "deep")))
UNPROVEN = Certificate(
    objective_seconds=1.0,
    bound_seconds=0.0,
    gap=0.0,
    layouts_legal=1,
    layouts_pruned_memory=0,
    layouts_pruned_bound=0,
    ilps_solved=0,
    solver="one layout, not searched",
    solve_seconds=0.0,
)


def plans_of(question: Question) -> list[Plan]:
    """A plan for each legal layout that fits, with the best assignment of its layers."""
    plans = []
    for layout in enumerate_layouts(question.rules):
        solved, fits = solve_layout(question, layout, question.job.pins.get("recompute"))
        if fits:
            plans.append(make_plan(question, solved, UNPROVEN))
    return plans


def priced_anew(plan: Plan, hardware: HardwareProfile, cluster: ClusterSpec) -> Plan:
    """The plan as it is, predicted from another profile."""
    prices = CostModel(plan.model, cluster, hardware, plan.job)
    costs = prices.price(plan.layout, [stage.reshard for stage in plan.stages])
    counts = counts_of(plan.model, plan.stages)
    question = Question(plan.model, cluster, hardware, plan.job)
    return make_plan(question, Solved(costs, counts, costs.step(counts)), UNPROVEN)


def profiled(arguments: Any) -> Profile:
    """A fresh profile of this machine."""
    options = ProfileOptions(
        ranks=arguments.nproc,
        thoroughness=arguments.thoroughness,
        dtypes=("fp32",) if arguments.precision == "fp32" else ("fp32", arguments.precision),
        budget_seconds=arguments.budget,
    )
    findings = profile_machine(options, " ".join(sys.argv))
    return findings.hardware(), findings.cluster("local")


def merged(profiles: Sequence[Profile]) -> Profile:
    """The medians of the profiles between the turns, and the links that fit them.

    The first one only splits the layers: no turn comes before it, and in two runs of three its pace was a faster one.
    """
    hardware = merge_profiles([hardware for hardware, _ in profiles[1:]])
    return hardware, with_collectives(profiles[0][1], hardware.collectives)


def question(arguments: Any, model: str, hardware: HardwareProfile, cluster: ClusterSpec) -> Question:
    pins = {"recompute": arguments.recompute} if arguments.recompute else {}
    job = TrainingJob(
        global_batch=arguments.global_batch, sequence=arguments.seq, precision=arguments.precision, pins=pins
    )
    return Question(resolve_model(model), cluster, hardware, job)


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=3, help="times that profiling and running alternate")
    options.add_argument("--rounds", type=int, default=3, help="measured steps of each layout in a turn")
    options.add_argument("--model", action="append", help="repeatable; default three small shapes")
    options.add_argument("--global-batch", type=int, default=8)
    options.add_argument("--seq", type=int, default=256)
    options.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="of all blocks; default: as memory asks"
    )
    options.add_argument("--parts", action="store_true", help="predicted/measured ms of each part of every layout")
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="leave profiles, plans and measurements here")
    options.add_argument("--only", action="append", metavar="TEXT", help="layouts whose line has the text; repeatable")
    options.add_argument("--every", type=int, default=1, metavar="N", help="of those every N-th")
    return options


def chosen_plans(question: Question, arguments: Any) -> list[Plan]:
    plans = plans_of(question)
    named = [p for p in plans if not arguments.only or any(text in p.layout.short() for text in arguments.only)]
    return named[:: arguments.every]


def summary(cases: Sequence[Case], paced: Sequence[float]) -> None:
    """All models; `paced` are the errors had the machine kept its pace."""
    print("\nall models")
    print(f"error               median {statistics.median(abs(c.error) for c in cases):.1%} of {len(cases)}")
    print(f"at equal pace       median {statistics.median(map(abs, paced)):.1%}")


def report(cases: Sequence[Case], hardware: HardwareProfile, arguments: Any) -> None:
    """One model's layouts."""
    layout = cases[0].plan.layout
    print(f"\n{cases[0].plan.model.name}, batch {arguments.global_batch} × {arguments.seq}, {layout.world_size} ranks")
    show(cases, hardware, arguments.parts)
    show_parts(cases, hardware)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nproc", type=int, default=2, help="ranks")
    options.add_argument("--budget", type=float, help="seconds for each profile; default as its thoroughness")
    options.add_argument("--thoroughness", default="quick", choices=LEVELS, help="of each profile")
    options.add_argument("--again", type=Path, metavar="FOLDER", help="price what --keep left there, measure nothing")
    arguments = options.parse_args()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  torch {torch.__version__}  {' '.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.again or arguments.keep or Path(scratch)
        before: Profile | None = None
        everything, paced = [], []
        for name in arguments.model or SHAPES:
            place = folder / Path(name).stem
            if not arguments.again:
                before = profile_and_run(arguments, name, place, before)
            cases, hardware = measured(place, arguments.nproc)
            report(cases, hardware, arguments)
            everything += cases
            paced += [case.paced_error(hardware) for case in cases]
        if len(everything) > len(cases):
            summary(everything, paced)


def profile_and_run(arguments: Any, model: str, folder: Path, before: Profile | None) -> Profile:
    """Fill the folder with plans, profiles and what was measured of one model; gives the last profile.

    [Note: Turns] The first profile decides how each layout splits its layers; the last one of the model before will
    do. Each model has ranks of its own: with a hundred threads of the process groups of all three in one process,
    they got in each other's way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    profiles = [before or profiled(arguments)]
    plans = chosen_plans(question(arguments, model, *profiles[0]), arguments)
    save_plans(plans, folder)
    with ranks_of_this_machine(folder, arguments.nproc, len(plans), arguments.turns, arguments.rounds) as turns:
        for _ in range(arguments.turns):
            turns.take()
            profiles.append(profiled(arguments))
    for number, (hardware, cluster) in enumerate(profiles):
        save_hardware(hardware, folder / f"profile{number}.yaml")
        save_cluster(cluster, folder / f"profile{number}.cluster.yaml")
    return profiles[-1]


def measured(folder: Path, ranks: int) -> tuple[list[Case], HardwareProfile]:
    """What one model's folder holds, priced from its profiles."""
    profiles = [load_profile(folder, i) for i in range(len(list(folder.glob("*.cluster.yaml"))))]
    plans = [load(folder / f"{i}.yaml") for i in range(len(list(folder.glob("[0-9]*.yaml"))))]
    hardware, cluster = merged(profiles)
    return read_cases([priced_anew(plan, hardware, cluster) for plan in plans], folder, ranks), hardware


def load_profile(folder: Path, number: int) -> Profile:
    cluster = load_cluster_file(folder / f"profile{number}.cluster.yaml")
    return load_hardware(folder / f"profile{number}.yaml"), cluster


if __name__ == "__main__":
    main()
