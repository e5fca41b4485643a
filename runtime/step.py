"""One optimizer step on one rank: forward and backward, gradient norm, clipping, update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.plan import Plan
from planner.trace_names import UPDATE

from .compilation import Compilation
from .experts import Balance, Router, routers_of, update_selection_bias
from .gradients import clip, complete_gradients, square_sum
from .loss_scale import LossScaler, LossScaling
from .mesh import RankMesh, build_mesh
from .mixed_precision import compute_dtype
from .optimizer import GPT3_ADAM, Adam, build_optimizer, set_learning_rate, update
from .packed_rows import NO_DOCUMENTS, Documents
from .parallelize import build_chunks
from .pipeline import StepRunner, build_runner
from .transformer import Chunk


@dataclass(frozen=True)
class TrainState:
    """What a rank trains: its chunks of the model, how they run, their optimizer, and their loss scale, if any."""

    device: torch.device
    mesh: RankMesh
    chunks: Sequence[Chunk]
    runner: StepRunner
    optimizer: torch.optim.AdamW
    routers: Sequence[Router]  # of experts, found once
    scaler: LossScaler | None = None


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per token and gradient norm, the same on every rank; seconds of the parts after backward.

    `shares` are this rank's parts of loss and squared norm, on its device and not read. `synchronise_seconds` is the
    one wait for all ranks, `optimizer_seconds` norm, clipping and update. `updated` is whether the update was made:
    where loss or norm is not finite on any rank, or the norm above its limit, no rank makes it. `wishes` says of each
    wish whether any rank has it. `overflowed`: the step was left out for the loss scale's sake, and is no failure.
    `loss_scale` is the next step's.
    """

    loss: float
    grad_norm: float
    shares: torch.Tensor
    optimizer_seconds: float
    synchronise_seconds: float
    updated: bool = True
    wishes: tuple[bool, ...] = ()
    overflowed: bool = False
    loss_scale: float | None = None

    @property
    def finite(self) -> bool:
        """Whether loss and norm are finite on every rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def build_state(
    plan: Plan,
    device: torch.device,
    *,
    dtype: torch.dtype,
    seed: int,
    weight_decay: float,
    compilation: Compilation | None = None,
    balance: Balance | None = None,
    weights: Path | None = None,
    adam: Adam = GPT3_ADAM,
    scaling: LossScaling | None = None,
) -> TrainState:
    """This rank's part of the plan, ready for its first step. Parameters are `dtype`; every rank must call it.

    Their first values are drawn, or those of the Hugging Face folder `weights`. Without `scaling` the loss is not
    scaled.
    """
    mesh = mesh_of(plan, device)
    chunks = build_chunks(plan, mesh, device, dtype=dtype, seed=seed, compilation=compilation, weights=weights)
    for router in routers_of(chunks):
        router.balance = balance or Balance()
        router.sequences_per_step = plan.job.global_batch
    return state_of(plan, mesh, chunks, device, dtype=dtype, weight_decay=weight_decay, adam=adam, scaling=scaling)


def mesh_of(plan: Plan, device: torch.device) -> RankMesh:
    """The mesh and process groups of a plan; every rank must call it."""
    model = plan.model
    return build_mesh(
        plan.layout, device.type, tied_embeddings=model.tied_embeddings, experts=model.experts is not None
    )


def state_of(
    plan: Plan,
    mesh: RankMesh,
    chunks: Sequence[Chunk],
    device: torch.device,
    *,
    dtype: torch.dtype,
    weight_decay: float,
    adam: Adam = GPT3_ADAM,
    scaling: LossScaling | None = None,
) -> TrainState:
    """The state that trains `chunks`, whose parameters are `dtype`."""
    runner = build_runner(plan, chunks, mesh, device, compute_dtype(plan.job.precision, dtype))
    optimizer = build_optimizer(chunks, weight_decay=weight_decay, adam=adam, offload=plan.job.offload != "none")
    scaler = LossScaler(scaling, chunks, device) if scaling is not None else None
    return TrainState(device, mesh, chunks, runner, optimizer, routers_of(chunks), scaler)


def training_step(
    state: TrainState,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    documents: Documents = NO_DOCUMENTS,
    *,
    learning_rate: float,
    clip_norm: float | None,
    norm_limit: float = math.inf,
    watch: AbstractContextManager[Any] | None = None,
    wishes: Sequence[bool] = (),
) -> StepResult:
    """One step on this rank's samples [microbatches · micro_batch, sequence / cp]; every rank must call it.

    Where the gradient norm is above `norm_limit` nothing is updated. `watch` is entered around forward, backward and
    what completes the gradients. `wishes` of this rank, as many on each, are summed with loss and norm, so that all
    ranks know them after the same step and no collective is added.
    """
    with watch or nullcontext():
        loss_share = state.runner.step(inputs, targets, documents)
        complete_start = state.runner.clock.point()
        complete_gradients(state.chunks, state.mesh)
        state.runner.clock.add("complete", complete_start)

    start = time.perf_counter()
    scale = 1.0 if state.scaler is None else state.scaler.scale
    shares = torch.stack([loss_share, square_sum(state.chunks) / scale**2])
    sums = torch.cat([shares, *(torch.full_like(shares[:1], float(wish)) for wish in wishes)])
    reduce_start = time.perf_counter()
    dist.all_reduce(sums)
    synchronise_seconds = time.perf_counter() - reduce_start
    norm, update_start = sums[1].sqrt(), state.runner.clock.point()
    clip(state.chunks, norm, clip_norm, scale)
    set_learning_rate(state.optimizer, learning_rate)
    sound = sums.isfinite().all() & (sums[1] <= norm_limit * norm_limit)
    update(state.optimizer, sound)
    state.optimizer.zero_grad()
    state.runner.clock.add("update", update_start, UPDATE)
    update_selection_bias(state.routers, [*state.mesh.groups("dp"), *state.mesh.groups("tp")], sound)
    # The only numbers of a step that the host reads; on a GPU it waits here, once all is issued.
    loss, square, *wished = sums.tolist()
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    seconds = time.perf_counter() - start - synchronise_seconds
    updated = math.isfinite(loss) and math.isfinite(square) and square <= norm_limit * norm_limit
    wanted = tuple(count > 0 for count in wished)
    result = StepResult(loss, math.sqrt(square), shares, seconds, synchronise_seconds, updated, wanted)
    if state.scaler is None:
        return result
    overflowed = state.scaler.note(finite_loss=math.isfinite(loss), finite_gradients=math.isfinite(square))
    return replace(result, overflowed=overflowed, loss_scale=state.scaler.scale)


def sum_over_ranks(value: torch.Tensor) -> float:
    """The sum over all ranks of a float64 scalar."""
    dist.all_reduce(value)
    return value.item()
