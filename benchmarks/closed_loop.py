"""python benchmarks/closed_loop.py [--nproc 2] [--rounds 5]: every legal layout, predicted beside measured.

Profiles this machine, prices every legal layout of three small models (best split of the layers each), runs them all
in one process group, a step of each in turn, and prints the errors, the rank correlation and the regret: how
much slower the planner's choice is than the best layout measured. The noise floor is the spread of the medians
of the two halves of the rounds. A machine that is shared runs faster and slower by the minute: the profiler's
reference work is timed before each step too, and the error is given also as if the machine had kept the pace it had
while it was profiled. `--parts` adds predicted and measured seconds by part to every layout.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent.parent))

from planner.calibrate import predicted_parts
from planner.job import TrainingJob
from planner.plan import Certificate, Plan, load, save
from planner.question import Question
from planner.record import RunRecord
from planner.search import make_plan, solve_layout
from planner.space import enumerate_layouts
from profiles.catalogue import resolve_model
from profiles.cluster import ClusterSpec, load_cluster_file, save_cluster
from profiles.hardware import HardwareProfile, load_hardware, save_hardware
from profiles.model import ModelSpec
from profiles.probes.pace import Pace
from profiles.probes.profiler import LEVELS, ProfileOptions, profile_machine
from profiles.probes.timing import Rank
from runtime.measure import StepMeter, busiest
from runtime.process_group import process_group
from runtime.step import TrainState, build_state, training_step

SHAPES = ("demo", *(str(Path(__file__).parent / "shapes" / f"{name}.yaml") for name in ("wide", "deep")))
WARM_UP_ROUNDS = 3
WATCHED_ROUNDS = 2  # after the measured ones: every kernel and collective timed on its own


@dataclass(frozen=True)
class Case:
    """One layout: its plan, seconds of each measured step (slowest rank), and the busiest rank's parts."""

    plan: Plan
    seconds: list[float]
    rank: int
    parts: dict[str, float]
    kernels: dict[str, float]
    paces: list[float]

    @property
    def measured_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def error(self) -> float:
        return self.plan.prediction.step_seconds / self.measured_seconds - 1.0

    def slowness(self, hardware: HardwareProfile) -> float:
        """Seconds of the reference work around these steps, in times of those while profiling."""
        pace = hardware.provenance.get("pace")
        return statistics.median(self.paces) / pace["median_seconds"] if pace else 1.0

    def paced_error(self, hardware: HardwareProfile) -> float:
        """The error had the machine kept the profile's pace."""
        return (1.0 + self.error) * self.slowness(hardware) - 1.0


