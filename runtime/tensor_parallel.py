"""Tensor parallelism: how each module of a chunk is split over the tp axis, with or without sequence parallelism."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from profiles.model import ModelSpec

from .experts import Router
from .local_parameters import LocalParameters
from .transformer import Chunk, ExpertFeedForward, Head, LearnedPositions, TokenTable

SEQUENCE_DIM = 1


def apply_tensor_parallel(chunk: Chunk, model: ModelSpec, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Split the chunk over `mesh` (one axis, tp) in place; every parameter becomes a DTensor.

    Between the modules the residual stream is whole on each rank, or cut along the sequence under
    sequence parallelism (arXiv 2205.05198, section 4.2). One redistribution at the input of attention and
    one of the feed-forward: two all-reduces each way and block, or two all-gathers and two reduce-scatters.
    """
    plan: dict[str, ParallelStyle] = {}
    if chunk.embedding is not None:
        plan["embedding.tokens"] = _VocabularyRows(sequence_parallel)
        if chunk.embedding.positions is not None:
            plan["embedding.positions"] = _Whole(sequence_parallel)
        if chunk.embedding.token_types is not None:
            plan["embedding.token_types"] = _Whole(sequence_parallel)
        if chunk.embedding.norm is not None:
            plan["embedding.norm"] = _Whole(sequence_parallel)
    for index, block in chunk.blocks.items():
        routed = isinstance(block.mlp, ExpertFeedForward)
        for path, style in _block_plan(model, mesh, sequence_parallel, routed=routed).items():
            plan[f"blocks.{index}.{path}"] = style
    if chunk.head is not None:
        if chunk.norm is not None:
            plan["norm"] = _Whole(sequence_parallel)
        if chunk.head.transform is not None:
            for path in ("head.transform", "head.transform.norm"):
                plan[path] = _Whole(sequence_parallel, partial=True)
        plan["head"] = _VocabularyHead(sequence_parallel)
    # src_data_rank None: each rank draws the same whole values itself, so nothing is sent from rank 0.
    parallelize_module(chunk, mesh, plan, src_data_rank=None)
    chunk.tie()


def _block_plan(
    model: ModelSpec, mesh: DeviceMesh, sequence_parallel: bool, *, routed: bool
) -> dict[str, ParallelStyle]:
    """Experts are cut elsewhere; where they are, only their router and the shared ones are tp's."""
    stream = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()

    def whole_input() -> ParallelStyle:
        # Also without sequence parallelism, where nothing moves forward: wq, wk and wv then share one input,
        # whose gradient is reduced once and not three times.
        return PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))

    plan: dict[str, ParallelStyle] = {
        "attention_norm": _Whole(sequence_parallel),
        "attention.wo": RowwiseParallel(output_layouts=stream),
        "mlp_norm": _Whole(sequence_parallel),
    }
    if model.latent_attention is not None:
        plan |= _latent_plan(model, sequence_parallel)
    else:
        plan |= {"attention": whole_input(), "attention.wq": ColwiseParallel()}
        enough = model.kv_heads % mesh.size() == 0
        for name in ("wk", "wv"):
            plan[f"attention.{name}"] = ColwiseParallel() if enough else _SharedKeyValue(model)
    if model.attention_sinks:
        plan["attention.sinks"] = _OwnRows()
    if model.qk_norm:  # each rank norms its own heads with the one weight of all
        plan |= {f"attention.{name}": _Whole(sequence_parallel, partial=True) for name in ("q_norm", "k_norm")}
    dense = "mlp"
    if routed:
        plan["mlp.router"] = _Whole(sequence_parallel)
        dense = "mlp.shared" if model.experts is not None and model.experts.shared else ""
    if dense:
        plan |= {
            dense: whole_input(),
            f"{dense}.w1": ColwiseParallel(),
            f"{dense}.w2": RowwiseParallel(output_layouts=stream),
        }
        if model.ffn_matrices == 3:
            plan[f"{dense}.w3"] = ColwiseParallel()
    return plan


