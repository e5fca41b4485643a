"""One step's forward and backward passes: microbatches accumulated, or pipelined over the pp axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from planner.plan import Plan

from .clock import Clock
from .loss import Loss, loss_context, plain_loss, token_loss
from .mesh import RankMesh
from .transformer import Chunk

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class StepRunner(Protocol):
    """Runs the microbatches of a step.

    `clock` sums under forward, backward, schedule (the whole) and, with pp > 1, reduce (gradients over dp
    after the last backward).
    """

    clock: Clock

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Forward and backward of this dp rank's samples [microbatches · micro_batch, sequence].

        Gradients end up summed over microbatches and dp. Returns this dp rank's share of the step's loss in
        nats on the last stage, 0.0 on others.
        """
        ...

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """The same loss share, without gradients."""
        ...


def build_runner(plan: Plan, chunk: Chunk, mesh: RankMesh, device: torch.device, dtype: torch.dtype) -> StepRunner:
    """The runner of this rank. `dtype` is that of the activations that cross stage boundaries."""
    if plan.layout.pp > 1:
        return PipelineRunner(plan, chunk, mesh, device, dtype)
    return AccumulationRunner(plan, chunk, device)


class AccumulationRunner:
    """pp = 1: forward and backward of one microbatch after the other."""

    def __init__(self, plan: Plan, chunk: Chunk, device: torch.device) -> None:
        self.clock = Clock(device)
        self.chunk = chunk
        self.microbatches = plan.microbatches
        self.zero = plan.layout.zero
        self.tp = plan.layout.tp
        self.loss = _timed(token_loss(plan.job.tokens), self.clock)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        start, total = self.clock.point(), 0.0
        with loss_context(self.tp):
            for index, (ids, wanted) in enumerate(self._microbatches(inputs, targets)):
                self._set_sync(last=index == self.microbatches - 1)
                forward = self.clock.point()
                logits = self.chunk(ids)
                self.clock.add("forward", forward)
                loss = self.loss(logits, wanted)
                backward = self.clock.point()
                loss.backward()
                self.clock.add("backward", backward)
                total += plain_loss(loss)
        self.clock.add("schedule", start)
        return total

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.no_grad(), loss_context(self.tp):
            losses = [self.loss(self.chunk(ids), wanted) for ids, wanted in self._microbatches(inputs, targets)]
        _reshard(self.chunk)
        self.clock.read()
        return sum(map(plain_loss, losses))

    def _microbatches(self, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        return zip(inputs.chunk(self.microbatches), targets.chunk(self.microbatches), strict=True)

    def _set_sync(self, *, last: bool) -> None:
        """When gradients are reduced and gathered parameters freed; the zero levels are defined here.

        0, 1: reduced once, after the last microbatch; parameters gathered once. 2: gradients reduced, and so
        kept sharded, after every microbatch; parameters gathered once. 3: both after every microbatch.
        """
        if isinstance(self.chunk, FSDPModule):
            self.chunk.set_is_last_backward(last)
            self.chunk.set_requires_gradient_sync(last or self.zero >= 2)
            self.chunk.set_reshard_after_backward(last or self.zero == 3)


class TimedStage(PipelineStage):
    """A pipeline stage that books its forward, backward and gradient reduction on a clock."""

    clock: Clock

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        start = self.clock.point()
        output = super().forward_one_chunk(*args, **kwargs)
        self.clock.add("forward", start)
        return output

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        start = self.clock.point()
        super().backward_one_chunk(*args, **kwargs)
        self.clock.add("backward", start)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if not self.has_backward:
            return
        start = self.clock.point()
        super().perform_reduce_grad(grad_scale_factor)
        self.clock.add("reduce", start)


class PipelineRunner:
    """pp > 1: one stage a rank, under torch's GPipe or 1F1B schedule."""

    def __init__(self, plan: Plan, chunk: Chunk, mesh: RankMesh, device: torch.device, dtype: torch.dtype) -> None:
        self.clock = Clock(device)
        self.chunk = chunk
        self.tp = plan.layout.tp
        rank, stages = mesh.coordinate.pp, plan.layout.pp
        self.first, self.last = rank == 0, rank == stages - 1
        inputs, outputs = _boundaries(plan, mesh, dtype)
        self.stage = TimedStage(
            chunk, rank, stages, device, input_args=inputs, output_args=outputs, group=mesh.axis("pp").get_group()
        )
        self.stage.clock = self.clock
        self.schedule = SCHEDULES[plan.layout.schedule](
            self.stage,
            plan.microbatches,
            loss_fn=_timed(token_loss(plan.job.tokens), self.clock),
            scale_grads=False,  # the loss is divided by the tokens of the step already
        )

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        start = self.clock.point()
        total = self._run(self.schedule.step, inputs, targets)
        self.clock.add("schedule", start)
        return total

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.no_grad():
            total = self._run(self.schedule.eval, inputs, targets)
        _reshard(self.chunk)
        self.clock.read()
        return total

    def _run(self, run: Callable[..., Any], inputs: torch.Tensor, targets: torch.Tensor) -> float:
        losses: list[torch.Tensor] = []
        with loss_context(self.tp):
            run(
                *((inputs,) if self.first else ()),
                target=targets if self.last else None,
                losses=losses if self.last else None,
                return_outputs=False,  # else the logits of every microbatch stay in memory
            )
        return sum(map(plain_loss, losses))


def _boundaries(plan: Plan, mesh: RankMesh, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and leaves this rank's stage, on the meta device.

    Given to torch so that it need not run a microbatch to find out. Hidden states are marked as requiring
    gradients, without which no gradient is sent back; under sequence parallelism they are sequence shards.
    """
    layout, model, sequence = plan.layout, plan.model, plan.job.sequence
    local_sequence = sequence // layout.tp if layout.sequence_parallel else sequence
    size = (layout.micro_batch, local_sequence, model.hidden_size)
    hidden = torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
    ids = torch.empty((layout.micro_batch, sequence), dtype=torch.int64, device="meta")
    logits = torch.empty(
        (layout.micro_batch, sequence, model.vocab_size), dtype=dtype, device="meta", requires_grad=True
    )
    rank = mesh.coordinate.pp
    return (ids if rank == 0 else hidden), (logits if rank == layout.pp - 1 else hidden)


def _timed(loss: Loss, clock: Clock) -> Loss:
    """The loss, its seconds booked as forward."""

    def timed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        start = clock.point()
        value = loss(logits, targets)
        clock.add("forward", start)
        return value

    return timed


def _reshard(chunk: Chunk) -> None:
    """Free what an evaluation gathered; there is no backward pass that would."""
    for module in chunk.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
