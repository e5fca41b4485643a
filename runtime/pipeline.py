"""One step's forward and backward passes: microbatches accumulated, or pipelined over the pp axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class
from torch.distributed.pipelining.stage import _RecvInfo

from planner.layout import Layout
from planner.plan import Plan
from profiles.traced_model import TracedModel

from .clock import Clock
from .early_receives import BACKWARD, FORWARD, EarlyReceives
from .mesh import RankMesh
from .packed_rows import NO_DOCUMENTS, Documents
from .replicas import Replicas
from .split_backward import TORCH_IS_RIGHT, graph_of, weights_half
from .transformer import Chunk

# Our names of the schedules -> torch's.
SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "looped-bfs": "LoopedBFS",
    "zb1p": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


class StepRunner(Protocol):
    """Runs the microbatches of a step.

    `clock` sums under forward (the loss with it), backward, schedule (the whole) and, with pp > 1, reduce (gradients
    over dp after the last backward).
    """

    clock: Clock

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents = NO_DOCUMENTS) -> torch.Tensor:
        """Forward and backward of this rank's samples [microbatches · micro_batch, sequence / cp].

        Gradients end up summed over microbatches, dp and cp. Returns this rank's share of the step's loss in nats, a
        float64 scalar on the device; the shares of all ranks add up to it.
        """
        ...

    def evaluate(
        self, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents = NO_DOCUMENTS
    ) -> torch.Tensor:
        """The same loss share, without gradients."""
        ...


def build_runner(
    plan: Plan, chunks: Sequence[Chunk], mesh: RankMesh, device: torch.device, dtype: torch.dtype
) -> StepRunner:
    """The runner of this rank. `dtype` is that of the activations that cross stage boundaries."""
    pipelined, experts = plan.layout.pp > 1, mesh.expert_mesh is not None
    alone = plan.layout.sums_alone(plan.job.precision, experts=experts)
    replicas = Replicas(chunks, mesh, overlap=not pipelined) if alone else None
    if pipelined:
        return PipelineRunner(plan, chunks, mesh, device, dtype, replicas)
    return AccumulationRunner(plan, chunks[0], device, replicas)


class AccumulationRunner:
    """pp = 1: forward and backward of one microbatch after the other."""

    def __init__(self, plan: Plan, chunk: Chunk, device: torch.device, replicas: Replicas | None) -> None:
        self.clock = Clock(device)
        self.chunk = chunk
        self.replicas = replicas
        # Found once: torch's setters would walk all modules, twice a microbatch.
        self.sharded = [module for module in chunk.modules() if isinstance(module, FSDPModule)]
        self.microbatches = plan.microbatches
        self.zero = plan.layout.zero

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents = NO_DOCUMENTS) -> torch.Tensor:
        start, losses = self.clock.point(), []
        for index, (ids, wanted, of) in enumerate(self._microbatches(inputs, targets, documents)):
            last = index == self.microbatches - 1
            self._set_sync(last=last)
            forward = self.clock.point()
            loss = self.chunk(ids, wanted, **of.named())
            self.clock.add("forward", forward, f"0F{index}")
            backward = self.clock.point()
            if last and self.replicas is not None:
                self.replicas.begin()
            loss.backward()
            if last and self.replicas is not None:
                self.replicas.finish()
            self.clock.add("backward", backward, f"0B{index}")
            losses.append(loss.detach())
        self.clock.add("schedule", start)
        return _sum(losses, inputs.device)

    def evaluate(
        self, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents = NO_DOCUMENTS
    ) -> torch.Tensor:
        with evaluating():
            losses = [
                self.chunk(ids, wanted, **of.named())
                for ids, wanted, of in self._microbatches(inputs, targets, documents)
            ]
        _reshard([self.chunk])
        self.clock.read()
        return _sum(losses, inputs.device)

    def _microbatches(self, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents) -> Any:
        parts = self.microbatches
        _tell_count([self.chunk], documents)
        return zip(inputs.chunk(parts), targets.chunk(parts), documents.chunk(parts), strict=True)

    def _set_sync(self, *, last: bool) -> None:
        """When gradients are reduced and gathered parameters freed; the zero levels are defined here.

        0, 1: reduced once, after the last microbatch; parameters gathered once. 2: gradients reduced, and so
        kept sharded, after every microbatch; parameters gathered once. 3: both after every microbatch.
        """
        if isinstance(self.chunk, FSDPModule):
            self.chunk.set_is_last_backward(last)
        for module in self.sharded:
            module.set_requires_gradient_sync(last or self.zero >= 2, recurse=False)
            module.set_reshard_after_backward(last or self.zero == 3, recurse=False)


class TimedStage(PipelineStage):
    """A pipeline stage that books its forward, backward and gradient reduction on a clock.

    Actions are named as torch writes them ([Note: Action lists] in planner/schedule.py). `frees` are the modules whose
    weights go after each backward; torch's own stage keeps all of them until the gradients are reduced. Where gradients
    are `summed_later`, by `Replicas` for all stages of the rank at once, torch reduces nothing and nothing is booked.
    """

    clock: Clock
    frees: Sequence[FSDPModule] = ()
    summed_later: bool = False
    early: EarlyReceives | None = None

    def receives(self, kind: str, microbatch: int) -> list[dist.P2POp]:
        """torch's operations that receive the input, or the gradient, of a microbatch."""
        if kind == FORWARD:
            return super().get_fwd_recv_ops(microbatch)
        return super().get_bwd_recv_ops(microbatch)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._receive(FORWARD, fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._receive(BACKWARD, bwd_chunk_id)

    def _receive(self, kind: str, microbatch: int) -> list[dist.P2POp]:
        if self.early is None:
            return self.receives(kind, microbatch)
        self.early.post()
        return []

    def expect_gradients(self) -> None:
        """Mark what is received as requiring gradients; torch 2.11 does so in its first step alone, be it an
        evaluation, and no stage sends a gradient back for what does not."""
        for info in chain.from_iterable(self.args_recv_info.values()):
            if isinstance(info, _RecvInfo) and info.buffer is not None:
                info.buffer.requires_grad_()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 has a rank of two neighbouring stages send to itself first, which gloo does not do.
        return [each for each in super()._get_init_p2p_neighbors_ops() if each.group_peer != self.group_rank]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if self.early is not None:
            self.early.wait(self.stage_index, FORWARD, fwd_chunk_id)
        start = self.clock.point()
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self.clock.add("forward", start, f"{self.stage_index}F{fwd_chunk_id}")
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if self.early is not None:
            self.early.wait(self.stage_index, BACKWARD, bwd_chunk_id)
        start = self.clock.point()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self.clock.add("backward", start, f"{self.stage_index}{'B' if full_backward else 'I'}{bwd_chunk_id}")

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False):
        if backward_type == "weight" and not TORCH_IS_RIGHT:
            weights_half(self.submod.parameters(), bwd_kwargs["param_groups"])
            return (), None
        if not self.frees:
            held = graph_of(bwd_kwargs["stage_output"]) if backward_type == "input" and not TORCH_IS_RIGHT else None
            gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            for group in groups or ():
                group["held"] = held  # until the weights' half
            return gradients, groups
        assert backward_type == "full", "a backward in halves loses gradients of weights that are freed"
        assert isinstance(self.submod, FSDPModule)
        self.submod.set_is_last_backward(False)
        self.submod.set_reshard_after_backward(False)
        self.submod.set_requires_gradient_sync(False)
        for module in self.frees:
            module.set_reshard_after_backward(True, recurse=False)
        return stage_backward(**bwd_kwargs), None

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        start = self.clock.point()
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.clock.add("backward", start, f"{self.stage_index}W{bwd_chunk_id}")

    def get_local_bwd_output(self, mb_index: int) -> Any:
        # torch 2.13 hands gradients from stage to stage of one rank in an evaluation too, and finds none.
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if not self.has_backward:
            return
        start = self.clock.point()
        super().perform_reduce_grad(grad_scale_factor)
        if not self.summed_later:
            self.clock.add("reduce", start, f"{self.stage_index}R")