def plans_of(question: Question) -> list[Plan]:
    """A plan for each legal layout that fits, with the best assignment of its layers."""
    unproven = Certificate(
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
    plans = []
    for layout in enumerate_layouts(question.rules):
        solved, fits = solve_layout(question, layout, question.job.recompute_pin)
        if fits:
            plans.append(make_plan(question, solved, unproven))
    return plans


# ---- on the ranks --------------------------------------------------------------------------------------------


def run_layouts(folder: Path, count: int, rounds: int) -> None:
    """One rank, its place in the environment: build every layout, then run a step of each in turn."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds: list[list[float]] = [[] for _ in range(count)]
    paces: list[list[float]] = [[] for _ in range(count)]
    with process_group(world_size, 300.0) as device:
        shares = world_size > len(os.sched_getaffinity(0))
        pace = Pace(Rank(rank, world_size, device, torch.distributed.group.WORLD, shares_cores=shares))
        plans = [load(folder / f"{i}.yaml") for i in range(count)]
        states = [build_state(plan, device, dtype=torch.float32, seed=0, weight_decay=0.1) for plan in plans]
        last = WARM_UP_ROUNDS + rounds
        meters = [
            StepMeter(
                state.mesh,
                state.runner.clock,
                plan.layout.pp,
                last + WATCHED_ROUNDS,
                watched_steps=(last + 1, last + 2),
            )
            for plan, state in zip(plans, states, strict=True)
        ]
        for number in range(1, last + WATCHED_ROUNDS + 1):
            for i, (plan, state) in enumerate(zip(plans, states, strict=True)):
                if WARM_UP_ROUNDS < number <= last:
                    paces[i].append(pace.seconds())
                torch.distributed.barrier()
                started = time.perf_counter()
                one_step(plan, state, meters[i], number)
                if WARM_UP_ROUNDS < number <= last:
                    seconds[i].append(time.perf_counter() - started)
            if rank == 0:
                print(f"round {number} of {last + WATCHED_ROUNDS}", file=sys.stderr, flush=True)
        tables = [(meter.table(meter.median_step()), meter.kernels()) for meter in meters]
        torch.save({"seconds": seconds, "tables": tables, "paces": paces}, folder / f"rank{rank}.pt")


def one_step(plan: Plan, state: TrainState, meter: StepMeter, number: int) -> None:
    samples = plan.microbatches * plan.layout.micro_batch
    ids = torch.randint(0, plan.model.vocab_size, (samples, plan.job.sequence + 1), device=state.device)
    start = time.perf_counter()
    result = training_step(
        state,
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        learning_rate=1e-4,
        clip_norm=1.0,
        watch=meter.watch(number),
    )
    meter.end_step(
        number,
        step_seconds=time.perf_counter() - start,
        optimizer=result.optimizer_seconds,
        synchronise=result.synchronise_seconds,
    )


def _spawned(rank: int, world_size: int, port: int, folder: str, count: int, rounds: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
    run_layouts(Path(folder), count, rounds)


def measure(plans: Sequence[Plan], world_size: int, rounds: int) -> list[Case]:
    """Run the plans on ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        save_plans(plans, Path(folder))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (world_size, port, folder, len(plans), rounds)
        mp.start_processes(_spawned, args=arguments, nprocs=world_size, start_method="spawn")
        return read_cases(plans, Path(folder), world_size)


def save_plans(plans: Sequence[Plan], folder: Path) -> None:
    for i, plan in enumerate(plans):
        save(plan, folder / f"{i}.yaml")


def read_cases(plans: Sequence[Plan], folder: Path, world_size: int) -> list[Case]:
    """What the ranks have left in the folder."""
    ranks = [torch.load(folder / f"rank{r}.pt") for r in range(world_size)]
    cases = []
    for i, plan in enumerate(plans):
        steps = [max(step) for step in zip(*(rank["seconds"][i] for rank in ranks), strict=True)]
        busy = busiest([rank["tables"][i][0] for rank in ranks])
        parts, kernels = ranks[busy]["tables"][i]
        cases.append(Case(plan, steps, busy, parts, kernels, ranks[0]["paces"][i]))
    return cases


# ---- what came of it -----------------------------------------------------------------------------------------


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation."""

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [float(order.index(i)) for i in range(len(values))]

    a, b = ranks(left), ranks(right)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def part_rows(case: Case, hardware: HardwareProfile) -> list[tuple[str, float, float]]:
    """(part, predicted, measured) seconds on the busiest rank; kernels and collectives as if nothing overlapped."""
    record = RunRecord(Path(), case.plan, "", "", case.rank, case.measured_seconds, case.parts, case.kernels)
    predicted, found = predicted_parts(hardware, record), case.parts
    breakdown = case.plan.prediction.breakdown_seconds
    compute = breakdown["compute"] + breakdown["recompute"]
    around = sum(predicted[kind] for kind in case.kernels)
    rows = [(kind, predicted[kind], seconds) for kind, seconds in case.kernels.items()]
    rows.append(("around them", compute - around, found["compute"] - sum(case.kernels.values())))
    rows.append(("tp", predicted["tp"], found["tp"]))
    rows.append(("dp", predicted["dp"], found["dp_exposed"]))
    rows.append(("pp, bubble", breakdown["pp"] + breakdown["bubble"], found["pp_bubble"]))
    rows.append(("optimizer", breakdown["optimizer"], found["optimizer"] + found["other"]))
    return [row for row in rows if max(row[1], row[2]) > 5e-4]


def show(cases: Sequence[Case], hardware: HardwareProfile, parts: bool) -> None:
    """The table of one model, and its summary."""
    print(f"{'layout':<34}{'stages':<10}{'predicted':>10}{'measured':>10}{'error':>8}{'at equal pace':>15}")
    for case in sorted(cases, key=lambda case: case.measured_seconds):
        split = "/".join(str(stage.end - stage.first) for stage in case.plan.stages)
        predicted = case.plan.prediction.step_seconds
        times = f"{predicted * 1e3:>8.0f}ms{case.measured_seconds * 1e3:>8.0f}ms{case.error:>+8.1%}"
        print(f"{case.plan.layout.short():<34}{split:<10}{times}{case.paced_error(hardware):>+15.1%}")
        if parts:
            rows = part_rows(case, hardware)
            print("    " + "  ".join(f"{name} {p * 1e3:.0f}/{m * 1e3:.0f}" for name, p, m in rows))
    summarise(cases, hardware)


def summarise(cases: Sequence[Case], hardware: HardwareProfile) -> None:
    predicted = [case.plan.prediction.step_seconds for case in cases]
    measured = [case.measured_seconds for case in cases]
    chosen = min(cases, key=lambda case: case.plan.prediction.step_seconds)
    halves = [
        abs(statistics.median(c.seconds[0::2]) / statistics.median(c.seconds[1::2]) - 1.0)
        for c in cases
        if c.seconds[1:]
    ]
    print(f"\nlayouts             {len(cases)}")
    for name, errors in (
        ("error", [case.error for case in cases]),
        ("at equal pace", [case.paced_error(hardware) for case in cases]),
    ):
        middle, mean = statistics.median(map(abs, errors)), statistics.mean(errors)
        print(f"{name:<20}median {middle:.1%}, mean signed {mean:+.1%}")
    slowness = [case.slowness(hardware) for case in cases]
    print(f"pace                {min(slowness):.2f} to {max(slowness):.2f} times the profile's seconds")
    print(f"Spearman            {spearman(predicted, measured):.3f}")
    print(f"regret              {chosen.measured_seconds / min(measured) - 1.0:.1%} ({chosen.plan.layout.short()})")
    if halves:
        print(f"noise floor         {statistics.median(halves):.1%} (two halves of the rounds, median over layouts)")


def show_parts(cases: Sequence[Case], hardware: HardwareProfile) -> None:
    """Each part over all layouts: seconds predicted and measured, summed, and the median ratio."""
    totals: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name, predicted, measured in part_rows(case, hardware):
            totals.setdefault(name, []).append((predicted, measured))
    print(f"\n{'part, over all layouts':<26}{'predicted':>10}{'measured':>10}{'median ratio':>14}")
    for name, pairs in totals.items():
        ratio = statistics.median(p / m for p, m in pairs if m > 1e-4)
        predicted, measured = (sum(column) for column in zip(*pairs, strict=True))
        print(f"{name:<26}{predicted:>9.2f}s{measured:>9.2f}s{ratio:>14.2f}")


def profiled(arguments: Any) -> tuple[HardwareProfile, ClusterSpec]:
    """A fresh profile of this machine, or the one that --profile names."""
    kept: Path | None = arguments.profile
    if kept is not None and kept.exists():
        return load_hardware(kept), load_cluster_file(kept.with_suffix(".cluster.yaml"))
    options = ProfileOptions(
        ranks=arguments.nproc,
        thoroughness=arguments.thoroughness,
        dtypes=("fp32",) if arguments.precision == "fp32" else ("fp32", arguments.precision),
        budget_seconds=arguments.budget,
    )
    findings = profile_machine(options, " ".join(sys.argv))
    hardware, cluster = findings.hardware(), findings.cluster("local")
    if kept is not None:
        save_hardware(hardware, kept)
        save_cluster(cluster, kept.with_suffix(".cluster.yaml"))
    return hardware, cluster


def questions(arguments: Any, hardware: HardwareProfile, cluster: ClusterSpec) -> list[Question]:
    job = TrainingJob(global_batch=arguments.global_batch, sequence=arguments.seq, precision=arguments.precision)
    models: list[ModelSpec] = [resolve_model(name) for name in arguments.model or SHAPES]
    return [Question(model, cluster, hardware, job) for model in models]


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="measured steps of each layout")
    options.add_argument("--model", action="append", help="repeatable; default three small shapes")
    options.add_argument("--global-batch", type=int, default=8)
    options.add_argument("--seq", type=int, default=256)
    options.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options.add_argument("--parts", action="store_true", help="predicted/measured ms of each part of every layout")
    options.add_argument("--only", action="append", metavar="TEXT", help="layouts whose line has the text; repeatable")
    return options


def chosen_plans(question: Question, arguments: Any) -> list[Plan]:
    plans = plans_of(question)
    return [p for p in plans if not arguments.only or any(text in p.layout.short() for text in arguments.only)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nproc", type=int, default=2, help="ranks")
    options.add_argument("--budget", type=float, help="seconds for the profile; default as its thoroughness")
    options.add_argument("--thoroughness", default="default", choices=LEVELS, help="of the profile")
    options.add_argument("--profile", type=Path, help="reuse this hardware profile, or keep the new one here")
    arguments = options.parse_args()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  torch {torch.__version__}  {' '.join(sys.argv)}")
    hardware, cluster = profiled(arguments)
    every: list[Case] = []
    for question in questions(arguments, hardware, cluster):
        print(f"\n{question.model.name}, batch {arguments.global_batch} × {arguments.seq}, {arguments.nproc} ranks")
        cases = measure(chosen_plans(question, arguments), arguments.nproc, arguments.rounds)
        show(cases, hardware, arguments.parts)
        every += cases
    show_parts(every, hardware)
    if len(arguments.model or SHAPES) > 1:
        print("\nall models")
        print(f"error               median {statistics.median(abs(c.error) for c in every):.1%} of {len(every)}")
        print(f"at equal pace       median {statistics.median(abs(c.paced_error(hardware)) for c in every):.1%}")


if __name__ == "__main__":
    main()
