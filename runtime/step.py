"""One optimizer step on one rank: forward and backward, gradient norm, clipping, update."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from planner.plan import Plan

from .gradients import clip, complete_gradients, square_sum
from .mesh import RankMesh, build_mesh
from .optimizer import build_optimizer, set_learning_rate
from .parallelize import build_stage
from .pipeline import StepRunner, build_runner
from .transformer import Chunk


@dataclass(frozen=True)
class TrainState:
    """What a rank trains: its stage, how it runs, its optimizer."""

    device: torch.device
    tp: int
    mesh: RankMesh
    chunk: Chunk
    runner: StepRunner
    optimizer: torch.optim.AdamW


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per token and gradient norm, the same on every rank; seconds of the parts after backward.

    `synchronise_seconds` is the one wait for all ranks, `optimizer_seconds` norm, clipping and update.
    """

    loss: float
    grad_norm: float
    optimizer_seconds: float
    synchronise_seconds: float


def build_state(plan: Plan, device: torch.device, *, dtype: torch.dtype, seed: int, weight_decay: float) -> TrainState:
    """This rank's part of the plan, ready for its first step. Parameters are `dtype`; every rank must call it."""
    mesh = build_mesh(plan.layout, device.type, tied_embeddings=plan.model.tied_embeddings)
    chunk = build_stage(plan, mesh, device, dtype=dtype, seed=seed)
    return state_of(plan, mesh, chunk, device, dtype=dtype, weight_decay=weight_decay)


def state_of(
    plan: Plan, mesh: RankMesh, chunk: Chunk, device: torch.device, *, dtype: torch.dtype, weight_decay: float
) -> TrainState:
    """The state that trains `chunk`, whose parameters are `dtype`."""
    activation_dtype = torch.bfloat16 if plan.job.precision == "bf16" else dtype
    runner = build_runner(plan, chunk, mesh, device, activation_dtype)
    optimizer = build_optimizer(chunk, weight_decay=weight_decay)
    return TrainState(device, plan.layout.tp, mesh, chunk, runner, optimizer)


def training_step(
    state: TrainState,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    learning_rate: float,
    clip_norm: float | None,
    watch: AbstractContextManager[Any] | None = None,
) -> StepResult:
    """One step on this dp rank's samples [microbatches · micro_batch, sequence]; every rank must call it.

    `watch` is entered around forward, backward and what completes the gradients.
    """
    with watch or nullcontext():
        loss_share = state.runner.step(inputs, targets)
        complete_start = state.runner.clock.point()
        complete_gradients(state.chunk, state.mesh)
        state.runner.clock.add("complete", complete_start)

    start = time.perf_counter()
    loss_of_rank = torch.tensor(loss_share / state.tp, dtype=torch.float64)
    shares = torch.stack([loss_of_rank, square_sum(state.chunk).cpu()])
    reduce_start = time.perf_counter()
    loss, square = sum_over_ranks(shares, state.device)
    synchronise_seconds = time.perf_counter() - reduce_start
    norm = square**0.5
    if clip_norm is not None:
        clip(state.chunk, norm, clip_norm)
    set_learning_rate(state.optimizer, learning_rate)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    return StepResult(loss, norm, time.perf_counter() - start - synchronise_seconds, synchronise_seconds)


def sum_over_ranks(values: torch.Tensor, device: torch.device) -> list[float]:
    """The sums over all ranks of a vector of float64, in one all-reduce."""
    values = values.to(device)
    dist.all_reduce(values)
    return values.tolist()
