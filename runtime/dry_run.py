"""One rank of a plan's whole world in one process: an optimizer step without numbers, and what it holds in memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from planner.plan import Plan
from profiles.input_error import InputError
from profiles.traced_model import TracedModel

from .checkpoint import moments_of
from .clock import Clock
from .live_bytes import LiveBytes
from .mesh import build_mesh
from .parallelize import allocate_chunks, shape_chunks
from .parameters import parameters_of
from .pipeline import PipelineRunner, StepRunner
from .rotary import rotary_tables
from .stand_ins import gpu_norms
from .step import TrainState, state_of, training_step

try:  # torch 2.12; before it stages that know their metadata do not vote
    from torch.distributed.pipelining._utils import InferenceMode
except ImportError:
    InferenceMode = None

DEVICE = torch.device("cpu")  # stock wheels without CUDA refuse fake tensors of another


@dataclass(frozen=True)
class DryRun:
    """The peak of one rank over a step, and its parts at that moment, in bytes of tensors.

    `parts` are named as the planner's: weights, gradients, optimizer, gathered_weights, activations, logits,
    pipeline_buffers; transient is what only passes, inputs the token ids. Left out is what is no tensor of the
    training loop: the device's context, communicators, what an allocator loses, cuBLAS workspaces.
    """

    rank: int
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


def check_plan(plan: Plan) -> None:
    """Raise InputError for a plan of which no rank can run alone."""
    if plan.model.experts is not None:
        raise InputError(
            f"{plan.model.name} cannot run dry",
            where="plan: model.experts",
            expected="a model without experts, whose tensors have the same shapes whatever the numbers",
            got=f"{plan.model.experts.number} experts: how many tokens each rank gets is known only when all route",
            hint="cli.py verify runs its ranks at reduced size",
        )
    if plan.job.offload != "none":
        raise InputError(
            "an offloading plan cannot run dry",
            where="plan: job.offload",
            expected="no offload: all tensors of a dry run lie on one device",
            got=plan.job.offload,
        )


def dry_run(
    plan: Plan,
    rank: int,
    *,
    fake: bool = True,
    gpu_kernels: bool = False,
    on_forward: Callable[[], None] | None = None,
) -> DryRun:
    """Run an optimizer step of `rank` as the trainer does, with collectives that move nothing; not the first step, so
    the optimizer's state is there from its start.

    With `fake` tensors have shapes and no memory, so that a rank of any size runs on a laptop; without, they are
    real ones of the CPU. `gpu_kernels` (of fake tensors only): keep what a GPU's kernels keep where a CPU's differ.
    `on_forward` is called after each of the `forwards(plan)` forward passes. To be called once a process: torch caches
    what it learns of the process groups.
    """
    assert fake or not gpu_kernels, "stand-ins compute nothing"
    with in_its_world(plan, rank), ExitStack() as stack:
        mesh = build_mesh(plan.layout, DEVICE.type, tied_embeddings=plan.model.tied_embeddings)
        chunks = shape_chunks(plan, mesh, dtype=torch.float32)
        live = LiveBytes("transient")
        stack.enter_context(quiet_metadata())
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if gpu_kernels:
            stack.enter_context(gpu_norms())
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # torch's own, about itself
        stack.enter_context(live)
        allocate_chunks(chunks, DEVICE)  # first values do not matter, and to cut them takes longer than a step
        state = state_of(plan, mesh, chunks, DEVICE, dtype=torch.float32, weight_decay=0.1)
        skip_vote(state.runner)
        with live.during("optimizer"):
            for parameter in parameters_of(chunks):
                moments_of(state.optimizer, parameter)
        watch = _Watch(state, live, on_forward or (lambda: None))
        with live.during("inputs"):
            inputs, targets = no_tokens(plan, DEVICE)
        gc.collect()
        start = live.mark()
        training_step(state, inputs, targets, learning_rate=1e-3, clip_norm=1.0)
        watch.book_buffers()
        return DryRun(rank, live.peak(start))


def forwards(plan: Plan) -> int:
    """Forward passes of a chunk in a dry run."""
    return plan.microbatches * plan.layout.virtual_stages


@contextmanager
def in_its_world(plan: Plan, rank: int) -> Iterator[None]:
    """This process alone as `rank` of the plan's ranks: the process group is whole, its collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.layout.world_size)
    rotary_tables.cache_clear()
    try:
        yield
    finally:
        rotary_tables.cache_clear()
        dist.destroy_process_group()


def skip_vote(runner: StepRunner) -> None:
    """Stages agree on static metadata by messages, which nobody answers here; the trainer's are static."""
    if InferenceMode is None:
        return
    static = InferenceMode.STATIC

    def warm_up(stages: list[Any], *_: Any, **__: Any) -> None:
        for stage in stages:
            stage._inference_mode = static

    if isinstance(runner, PipelineRunner):
        runner.schedule._warmup_p2p = warm_up  # type: ignore[method-assign]