def _latent_plan(model: ModelSpec, sequence_parallel: bool) -> dict[str, ParallelStyle]:
    """Down to the latents on every rank alike, up from them each rank's own heads."""
    latent = model.latent_attention
    assert latent is not None
    plan: dict[str, ParallelStyle] = {
        "attention": _PlainInput(sequence_parallel),
        "attention.wkv_a": _Whole(sequence_parallel, partial=True),
        "attention.kv_norm": _Whole(sequence_parallel, partial=True),
        "attention.wkv_b": _OwnRows(),
    }
    if latent.q_lora_rank is None:
        return plan | {"attention.wq": _OwnRows()}
    whole = {f"attention.{name}": _Whole(sequence_parallel, partial=True) for name in ("wq_a", "q_norm")}
    return plan | whole | {"attention.wq_b": _OwnRows()}


def _replicate_parameters(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole))


class _Whole(ParallelStyle):
    """Parameters whole on every rank, used on this rank's part of the stream, or of the heads (`partial`)."""

    def __init__(self, sequence_parallel: bool, *, partial: bool = False) -> None:
        self.sequence_parallel = sequence_parallel
        self.partial = partial or sequence_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, LocalParameters)
        _replicate_parameters("", module, device_mesh)
        if self.partial:
            module.grad_placements = [Partial()]
        if self.sequence_parallel and isinstance(module, LearnedPositions):
            module.slice_of_shard = (device_mesh.get_local_rank(), device_mesh.size())
        if self.sequence_parallel and isinstance(module, Router):
            module.sequence_group = device_mesh.get_group()
        return module


def _split_rows(module: TokenTable | Head, mesh: DeviceMesh) -> int:
    """Cut a matrix, and its bias, by the rows of the vocabulary; returns this rank's first row."""
    rows_per_rank = -(-len(module.weight) // mesh.size())
    for name, parameter in list(module.named_parameters(recurse=False)):
        rows = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(rows))
    return mesh.get_local_rank() * rows_per_rank


class _VocabularyRows(ParallelStyle):
    """Rows of the token table over the ranks, and one sum for the lookup.

    RowwiseParallel would do the same forward, but its gradient is the whole table's on every rank.
    """

    def __init__(self, sequence_parallel: bool) -> None:
        self.stream = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, TokenTable)
        module.first_row = _split_rows(module, device_mesh)
        sum_lookup: Any = partial(_sum_lookup, self.stream)  # torch's annotation forgets that a hook may return
        return distribute_module(module, device_mesh, output_fn=sum_lookup)


def _sum_lookup(stream: Placement, _module: nn.Module, output: Any, mesh: DeviceMesh) -> torch.Tensor:
    return DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(placements=[stream]).to_local()


class _VocabularyHead(ParallelStyle):
    """Rows of the output matrix over the ranks. Each takes the whole stream and leaves a part of its gradient."""

    def __init__(self, sequence_parallel: bool) -> None:
        self.stream = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Head)
        first_row = _split_rows(module, device_mesh)
        module.way = replace(module.way, first_row=first_row, group=device_mesh.get_group())
        gather: Any = partial(_gather_stream, self.stream)
        return distribute_module(module, device_mesh, input_fn=gather)


def _gather_stream(stream: Placement, _module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    x, *others = inputs
    whole = DTensor.from_local(x, mesh, [stream], run_check=False).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()]), *others


class _PlainInput(ParallelStyle):
    """The whole stream as a plain tensor, of whose gradient each rank leaves a part."""

    def __init__(self, sequence_parallel: bool) -> None:
        self.stream = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        gather: Any = partial(_gather_stream, self.stream, mesh=device_mesh)
        module.register_forward_pre_hook(gather)
        return module


class _OwnRows(ParallelStyle):
    """Outputs of a linear on plain tensors, or numbers of heads, over the ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.get_parameter("weight"), device_mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))
        return module


class _SharedKeyValue(ParallelStyle):
    """wk and wv with fewer key-value heads than tp ranks: each rank computes all of them from whole weights
    and keeps the one head that its queries attend to; the gradients of the copies add up."""

    def __init__(self, model: ModelSpec) -> None:
        self.kv_heads = model.kv_heads
        self.head_dim = model.head_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        first = device_mesh.get_local_rank() * self.kv_heads // device_mesh.size() * self.head_dim
        keep: Any = partial(_keep_columns, first, first + self.head_dim)
        return distribute_module(module, device_mesh, _replicate_parameters, output_fn=keep)


def _keep_columns(first: int, end: int, _module: nn.Module, output: Any, _mesh: DeviceMesh) -> torch.Tensor:
    assert isinstance(output, DTensor)
    return output.to_local(grad_placements=[Partial()])[..., first:end]