class PipelineRunner:
    """pp > 1: one chunk a rank or several, under a schedule of torch's."""

    def __init__(
        self,
        plan: Plan,
        chunks: Sequence[Chunk],
        mesh: RankMesh,
        device: torch.device,
        dtype: torch.dtype,
        replicas: Replicas | None,
    ) -> None:
        self.clock = Clock(device)
        self.chunks, self.replicas = chunks, replicas
        self.early: EarlyReceives | None = None
        layout = plan.layout
        places = layout.stages_of(mesh.coordinate.pp)
        self.first, self.last = 0 in places, layout.stages - 1 in places
        self.stages = [
            self._stage(plan, chunk, place, mesh, device, dtype) for chunk, place in zip(chunks, places, strict=True)
        ]
        for stage, chunk, place in zip(self.stages, chunks, places, strict=True):
            if plan.stages[place].reshard:
                stage.frees = [each for each in chunk.modules() if isinstance(each, FSDPModule) and each is not chunk]
        schedule = get_schedule_class(SCHEDULES[layout.schedule])
        # The last chunk's output is the loss, divided by the tokens of the step already.
        options: dict[str, Any] = {"loss_fn": _is_the_loss, "scale_grads": False}
        self.schedule: PipelineScheduleSingle | PipelineScheduleMulti
        if issubclass(schedule, PipelineScheduleSingle):
            self.schedule = schedule(self.stages[0], plan.microbatches, **options)
        else:
            self.schedule = schedule(self.stages, plan.microbatches, **options)
        if device.type == "cpu":  # [Note: Early receives]
            self.early = EarlyReceives(self.schedule, self.stages)
            for stage in self.stages:
                stage.early = self.early

    def _stage(
        self, plan: Plan, chunk: Chunk, place: int, mesh: RankMesh, device: torch.device, dtype: torch.dtype
    ) -> TimedStage:
        inputs, outputs = _boundaries(plan, place, dtype)
        group, stages = mesh.axis("pp").get_group(), plan.layout.stages
        stage = TimedStage(chunk, place, stages, device, input_args=inputs, output_args=outputs, group=group)
        stage.clock, stage.summed_later = self.clock, self.replicas is not None
        return stage

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents = NO_DOCUMENTS) -> torch.Tensor:
        start = self.clock.point()
        total = self._run(self.schedule.step, inputs, targets, documents)
        if self.replicas is not None:
            reduce = self.clock.point()
            self.replicas.finish()
            self.clock.add("reduce", reduce, f"{self.stages[0].stage_index}R")
        self.clock.add("schedule", start)
        return total

    def evaluate(
        self, inputs: torch.Tensor, targets: torch.Tensor, documents: Documents = NO_DOCUMENTS
    ) -> torch.Tensor:
        with evaluating():
            total = self._run(self.schedule.eval, inputs, targets, documents)
        for stage in self.stages:
            stage.expect_gradients()
        _reshard(self.chunks)
        self.clock.read()
        return total

    def _run(
        self, run: Callable[..., Any], inputs: torch.Tensor, targets: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        _tell_count(self.chunks, documents)
        if self.early is not None:
            self.early.begin()
        run(
            *((inputs,) if self.first else ()),
            # For the chunk that has the head; torch wants them as `target` too, to call its loss function.
            **({"targets": targets} if self.last else {}),
            **documents.named(),  # every stage needs them, and none is sent them
            **({"source": inputs} if self.chunks[0].reads_source else {}),
            target=targets if self.last else None,
            losses=losses if self.last else None,
            return_outputs=False,
        )
        return _sum(losses, inputs.device)


@contextmanager
def evaluating() -> Iterator[None]:
    """Without gradients, and uncompiled: other code would have to be compiled, for a few batches."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _is_the_loss(output: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
    return output


def _boundaries(plan: Plan, place: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and leaves the stage at `place`, on the meta device.

    Given to torch so that it need not run a microbatch to find out. Hidden states are marked as requiring
    gradients, without which no gradient is sent back; under sequence parallelism they are sequence shards.
    """
    if isinstance(plan.model, TracedModel):
        return _module_boundaries(plan.model, plan.layout, place, dtype)
    layout, model, sequence = plan.layout, plan.model, plan.job.sequence // plan.layout.cp
    local_sequence = sequence // layout.tp if layout.sequence_parallel else sequence
    size = (layout.micro_batch, local_sequence, model.hidden_size)
    hidden = torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
    ids = torch.empty((layout.micro_batch, sequence), dtype=torch.int64, device="meta")
    loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True)
    return (ids if place == 0 else hidden), (loss if place == layout.stages - 1 else hidden)


def _tell_count(chunks: Sequence[Chunk], documents: Documents) -> None:
    """Divide the loss by the tokens of the step that count, where not all do."""
    for head in (chunk.head for chunk in chunks if chunk.head is not None):
        if head.way.counted is not documents.tokens:
            head.way = replace(head.way, counted=documents.tokens)


def _module_boundaries(
    model: TracedModel, layout: Layout, place: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a module of another package: its inputs, the stream between its blocks, its loss."""
    stream = torch.empty((layout.micro_batch, *model.stream_shape), dtype=dtype, device="meta", requires_grad=True)
    inputs = torch.empty(
        (layout.micro_batch, *model.input_shape), dtype=getattr(torch, model.input_dtype), device="meta"
    )
    loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True)
    return (inputs if place == 0 else stream), (loss if place == layout.stages - 1 else stream)


def _sum(losses: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not losses:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([loss.detach() for loss in losses]).sum(dtype=torch.float64)


def _reshard(chunks: Sequence[Chunk]) -> None:
    """Free what an evaluation gathered; there is no backward pass that would."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()
