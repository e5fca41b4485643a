"""Bodies of ranks that fail, for the tests of the launcher; also a script that trains until it is stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime.launch import train
from runtime.process_group import process_group
from runtime.trainer import TrainOptions
from tests.plans import make_plan, tiny_llama


def small_plan(**layout: Any) -> Plan:
    """A model of bytes that takes milliseconds a step."""
    model = tiny_llama(vocab_size=256, layers=2)
    job = TrainingJob(global_batch=8, sequence=16, precision="fp32")
    return make_plan(model, Layout(**{"micro_batch": 2, **layout}), job)


def raise_on_rank_one(plan: Plan, options: TrainOptions) -> None:
    """Rank 1 raises while rank 0 waits for it in a collective."""
    with process_group(plan.layout.world_size, options.timeout_seconds):
        if dist.get_rank() == 1:
            raise ArithmeticError("the seventh bit fell off")
        dist.barrier()


def main() -> None:
    train(
        small_plan(pp=2),
        TrainOptions(run_dir=Path(sys.argv[1]), steps=1_000_000),
        lambda record: print(record["step"], flush=True),
    )


if __name__ == "__main__":
    main()
