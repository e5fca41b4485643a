"""Steps of training for the layout tests: through the runtime, and through a plain torch loop beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.model import ModelSpec
from runtime import plain_loop
from runtime.compilation import Compilation
from runtime.data.packing import Packing
from runtime.experts import Balance
from runtime.gradients import square_sum
from runtime.loss_scale import LossScaling
from runtime.packed_rows import own_tensors
from runtime.step import build_state, training_step
from tests.distributed.harness import run_ranks
from tests.plans import make_plan
from tests.thinned import FULL

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
SEED = 7
# Of the sacred test: how many steps, and how far off, relatively. What fp32 can show that float64 has not, one dtype
# taken for another, shows at once.
INVARIANT_STEPS = {torch.float64: 10, torch.float32: 10 if FULL else 3}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
BALANCE = Balance(loss_weight=0.1, bias_rate=0.01)
OF_DOCUMENTS = Balance(bias_rate=0.01)  # the balance loss is of rows, and documents that run alone have none


@dataclass(frozen=True)
class Trajectory:
    """Loss, gradient norm, and gradient norm after clipping of each step."""

    losses: list[float]
    norms: list[float]
    clipped_norms: list[float]


def plan_of(model: ModelSpec, recompute: Any = None, selective: Any = None, **layout: Any) -> Plan:
    """A plan of 8 sequences a step: weights cut over all of dp where zero says so, two sequences a microbatch where
    that leaves enough of them."""
    if layout.get("zero"):
        layout.setdefault("dp_shard", layout.get("dp", 1))
    if layout.get("dp", 1) < 4 and layout.get("schedule") != "dualpipev":
        layout.setdefault("micro_batch", 2)
    job = TrainingJob(global_batch=8, sequence=16, precision="fp32")
    return make_plan(model, Layout(**layout), job, None, recompute, selective)


def tokens_of(plan: Plan, step: int) -> torch.Tensor:
    """[global_batch, sequence + 1] random ids; the same whatever the layout.

    For a masked language model [global_batch, 2, sequence]: of each row 15 % of the ids are targets, and id 0 instead.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    size = (plan.job.global_batch, plan.job.sequence + 1)
    tokens = torch.randint(0, plan.model.vocab_size, size, generator=generator)
    if not plan.model.bidirectional:
        return tokens
    chosen = torch.rand(tokens[:, 1:].shape, generator=generator).argsort() < max(1, round(0.15 * plan.job.sequence))
    return torch.stack([tokens[:, 1:].masked_fill(chosen, 0), tokens[:, 1:].masked_fill(~chosen, -1)], dim=1)


def packed_tokens_of(plan: Plan, step: int, end: int) -> torch.Tensor:
    """The same with ends of documents: a few in most rows, in the first ones where they are easily wrong."""
    tokens = tokens_of(plan, step)
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)) < 3 / tokens.shape[1]] = end
    tokens[0] = tokens[0].masked_fill(tokens[0] == end, end + 1)  # one document
    tokens[1, [0, 5, 6, -2]] = end  # at once, twice in a row, and with the row's last input
    return tokens


def own_samples(plan: Plan, tokens: torch.Tensor, dp_rank: int) -> torch.Tensor:
    """This dp rank's rows: of every microbatch of micro_batch · dp rows, its micro_batch."""
    layout = plan.layout
    return tokens.unflatten(0, (plan.microbatches, layout.dp, layout.micro_batch))[:, dp_rank].flatten(0, 1)


