"""Bodies of ranks that fail, for the tests of the launcher; also a script that trains until it is stopped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime import parallelize, step, verify
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


def loss_wrong_on_rank_one(plan: Plan, options: TrainOptions, loss_tokens: int) -> None:
    """The last stage of rank 1 divides its loss by half as many tokens."""
    if os.environ["RANK"] == "1":
        _patch(parallelize, "choose_loss", _halve_tokens)
    verify.run_rank(plan, options, loss_tokens)


def tied_copies_drift(plan: Plan, options: TrainOptions, loss_tokens: int) -> None:
    """Nothing is summed after the backward pass: each end of a pipeline keeps its own part of a tied gradient."""
    _patch(step, "complete_gradients", lambda *_: lambda *_: None)
    verify.run_rank(plan, options, loss_tokens)


def decay_wrong_on_rank_one(plan: Plan, options: TrainOptions, loss_tokens: int) -> None:
    """The optimizer of rank 1 has a weight decay of its own, which one step's loss and gradients do not show."""
    wrong = replace(options, weight_decay=0.2) if os.environ["RANK"] == "1" else options
    verify.run_rank(plan, wrong, loss_tokens)


def not_a_number_on_rank_one(plan: Plan, options: TrainOptions, loss_tokens: int) -> None:
    """The learning rate of rank 1 is no number."""
    wrong = replace(options, learning_rate=float("nan")) if os.environ["RANK"] == "1" else options
    verify.run_rank(plan, wrong, loss_tokens)


def verify_raises_on_rank_one(plan: Plan, options: TrainOptions, loss_tokens: int) -> None:
    """As `raise_on_rank_one`, where `verify` has started the ranks."""
    raise_on_rank_one(plan, options)


def verify_hangs_on_rank_one(plan: Plan, options: TrainOptions, loss_tokens: int) -> None:
    """Rank 1 never comes to the first collective."""
    if os.environ["RANK"] == "1":
        time.sleep(3600)
    verify.run_rank(plan, options, loss_tokens)


def _halve_tokens(choose: Any) -> Any:
    def chosen(chunk: Any, plan: Plan) -> None:
        choose(chunk, plan)
        if chunk.head is not None:
            chunk.head.way = replace(chunk.head.way, tokens_per_step=plan.job.tokens // 2)

    return chosen


def _patch(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """In this process, which is a rank that ends with its run."""
    setattr(module, name, make(getattr(module, name)))


def main() -> None:
    train(
        small_plan(pp=2),
        TrainOptions(run_dir=Path(sys.argv[1]), steps=1_000_000),
        lambda record: print(record["step"], flush=True),
    )


if __name__ == "__main__":
    main()
