"""python benchmarks/closed_loop.py [--nproc 2] [--rounds 5]: every legal layout, predicted beside measured.

Profiles this machine, prices every legal layout of a small model (best split of the layers each), runs them all
in one process group, a step of each in turn, and prints the errors, the rank correlation and the regret: how
much slower the planner's choice is than the best layout measured. The noise floor is the spread of the medians
of the two halves of the rounds. `--parts` adds a table by part for the worst predictions.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent.parent))

from planner.job import TrainingJob
from planner.layout import enumerate_layouts
from planner.plan import Certificate, Plan, load, save
from planner.question import Question
from planner.search import make_plan, solve_layout
from profiles.catalogue import resolve_model
from profiles.cluster import ClusterSpec, load_cluster_file, save_cluster
from profiles.hardware import HardwareProfile, load_hardware, save_hardware
from profiles.probes.profiler import LEVELS, ProfileOptions, profile_machine
from runtime.clock import Clock
from runtime.process_group import process_group
from runtime.step import TrainState, build_state, training_step

WARM_UP_ROUNDS = 2
PARTS = ("compute", "tp", "dp", "optimizer")


@dataclass(frozen=True)
class Case:
    """One layout: what was predicted, and seconds of each measured step (slowest rank)."""

    plan: Plan
    seconds: list[float]

    @property
    def measured_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def error(self) -> float:
        return self.plan.prediction.step_seconds / self.measured_seconds - 1.0


def plans_of(question: Question) -> list[Plan]:
    """A plan for each legal layout, with the best assignment of its layers."""
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


def work(rank: int, world_size: int, port: int, folder: str, count: int, rounds: int) -> None:
    """One rank: build every layout, then run a step of each in turn, `rounds` times."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    seconds: list[list[float]] = [[] for _ in range(count)]
    spans: list[dict[str, float]] = [{} for _ in range(count)]
    with process_group(world_size, 120.0) as device:
        plans = [load(Path(folder) / f"{i}.yaml") for i in range(count)]
        states = [build_state(plan, device, dtype=torch.float32, seed=0, weight_decay=0.1) for plan in plans]
        for number in range(WARM_UP_ROUNDS + rounds):
            for i, (plan, state) in enumerate(zip(plans, states, strict=True)):
                torch.distributed.barrier()
                started = time.perf_counter()
                found = one_step(plan, state)
                took = time.perf_counter() - started
                clock: Clock = state.runner.clock
                if number >= WARM_UP_ROUNDS:
                    seconds[i].append(took)
                    spans[i] = {**clock.read(), **found}
                else:
                    clock.read()
            if rank == 0:
                print(f"round {number + 1} of {WARM_UP_ROUNDS + rounds}", file=sys.stderr, flush=True)
        torch.save({"seconds": seconds, "spans": spans}, Path(folder) / f"rank{rank}.pt")


def one_step(plan: Plan, state: TrainState) -> dict[str, float]:
    samples = plan.microbatches * plan.layout.micro_batch
    ids = torch.randint(0, plan.model.vocab_size, (samples, plan.job.sequence + 1), device=state.device)
    result = training_step(state, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), learning_rate=1e-4, clip_norm=1.0)
    return {"optimizer": result.optimizer_seconds, "synchronise": result.synchronise_seconds}


def spearman(left: list[float], right: list[float]) -> float:
    """Rank correlation."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [float(order.index(i)) for i in range(len(values))]

    a, b = ranks(left), ranks(right)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def measure(plans: list[Plan], world_size: int, rounds: int) -> tuple[list[Case], list[list[dict[str, float]]]]:
    with tempfile.TemporaryDirectory() as folder:
        for i, plan in enumerate(plans):
            save(plan, Path(folder) / f"{i}.yaml")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.start_processes(
            work, args=(world_size, port, folder, len(plans), rounds), nprocs=world_size, start_method="spawn"
        )
        ranks = [torch.load(Path(folder) / f"rank{r}.pt") for r in range(world_size)]
    cases = [
        Case(plan, [max(step) for step in zip(*(rank["seconds"][i] for rank in ranks), strict=True)])
        for i, plan in enumerate(plans)
    ]
    return cases, [[rank["spans"][i] for rank in ranks] for i in range(len(plans))]


def show(cases: list[Case], spans: list[list[dict[str, float]]], parts: bool) -> None:
    order = sorted(range(len(cases)), key=lambda i: cases[i].measured_seconds)
    print(f"{'layout':<34}{'stages':<10}{'predicted':>10}{'measured':>10}{'error':>8}")
    for i in order:
        case = cases[i]
        split = "/".join(str(stage.end - stage.first) for stage in case.plan.stages)
        predicted = case.plan.prediction.step_seconds
        line = (
            f"{case.plan.layout.short():<34}{split:<10}{predicted * 1e3:>8.0f}ms{case.measured_seconds * 1e3:>8.0f}ms"
        )
        print(f"{line}{case.error:>+8.1%}")
        if parts:
            breakdown = {k: f"{v * 1e3:.0f}" for k, v in case.plan.prediction.breakdown_seconds.items() if v > 5e-4}
            print("    predicted", breakdown)
            for rank in spans[i]:
                print("    measured ", {key: f"{value * 1e3:.0f}" for key, value in rank.items()})
    predicted = [case.plan.prediction.step_seconds for case in cases]
    measured = [case.measured_seconds for case in cases]
    chosen = min(cases, key=lambda case: case.plan.prediction.step_seconds)
    halves = [
        abs(statistics.median(c.seconds[0::2]) / statistics.median(c.seconds[1::2]) - 1.0)
        for c in cases
        if c.seconds[1:]
    ]
    print(f"\nlayouts             {len(cases)}")
    print(f"median error        {statistics.median(abs(case.error) for case in cases):.1%}")
    print(f"mean error          {statistics.mean(abs(case.error) for case in cases):.1%}")
    print(f"Spearman            {spearman(predicted, measured):.3f}")
    print(f"regret              {chosen.measured_seconds / min(measured) - 1.0:.1%} ({chosen.plan.layout.short()})")
    if halves:
        print(f"noise floor         {statistics.median(halves):.1%} (two halves of the rounds, median over layouts)")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each layout")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--budget", type=float, help="seconds for the profile; default as its thoroughness")
    parser.add_argument("--thoroughness", default="quick", choices=LEVELS, help="of the profile")
    parser.add_argument("--parts", action="store_true", help="print predicted and measured parts of every layout")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="only layouts whose line has the text; repeatable"
    )
    parser.add_argument("--profile", type=Path, help="reuse this hardware profile, or keep the new one here")
    arguments = parser.parse_args()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  torch {torch.__version__}  {' '.join(sys.argv)}\n")
    hardware, cluster = profiled(arguments)
    job = TrainingJob(global_batch=arguments.global_batch, sequence=arguments.seq, precision=arguments.precision)
    plans = plans_of(Question(resolve_model(arguments.model), cluster, hardware, job))
    if arguments.only:
        plans = [plan for plan in plans if any(text in plan.layout.short() for text in arguments.only)]
    cases, spans = measure(plans, arguments.nproc, arguments.rounds)
    show(cases, spans, arguments.parts)


if __name__ == "__main__":
    main()
