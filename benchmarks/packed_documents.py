"""python benchmarks/packed_documents.py [--model demo] [--seq 2048] [--lengths 64 256 1024]: packing, beside its price.

In one process group and on the same ids a step of each in turn, in an order that changes: rows whose tokens see all
before them, and rows of documents of one length, cut anywhere, that do not see each other. Printed is how many times
the step of whole rows a step of documents takes: by the clock and in CPU seconds, which what else runs on the machine
takes less from, medians of pairs with their 95 % intervals (paired_ratios.py); and as `estimate --cluster local` prices
it, which is worth what the last `cli.py profile` is.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, where `runtime` is a script

import torch
import torch.distributed as dist
from paired_ratios import ratio_of, slowest, together

from planner.job import TrainingJob
from planner.layout import Layout
from planner.packed_cost import row_pieces
from planner.plan import Plan
from planner.planning import estimate
from planner.question import ask
from profiles.catalogue import resolve_model
from runtime.data.packing import Packing
from runtime.launch import start_ranks
from runtime.packed_rows import own_tensors
from runtime.process_group import process_group
from runtime.run_folder import prepare
from runtime.step import TrainState, build_state, training_step
from runtime.trainer import TrainOptions
from tests.plans import make_plan

WARM_UP_STEPS = 3
END = 0
Seconds = dict[int, list[tuple[float, float]]]  # (clock, CPU) of each step by the documents' length, 0 of whole rows


def measure(plan: Plan, options: TrainOptions, lengths: Sequence[int]) -> list[Seconds]:
    """Seconds of the steps of every rank; `options.steps` is how many rounds."""
    ways = [0, *lengths]
    with process_group(plan.layout.world_size, options.timeout_seconds) as device:
        state = build_state(plan, device, dtype=torch.float32, seed=0, weight_decay=0.1)
        for number in range(WARM_UP_STEPS):
            for length in ways:
                _step(plan, state, length, number)
        seconds: Seconds = {length: [] for length in ways}
        for number in range(options.steps):
            turn = number % len(ways)
            for length in ways[turn:] + ways[:turn]:
                seconds[length].append(_step(plan, state, length, number))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, seconds)
    return every


def _step(plan: Plan, state: TrainState, length: int, number: int) -> tuple[float, float]:
    rows, sequence = plan.job.global_batch // plan.layout.dp, plan.job.sequence
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, plan.model.vocab_size, (rows, sequence + 1), generator=generator)
    if length:
        first = torch.randint(0, length, (rows, 1), generator=generator)
        ids[(torch.arange(sequence + 1) + first) % length == length - 1] = END
    samples = own_tensors(ids.numpy(), Packing(end=END) if length else None, plan.layout, 0, state.device)
    dist.barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    training_step(state, *samples, learning_rate=1e-4, clip_norm=1.0)
    state.runner.clock.read()
    return time.perf_counter() - clock, time.process_time() - cpu


def predicted(plan: Plan, length: float | None) -> float:
    """Seconds of a step on this machine as it is profiled."""
    job, layout = plan.job, plan.layout
    question = ask(
        plan.model, "local", job.global_batch, job.sequence, devices=layout.world_size, document_length=length
    )
    said = f"dp={layout.dp},dp_shard={layout.dp_shard},zero={layout.zero},micro_batch={layout.micro_batch}"
    return estimate(question, said).document["prediction"]["step_seconds"]


def report(plan: Plan, ranks: list[Seconds]) -> None:
    clock = {length: slowest([[step[0] for step in rank[length]] for rank in ranks]) for length in ranks[0]}
    cpu = {length: together([[step[1] for step in rank[length]] for rank in ranks]) for length in ranks[0]}
    whole = predicted(plan, None)
    print(f"whole rows: {statistics.median(clock[0]) * 1e3:.0f} ms a step measured, {whole * 1e3:.0f} ms predicted")
    print("| documents of | pairs of tokens left | a step takes, by the clock | in CPU seconds | predicted |")
    print("| --- | --- | --- | --- | --- |")
    for length in (length for length in clock if length):
        ratios = [ratio_of(seconds[length], seconds[0]) for seconds in (clock, cpu)]
        said = " | ".join(f"× {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" for ratio in ratios)
        left = row_pieces(plan.job.sequence, length).length / plan.job.sequence
        print(f"| {length} tokens | {left:.1%} | {said} | × {predicted(plan, float(length)) / whole:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    model = resolve_model(options.model)
    model = replace(model, max_positions=max(model.max_positions, options.seq))
    layout = Layout(dp=options.ranks, dp_shard=options.ranks, zero=int(options.ranks > 1), micro_batch=1)
    job = TrainingJob(global_batch=2 * options.ranks, sequence=options.seq, precision="fp32")
    plan = make_plan(model, layout, job)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{now}, {machine}, {model.name}, {layout.short()}, {job.global_batch} × {job.sequence} tokens, fp32")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), plan, steps=1, resume=False)
        run = TrainOptions(run_dir=Path(folder), steps=options.rounds)
        report(plan, start_ranks(plan, run, partial(measure, lengths=options.lengths)))


if __name__ == "__main__":
    main()
