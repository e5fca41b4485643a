"""Training loops of plain PyTorch, as one writes them by hand: bare, DDP, FSDP2 and a GPipe pipeline.

A loop's step takes this rank's samples and returns its own part of the mean loss: a plain loop does not send it to
the other ranks, the runtime does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_llama import plain_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from planner.plan import Plan

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
Values = Mapping[str, torch.Tensor]


class Loop(Protocol):
    """One way to train a plan's model. The losses that a step returns add up over the ranks to the mean loss."""

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float: ...


class Accumulating:
    """No pipeline: forward and backward of one microbatch after the other. `between` is entered around each but the
    last, whose backward is the one that sends gradients."""

    def __init__(self, model: nn.Module, plan: Plan, between: Callable[[], Any] = nullcontext) -> None:
        self.model, self.microbatches, self.between = model, plan.microbatches, between
        self.replicas = plan.layout.dp
        self.optimizer = adamw(model)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        total = torch.zeros((), device=inputs.device)
        pieces = zip(inputs.chunk(self.microbatches), targets.chunk(self.microbatches), strict=True)
        for index, (ids, wanted) in enumerate(pieces):
            with nullcontext() if index == self.microbatches - 1 else self.between():
                loss = cross_entropy(self.model(ids), wanted) / self.microbatches
                loss.backward()
            total += loss.detach()
        clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item() / self.replicas


class GPipe:
    """One stage a rank, without data parallelism."""

    def __init__(self, plan: Plan, values: Values, device: torch.device) -> None:
        place, places = dist.get_rank(), plan.layout.pp
        self.first, self.last = place == 0, place == places - 1
        self.model = plain_llama(plan.model, plan.job.sequence, plan.stages[place], values).to(device)
        entering, leaving = self._boundaries(plan)
        # Given what passes between the stages, torch need not run a microbatch to find out.
        stage = PipelineStage(self.model, place, places, device, input_args=entering, output_args=leaving)
        self.schedule = ScheduleGPipe(stage, plan.microbatches, loss_fn=cross_entropy)
        self.microbatches = plan.microbatches
        self.optimizer = adamw(self.model)

    def _boundaries(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        size = (plan.layout.micro_batch, plan.job.sequence)
        hidden = torch.empty(*size, plan.model.hidden_size, device="meta", requires_grad=True)
        ids = torch.empty(size, dtype=torch.int64, device="meta")
        logits = torch.empty(*size, plan.model.vocab_size, device="meta", requires_grad=True)
        return ids if self.first else hidden, logits if self.last else hidden

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        losses: list[torch.Tensor] = []
        entering = (inputs,) if self.first else ()
        leaving = {"target": targets, "losses": losses} if self.last else {}
        self.schedule.step(*entering, **leaving, return_outputs=False)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        square = get_total_norm(gradients) ** 2
        dist.all_reduce(square)
        clip_grads_with_norm_(self.model.parameters(), CLIP_NORM, square.sqrt())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).mean().item() if self.last else 0.0


def bare(plan: Plan, values: Values, device: torch.device) -> Loop:
    return Accumulating(whole_model(plan, values, device), plan)


def ddp(plan: Plan, values: Values, device: torch.device) -> Loop:
    places = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(whole_model(plan, values, device), device_ids=places, gradient_as_bucket_view=True)
    return Accumulating(model, plan, model.no_sync)


def fsdp2(plan: Plan, values: Values, device: torch.device) -> Loop:
    """Block by block, then the root; with one microbatch there is nothing to decide about when gradients are sent."""
    assert plan.microbatches == 1
    model = whole_model(plan, values, device)
    mesh = init_device_mesh(device.type, (plan.layout.dp,))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Accumulating(model, plan)


def gpipe(plan: Plan, values: Values, device: torch.device) -> Loop:
    return GPipe(plan, values, device)


def whole_model(plan: Plan, values: Values, device: torch.device) -> Any:
    return plain_llama(plan.model, plan.job.sequence, plan.stages[0], values).to(device)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups: Sequence[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of all logits of a microbatch at once, [batch, sequence, vocab_size]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
