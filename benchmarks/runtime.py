"""python benchmarks/runtime.py [--torchtitan FOLDER]: our step beside the same step of plain PyTorch loops.

Each case trains one model under one layout in one process group, our runtime and a loop written by hand (bare, DDP,
FSDP2, GPipe; torchtitan where it is given), a step of each in turn on the same batch. Printed are the median ratio of a
pair, ours over theirs, its 95 % interval (order statistics of the pairs) and whether the bound holds: whether the
interval's lower end is within it. "noise" is the same for theirs, built twice, against itself. The last column is the
ratio of CPU seconds of all ranks together, without what they wait: no bound is held against it, but what else runs on
the machine moves it less.

One thread a rank. `--torchtitan FOLDER` is where `pip install --no-deps --target FOLDER torchtitan==0.2.2` and what it
needs have been put.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, where `runtime` is this file

import plain_loops
import torch
from paired_ratios import LEAST_PAIRS, Ratio, ratio_of
from paired_run import Builder, Measured, run_pairs
from plain_llama import why_not
from plain_loops import Loop, Values

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.catalogue import resolve_model
from tests.plans import make_plan

BARE, PLAIN, TITAN = 1.02, 1.03, 1.0  # bounds: our seconds in times of theirs


@dataclass(frozen=True)
class Case:
    """What to run beside ours, under which layout, and the bound."""

    theirs: str
    builder: Builder
    layout: Layout
    bound: float

    @property
    def name(self) -> str:
        ranks = self.layout.world_size
        return f"{ranks} rank{'s' * (ranks > 1)}, {self.theirs}"


def plain_cases(batch: int) -> list[Case]:
    """Two microbatches where there is no pipeline, but for FSDP2, four where there is one."""
    cases = [Case("bare loop", plain_loops.bare, Layout(micro_batch=batch // 2), BARE)]
    for ranks in (2, 4):
        replicated = Layout(dp=ranks, micro_batch=batch // ranks // 2)
        sharded = Layout(dp=ranks, dp_shard=ranks, zero=3, micro_batch=batch // ranks)
        pipelined = Layout(pp=ranks, schedule="gpipe", micro_batch=batch // 4)
        cases.append(Case("DDP", plain_loops.ddp, replicated, PLAIN))
        cases.append(Case("FSDP2", plain_loops.fsdp2, sharded, PLAIN))
        cases.append(Case("ScheduleGPipe", plain_loops.gpipe, pipelined, PLAIN))
    return cases


def titan_step(plan: Plan, values: Values, device: torch.device) -> Loop:
    from titan_loops import titan  # where it is installed, and on the ranks only: it takes seconds

    return titan(plan, values, device)


def titan_cases(batch: int) -> list[Case]:
    """One microbatch but in the pipeline, as its trainer has it unless it is asked to accumulate."""
    sharded = Layout(dp=2, dp_shard=2, zero=3, micro_batch=batch // 2)
    parallel = Layout(tp=2, sequence_parallel=True, micro_batch=batch)
    pipelined = Layout(pp=2, schedule="1f1b", micro_batch=batch // 4)
    both = Layout(tp=2, sequence_parallel=True, dp=2, dp_shard=2, zero=3, micro_batch=batch // 2)
    names = ("torchtitan FSDP2", "torchtitan TP2", "torchtitan PP2", "torchtitan FSDP2 × TP2")
    layouts = (sharded, parallel, pipelined, both)
    return [Case(name, titan_step, layout, TITAN) for name, layout in zip(names, layouts, strict=True)]


def row(case: Case, measured: Measured) -> str:
    clock = measured.clock
    ratio, noise = ratio_of(clock.ours, clock.theirs), ratio_of(clock.again, clock.beside_again)
    cpu = ratio_of(measured.cpu.ours, measured.cpu.theirs)
    times = "".join(f"{statistics.median(seconds) * 1e3:>8.1f}" for seconds in (clock.ours, clock.theirs))
    holds = "no" if not ratio.holds(case.bound) else "yes, all of it" if ratio.holds_whole(case.bound) else "yes"
    return (
        f"{case.name:<32}{case.layout.short():<26}{times}  {interval(ratio)}{ratio.pairs:>4}  <= {case.bound:.2f}"
        f"  {holds:<16}{interval(noise)}   {interval(cpu)}"
    )


def interval(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


HEAD = (
    f"{'case':<32}{'layout':<26}{'ours':>8}{'theirs':>8}  {'ratio (95 % interval)':<22}{'n':>4}  {'bound':<7}  "
    f"{'holds':<16}{'noise: theirs / theirs':<22}   CPU seconds, ratio"
)


def machine() -> str:
    """Date, machine and what else runs on it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    return f"{now}  {processor}, {cores} cores, load {load}  torch {torch.__version__}  {' '.join(sys.argv)}"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=17, help=f"of steps, at least {LEAST_PAIRS}")
    parser.add_argument("--model", default="demo", help="one with RMSNorm, SwiGLU and rotary positions")
    parser.add_argument("--global-batch", type=int, default=8, help="a multiple of 8")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name has the text; repeatable")
    parser.add_argument("--torchtitan", type=Path, metavar="FOLDER", help="where it is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all seconds of all steps")
    return parser


def cases(arguments: Any) -> list[Case]:
    found = plain_cases(arguments.global_batch)
    if arguments.torchtitan is not None:
        sys.path.append(str(arguments.torchtitan))
    if importlib.util.find_spec("torchtitan") is not None:
        found += titan_cases(arguments.global_batch)
    else:
        print("torchtitan is left out: it is not installed, and no --torchtitan says where")
    return [case for case in found if not arguments.only or any(text in case.name for text in arguments.only)]


def main() -> None:
    arguments = options().parse_args()
    started = time.monotonic()
    model = resolve_model(arguments.model)
    reason = why_not(model)
    if reason or arguments.global_batch % 8 or arguments.pairs < LEAST_PAIRS:
        sys.exit(reason or f"--global-batch is to be a multiple of 8 and --pairs at least {LEAST_PAIRS}")
    job = TrainingJob(global_batch=arguments.global_batch, sequence=arguments.seq, precision="fp32")
    print(f"{machine()}\n{model.name}, batch {job.global_batch} × {job.sequence}, fp32, one thread a rank; ms\n")
    print(HEAD, flush=True)
    measured: dict[str, Any] = {}
    for case in cases(arguments):
        try:
            found = run_pairs(make_plan(model, case.layout, job), case.builder, arguments.pairs)
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            print(f"{case.name:<32}{case.layout.short():<28}did not run: {reason}", flush=True)
            continue
        print(row(case, found), flush=True)
        measured[case.name] = asdict(found) | {"layout": case.layout.to_dict(), "bound": case.bound}
    print(f"\nload at the end {os.getloadavg()[0]:.1f}, {time.monotonic() - started:.0f} s in all")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
