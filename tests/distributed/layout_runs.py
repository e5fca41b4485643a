"""Steps of training for the layout tests: through the runtime, and through a plain torch loop beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from planner.plan import Plan
from runtime.compilation import Compilation
from runtime.gradients import square_sum
from runtime.parameters import initialise
from runtime.step import build_state, training_step
from runtime.transformer import build_chunk

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
SEED = 7


@dataclass(frozen=True)
class Trajectory:
    """Loss, gradient norm, and gradient norm after clipping of each step."""

    losses: list[float]
    norms: list[float]
    clipped_norms: list[float]


def tokens_of(plan: Plan, step: int) -> torch.Tensor:
    """[global_batch, sequence + 1] random ids; the same whatever the layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = (plan.job.global_batch, plan.job.sequence + 1)
    return torch.randint(0, plan.model.vocab_size, size, generator=generator)


def own_samples(plan: Plan, tokens: torch.Tensor, dp_rank: int) -> torch.Tensor:
    """This dp rank's rows: of every microbatch of micro_batch · dp rows, its micro_batch."""
    layout = plan.layout
    return tokens.view(plan.microbatches, layout.dp, layout.micro_batch, -1)[:, dp_rank].flatten(0, 1)


def run_plan(
    plan: Plan,
    steps: int,
    dtype: torch.dtype,
    clip_norm: float | None = None,
    compilation: Compilation | None = None,
) -> Trajectory:
    """Train through the runtime; on every rank of an initialised process group. All ranks return the same."""
    state = build_state(
        plan, torch.device("cpu"), dtype=dtype, seed=SEED, weight_decay=WEIGHT_DECAY, compilation=compilation
    )
    losses, norms, clipped_norms = [], [], []

    def read_clipped_norm(*_: object) -> None:
        square = square_sum(state.chunks)
        dist.all_reduce(square)
        clipped_norms.append(square.sqrt().item())

    if clip_norm is not None:
        state.optimizer.register_step_pre_hook(read_clipped_norm)
    for step in range(steps):
        tokens = own_samples(plan, tokens_of(plan, step), state.mesh.coordinate.dp)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        result = training_step(state, inputs, targets, learning_rate=LEARNING_RATE, clip_norm=clip_norm)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return Trajectory(losses, norms, clipped_norms)


def run_plan_in(plan: Plan, steps: dict[torch.dtype, int]) -> dict[torch.dtype, Trajectory]:
    """`run_plan` in each dtype for so many steps."""
    return {dtype: run_plan(plan, count, dtype) for dtype, count in steps.items()}


def run_plain(plan: Plan, steps: int, dtype: torch.dtype, clip_norm: float | None = None) -> Trajectory:
    """The same steps with nothing of ours but the module: whole batch, mean loss, torch's clipping and AdamW."""
    model = plan.model
    chunk = build_chunk(model, plan.stages[0]).to(dtype).to_empty(device="cpu")
    chunk.tie()
    initialise([chunk], layers=model.layers, seed=SEED)
    groups = [
        {"params": [p for p in chunk.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in chunk.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, clipped_norms = [], [], []
    for step in range(steps):
        tokens = tokens_of(plan, step)
        logits = chunk(tokens[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, model.vocab_size), tokens[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(chunk.parameters(), clip_norm or float("inf"))
        clipped_norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in chunk.parameters() if p.grad is not None]).item()
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return Trajectory(losses, norms, clipped_norms)
