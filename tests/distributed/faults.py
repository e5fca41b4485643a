"""Bodies of ranks that fail, for the tests of the launcher; also a script that trains until it is stopped."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.parent_process import die_with_parent
from runtime import parallelize, step, trainer, transformer, verify
from runtime.checkpoint_folder import complete_steps
from runtime.data.byte_text import ByteText
from runtime.data.data_options import DataOptions
from runtime.launch import start_ranks, train
from runtime.parameters import parameters_of
from runtime.process_group import process_group
from runtime.run_folder import prepare
from runtime.step import TrainState
from runtime.trainer import TrainOptions
from tests.plans import make_plan, tiny_llama

FAULT_STEP = 3  # in which the fault happens


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


def sleep_on_last_rank(plan: Plan, options: TrainOptions) -> None:
    """The last rank sleeps for ever in the forward pass, with Python's lock; and NCCL, were it here, dumps its records
    where the rank's environment says."""

    def act(state: TrainState) -> None:
        rank = dist.get_rank()
        Path(f"{os.environ['TORCH_FR_DUMP_TEMP_FILE']}{rank}").write_bytes(b"")
        assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
        state.chunks[0].blocks["1"].register_forward_pre_hook(lambda *_: sleep_for_ever())

    _in_fault_step(plan.layout.world_size - 1, act)
    trainer.run(plan, options)


def sleep_for_ever() -> None:
    ctypes.PyDLL(None).sleep(3600)


def stop_rank_one(plan: Plan, options: TrainOptions) -> None:
    """Rank 1 is stopped while it reads data: it obeys no signal but SIGKILL."""
    read, calls = ByteText.batch, itertools.count(1)

    def stop_and_read(*arguments: Any, **options: Any) -> Any:
        if next(calls) == FAULT_STEP and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return read(*arguments, **options)

    ByteText.batch = stop_and_read
    trainer.run(plan, options)


def wait_for_each_other(plan: Plan, options: TrainOptions) -> None:
    """Both ranks wait for a message of the other."""
    with process_group(plan.layout.world_size, options.timeout_seconds):
        dist.recv(torch.zeros(1), 1 - dist.get_rank())


def spoil_weights_of_rank_one(plan: Plan, options: TrainOptions) -> None:
    """Rank 1's weights are not finite from the third step on."""

    def act(state: TrainState) -> None:
        with torch.no_grad():
            parameters_of(state.chunks)[0].fill_(float("nan"))

    _in_fault_step(1, act)
    trainer.run(plan, options)


def compute_slowly_on_rank_one(plan: Plan, options: TrainOptions) -> None:
    """Rank 1 takes three thousand times as long for each activation, as on a core that others use."""

    def slow(silu: Any) -> Any:
        return lambda x: [silu(x) for _ in range(3000)][-1]

    if os.environ["RANK"] == "1":
        _patch(transformer.F, "silu", slow)
    trainer.run(plan, options)


def fill_disk_of_rank_one(plan: Plan, options: TrainOptions) -> None:
    """Rank 1 finds no room for its part of the second checkpoint."""
    write, checkpoints = filesystem._write_item, itertools.count(1)
    save = trainer.checkpoint.save
    full: list[bool] = [False]

    def write_or_not(*arguments: Any, **options: Any) -> Any:
        if full[0] and dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **options)

    def save_second_on_full_disk(*arguments: Any) -> Path:
        full[0] = next(checkpoints) == 2
        return save(*arguments)

    filesystem._write_item = write_or_not
    trainer.checkpoint.save = save_second_on_full_disk
    trainer.run(plan, options)


def deaf_ranks(plan: Plan, options: TrainOptions) -> None:
    """Rank 0 is stopped, rank 1 holds Python's lock, and the others wait for both in a collective."""
    with process_group(plan.layout.world_size, options.timeout_seconds):
        dist.barrier()
        print("in place", flush=True)
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif dist.get_rank() == 1:
            sleep_for_ever()
        dist.barrier()


def _in_fault_step(rank: int, act: Callable[[TrainState], None]) -> None:
    """Have `rank` call `act` just before it trains in step FAULT_STEP."""
    step, calls = trainer.training_step, itertools.count(1)

    def act_and_step(state: TrainState, *arguments: Any, **options: Any) -> Any:
        if next(calls) == FAULT_STEP and dist.get_rank() == rank:
            act(state)
        return step(state, *arguments, **options)

    trainer.training_step = act_and_step


def main() -> None:
    """RUN_DIR: train until stopped, and print each step. RUN_DIR deaf: start `deaf_ranks`. RUN_DIR STEPS DATA: train
    so many steps with a checkpoint every five, and go on with those that are there."""
    die_with_parent()  # of the tests, which may be killed
    options = TrainOptions(run_dir=Path(sys.argv[1]), steps=1_000_000)
    if len(sys.argv) == 4:
        resume = bool(complete_steps(options.run_dir))
        steps, data = int(sys.argv[2]), DataOptions(paths=(sys.argv[3],))
        options = replace(options, steps=steps, data=data, checkpoint_every=5, keep_checkpoints=3, resume=resume)
    if sys.argv[2:] == ["deaf"]:
        plan = small_plan(dp=4)
        prepare(options.run_dir, plan, steps=1, resume=False)
        start_ranks(plan, options, deaf_ranks)
    train(small_plan(pp=2), options, lambda record: print(record["step"], flush=True))


if __name__ == "__main__":
    main()
