"""python benchmarks/checkpoint_stall.py [--model demo] [--ranks 2] [--rounds 15]: what a checkpoint costs training.

In one process group, in turns and in an order that changes: a block of steps without a checkpoint, one that begins
with a checkpoint for which training waits, and one that begins with a checkpoint that is written beside it. A block
ends when its checkpoint is whole. Printed are medians over the rounds, of the slowest rank: how long training stood
still, how long until the checkpoint was whole, and what a step of the block took more than a step of the block
without, which counts too that writing takes cores, disk and Python's lock from training; beside it the 95 % interval
of that median.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, where `runtime` is a script

import torch
import torch.distributed as dist
from paired_ratios import values_outside

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.catalogue import resolve_model
from runtime.checkpoint_folder import StateText
from runtime.checkpoint_writer import CheckpointWriter
from runtime.launch import start_ranks
from runtime.process_group import process_group
from runtime.run_folder import prepare
from runtime.step import TrainState, build_state, training_step
from runtime.trainer import TrainOptions
from tests.plans import make_plan

WAYS = ("none", "waiting", "beside")
BLOCK_STEPS = 10
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Block:
    """Of one rank: seconds of the block, and of its checkpoint what training waited and what it took; its bytes."""

    seconds: float
    stall_seconds: float = 0.0
    whole_seconds: float = 0.0
    size_bytes: int = 0


def measure(plan: Plan, options: TrainOptions) -> list[dict[str, list[Block]]]:
    """The blocks of each way, of every rank; `options.steps` is how many rounds."""
    with process_group(plan.layout.world_size, options.timeout_seconds) as device:
        state = build_state(plan, device, dtype=torch.float32, seed=0, weight_decay=0.1)
        writers = {way: _writer(plan, options, state, way == "beside") for way in WAYS[1:]}
        for number in range(WARM_UP_STEPS):
            _train(plan, state, number)
        blocks: dict[str, list[Block]] = {way: [] for way in WAYS}
        for number in range(options.steps):
            turn = number % len(WAYS)
            for way in WAYS[turn:] + WAYS[:turn]:
                blocks[way].append(_block(plan, state, writers.get(way), number + 1))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, blocks)
    return every


def _writer(plan: Plan, options: TrainOptions, state: TrainState, asynchronous: bool) -> CheckpointWriter:
    text = StateText(plan, {})
    run_dir = options.run_dir / ("beside" if asynchronous else "waiting")
    return CheckpointWriter(run_dir, state.chunks, state.optimizer, text, keep=1, asynchronous=asynchronous)


def _block(plan: Plan, state: TrainState, writer: CheckpointWriter | None, number: int) -> Block:
    dist.barrier()
    start = time.perf_counter()
    if writer is not None:
        writer.write(number)
    for step in range(BLOCK_STEPS):
        _train(plan, state, step)
        if writer is not None:
            writer.poll()
    if writer is None:
        return Block(time.perf_counter() - start)
    writer.finish()
    written = writer.written[-1]
    return Block(time.perf_counter() - start, written.stall_seconds, written.seconds, written.size_bytes)


def _train(plan: Plan, state: TrainState, number: int) -> None:
    rows = plan.job.global_batch // plan.layout.dp
    generator = torch.Generator().manual_seed(number)
    size = (rows, plan.job.sequence + 1)
    ids = torch.randint(0, plan.model.vocab_size, size, generator=generator).to(state.device)
    training_step(state, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), learning_rate=1e-4, clip_norm=1.0)


def report(ranks: list[dict[str, list[Block]]]) -> None:
    rounds = len(ranks[0]["none"])

    def slowest(way: str, name: str) -> list[float]:
        return [max(getattr(rank[way][number], name) for rank in ranks) for number in range(rounds)]

    without = slowest("none", "seconds")
    step = statistics.median(without) / BLOCK_STEPS
    size = ranks[0]["waiting"][0].size_bytes
    print(f"a step without a checkpoint: {step * 1e3:.1f} ms; a checkpoint: {size / 2**20:.1f} MiB")
    print(f"a checkpoint every {BLOCK_STEPS} steps, medians of {rounds} rounds")
    print("| checkpoint | training stands still | whole after | a step takes more by | 95 % |")
    print("| --- | --- | --- | --- | --- |")
    for way in WAYS[1:]:
        more = sorted((a - b) / BLOCK_STEPS for a, b in zip(slowest(way, "seconds"), without, strict=True))
        outside = values_outside(rounds)
        low, high = more[outside], more[-1 - outside]
        stall, whole = (statistics.median(slowest(way, name)) for name in ("stall_seconds", "whole_seconds"))
        print(
            f"| {way} | {stall * 1e3:.1f} ms | {whole * 1e3:.1f} ms | {statistics.median(more) * 1e3:.2f} ms | "
            f"{low * 1e3:.2f} to {high * 1e3:.2f} ms |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="Disk to write to; default a temporary folder.")
    options = parser.parse_args()
    model = resolve_model(options.model)
    layout = Layout(dp=options.ranks, dp_shard=options.ranks, zero=int(options.ranks > 1), micro_batch=1)
    plan = make_plan(model, layout, TrainingJob(global_batch=4 * options.ranks, sequence=128, precision="fp32"))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{now}, {machine}, {model.name}, {layout.short()}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run_dir = Path(folder)
        prepare(run_dir, plan, steps=1, resume=False)
        report(start_ranks(plan, TrainOptions(run_dir=run_dir, steps=options.rounds), measure))


if __name__ == "__main__":
    main()