def own_tokens(plan: Plan, tokens: torch.Tensor, dp_rank: int, cp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a rank: of its samples the piece that is its cp rank's, or under the ring the two pieces of
    2·cp that are as far from the front as from the end."""
    own, cp = own_samples(plan, tokens, dp_rank), plan.layout.cp
    pair = own.unbind(1) if own.ndim == 3 else (own[:, :-1], own[:, 1:])
    if plan.layout.cp_style == "ring":
        inputs, targets = (
            torch.cat([ids.chunk(2 * cp, dim=1)[chunk] for chunk in (cp_rank, 2 * cp - 1 - cp_rank)], dim=1)
            for ids in pair
        )
    else:
        inputs, targets = (ids.chunk(cp, dim=1)[cp_rank] for ids in pair)
    return inputs.contiguous(), targets.contiguous()


def run_plan(
    plan: Plan,
    steps: int,
    dtype: torch.dtype,
    clip_norm: float | None = None,
    compilation: Compilation | None = None,
    packing: Packing | None = None,
    scaling: LossScaling | None = None,
) -> Trajectory:
    """Train through the runtime; on every rank of an initialised process group. All ranks return the same."""
    state = build_state(
        plan,
        torch.device("cpu"),
        dtype=dtype,
        seed=SEED,
        weight_decay=WEIGHT_DECAY,
        balance=BALANCE if packing is None else OF_DOCUMENTS,
        compilation=compilation,
        scaling=scaling,
    )
    losses, norms, clipped_norms = [], [], []

    def read_clipped_norm(*_: object) -> None:
        square = square_sum(state.chunks)
        dist.all_reduce(square)
        clipped_norms.append(square.sqrt().item())

    if clip_norm is not None:
        state.optimizer.register_step_pre_hook(read_clipped_norm)
    for step in range(steps):
        here = state.mesh.coordinate
        if packing is None:
            samples: tuple[Any, ...] = own_tokens(plan, tokens_of(plan, step), here.dp, here.cp)
        else:
            own = own_samples(plan, packed_tokens_of(plan, step, packing.end), here.dp)
            samples = own_tensors(own.numpy(), packing, plan.layout, here.cp, state.device)
        result = training_step(state, *samples, learning_rate=LEARNING_RATE, clip_norm=clip_norm)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return Trajectory(losses, norms, clipped_norms)


def run_plan_in(
    plan: Plan, steps: dict[torch.dtype, int], packing: Packing | None = None
) -> dict[torch.dtype, Trajectory]:
    """`run_plan` in each dtype for so many steps."""
    return {dtype: run_plan(plan, count, dtype, packing=packing) for dtype, count in steps.items()}


def run_plain(
    plan: Plan, steps: int, dtype: torch.dtype, clip_norm: float | None = None, packing: Packing | None = None
) -> Trajectory:
    """The same steps in one process, with nothing of ours but the modules; with `packing` each document alone."""
    tokens = (
        tokens_of(plan, step) if packing is None else packed_tokens_of(plan, step, packing.end) for step in range(steps)
    )
    found = plain_loop.run_plain(
        plan.model,
        tokens,
        dtype=dtype,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        seed=SEED,
        clip_norm=clip_norm,
        balance=BALANCE if packing is None else OF_DOCUMENTS,
        packing=packing,
    )
    return Trajectory(found.losses, found.norms, found.clipped_norms)


@cache
def _reference(model: ModelSpec, global_batch: int, sequence: int, dtype: torch.dtype) -> Trajectory:
    job = TrainingJob(global_batch=global_batch, sequence=sequence, precision="fp32")
    found = run_plain(make_plan(model, Layout(), job), INVARIANT_STEPS[dtype], dtype)
    # Equal numbers would prove little if the weights never moved.
    assert len(set(found.norms)) == INVARIANT_STEPS[dtype]
    assert found.losses[0] != pytest.approx(found.losses[1], rel=1e-4)
    return found


def require_the_layout_changes_nothing(plan: Plan) -> None:
    """The sacred test: loss and gradient norm of every step are those of plain torch in one process."""
    ranks = run_ranks(run_plan_in, plan.layout.world_size, plan, INVARIANT_STEPS, timeout_seconds=180)
    for dtype, tolerance in TOLERANCE.items():
        expected = _reference(plan.model, plan.job.global_batch, plan.job.sequence, dtype)
        for trajectory in (ranks[0][dtype], ranks[-1][dtype]):
            assert trajectory.losses == pytest.approx(expected.losses, rel=tolerance)
            assert trajectory.norms == pytest.approx(expected.norms, rel=tolerance)