def no_tokens(plan: Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a rank's step, all of them token 0."""
    model = plan.model
    if isinstance(model, TracedModel):
        samples = plan.microbatches * plan.layout.micro_batch
        shapes = ((model.input_shape, model.input_dtype), (model.target_shape, model.target_dtype))
        inputs, targets = (
            torch.zeros((samples, *shape), dtype=getattr(torch, dtype), device=device) for shape, dtype in shapes
        )
        return inputs, targets
    size = (plan.microbatches * plan.layout.micro_batch, plan.job.sequence // plan.layout.cp)
    return torch.zeros(size, dtype=torch.int64, device=device), torch.zeros(size, dtype=torch.int64, device=device)


class _Watch:
    """Books what the state holds, when it holds it: after each forward, each backward and the optimizer's update."""

    def __init__(self, state: TrainState, live: LiveBytes, on_forward: Callable[[], None]) -> None:
        self.state, self.live, self._on_forward = state, live, on_forward
        self._fsdp = [group for module in _fsdp_modules(state.chunks) for group in _parameter_groups(module)]
        for chunk in state.chunks:
            chunk.register_forward_pre_hook(lambda *_: self._set("activations"))
            chunk.register_forward_hook(lambda *_: self._set("transient"))
            if chunk.head is not None:
                chunk.head.register_forward_pre_hook(lambda *_: self._set("logits"))
        state.optimizer.register_step_post_hook(lambda *_: self._book_updated())
        _after_spans(state.runner.clock, self._span)

    def _set(self, purpose: str) -> None:
        self.live.purpose = purpose

    def _span(self, name: str) -> None:
        """A span of the runner's clock has ended."""
        self.book_buffers()
        if name == "forward":
            self._book_weights()
            self._book_gathered()
            self._set("transient")
            self._on_forward()
        elif name == "backward":
            self._book_gradients()

    def _book_weights(self) -> None:
        for parameter in parameters_of(self.state.chunks):
            if not self._fsdp:
                self.live.book(parameter.data, "weights")
        for group in self._fsdp:
            for sharded in group.fsdp_params:
                self.live.book(sharded._sharded_param_data, "weights")

    def _book_gathered(self) -> None:
        for group in self._fsdp:
            for sharded in group.fsdp_params:
                for gathered in sharded.all_gather_outputs:
                    stays = gathered.untyped_storage().nbytes() > 0
                    self.live.book(gathered, "gathered_weights" if stays else "transient")

    def _book_gradients(self) -> None:
        for parameter in parameters_of(self.state.chunks):
            self.live.book(parameter.grad, "gradients")
        for group in self._fsdp:
            for sharded in group.fsdp_params:
                self.live.book(sharded.unsharded_accumulated_grad, "gradients")
                if hasattr(sharded, "_unsharded_param"):
                    self.live.book(sharded._unsharded_param.grad, "gradients")

    def _book_updated(self) -> None:
        self._book_gradients()
        for values in self.state.optimizer.state.values():
            for value in values.values():
                self.live.book(value, "optimizer")

    def book_buffers(self) -> None:
        """The receive buffers of a pipeline stage, which torch makes in the first step and keeps; between two stages
        of one rank it puts what passes in their place."""
        if not isinstance(self.state.runner, PipelineRunner):
            return
        for stage in self.state.runner.stages:
            for received in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
                for info in received:
                    self.live.book(getattr(info, "buffer", None), "pipeline_buffers")


def _after_spans(clock: Clock, call: Any) -> None:
    add = clock.add

    def then_call(name: str, start: Any, action: str = "") -> None:
        add(name, start, action)
        call(name)

    clock.add = then_call  # type: ignore[method-assign]


def _fsdp_modules(chunks: Sequence[torch.nn.Module]) -> Iterator[FSDPModule]:
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, FSDPModule))


def _parameter_groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # torch 2.12
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


@contextmanager
def quiet_metadata() -> Iterator[None]:
    """DTensor finds shapes by running ops on fake tensors of the whole size, and meshes compute with real numbers:
    neither is the rank's memory."""
    propagate, concatenate = ShardingPropagator._propagate_tensor_meta_non_cached, DeviceMesh._concatenate

    def propagate_unseen(self: Any, schema: Any) -> Any:
        with _disable_current_modes():
            return propagate(self, schema)

    def concatenate_real(meshes: Any) -> Any:
        with unset_fake_temporarily():
            return concatenate(meshes)

    with (
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_unseen),
        mock.patch.object(DeviceMesh, "_concatenate", staticmethod(concatenate_real)),
    ):
        yield
