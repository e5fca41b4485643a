"""The order of parallelisation, on one screen: tensor, context, experts, recomputation, compilation, data parallel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from planner.layout import Layout
from planner.plan import Plan, Stage
from profiles.masked_language import head_tokens, predicted_tokens
from profiles.probes.selective import keeping_products
from profiles.traced_model import TracedModel

from .compilation import Compilation, compile_chunk
from .context_parallel import SequenceShard
from .document_attention import DOCUMENTS
from .experts import Experts, Router
from .float8 import apply_float8
from .foreign.foreign_chunk import ForeignChunk
from .foreign.foreign_values import load_first_values
from .foreign.module_tensor_parallel import apply_module_tensor_parallel
from .hf_weights import load_weights
from .latent_attention import LatentAttention
from .local_parameters import local_part
from .loss import LossWay
from .mesh import RankMesh
from .mixed_precision import fsdp_policy
from .parameters import clear_buffers, initialise
from .ring_attention import RING
from .tensor_parallel import apply_tensor_parallel
from .transformer import Attention, Chunk, LearnedPositions, build_chunk
from .windowed_attention import WINDOWED

# What selective recomputation keeps besides products and attention: our own kinds of attention as a whole, and the sums
# over tp, so that of all these nothing is sent twice. Everything else is computed again, the exchange of heads over cp
# with it.
_KEPT_TOO = (
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    RING,
    DOCUMENTS,
    WINDOWED,
)


def build_chunks(
    plan: Plan,
    mesh: RankMesh,
    device: torch.device,
    *,
    dtype: torch.dtype,
    seed: int,
    compilation: Compilation | None = None,
    weights: Path | None = None,
) -> list[Chunk]:
    """This rank's chunks, parallel as the plan says, in memory and with first values. Parameters are `dtype`.

    First values are drawn, or those of the Hugging Face folder `weights`.
    """
    chunks = shape_chunks(plan, mesh, dtype=dtype, compilation=compilation)
    allocate_chunks(chunks, device)
    if isinstance(plan.model, TracedModel):
        load_first_values(chunks, plan.model, seed)
    elif weights is None:
        initialise(chunks, layers=plan.model.layers, seed=seed)
    else:
        clear_buffers(chunks)
        load_weights(weights, chunks, plan.model)
    return chunks


def shape_chunks(
    plan: Plan, mesh: RankMesh, *, dtype: torch.dtype, compilation: Compilation | None = None
) -> list[Chunk]:
    """This rank's chunks in the order of their stages, parallel as the plan says, on the meta device: no memory yet."""
    chunks = []
    for place in plan.layout.stages_of(mesh.coordinate.pp):
        stage = plan.stages[place]
        model = plan.model
        chunk = ForeignChunk(model, stage) if isinstance(model, TracedModel) else build_chunk(model, stage)
        chunk = chunk.to(dtype)
        parallelize(chunk, plan, stage, mesh, compilation)
        chunks.append(chunk)
    return chunks


def allocate_chunks(chunks: list[Chunk], device: torch.device) -> None:
    """Give chunks their memory alone."""
    for chunk in chunks:
        chunk.to_empty(device=device)
        chunk.tie()


def parallelize(chunk: Chunk, plan: Plan, stage: Stage, mesh: RankMesh, compilation: Compilation | None = None) -> None:
    """Everything that happens to a chunk, in the only order in which the parts compose."""
    layout = plan.layout
    choose_loss(chunk, plan)
    if plan.job.precision == "fp8":
        apply_float8(chunk)
    if isinstance(chunk, ForeignChunk) and isinstance(plan.model, TracedModel):
        if layout.tp > 1:
            apply_module_tensor_parallel(chunk, plan.model, mesh.axis("tp"))
    elif layout.tp > 1:
        apply_tensor_parallel(chunk, plan.model, mesh.axis("tp"), sequence_parallel=layout.sequence_parallel)
    if layout.cp > 1:
        apply_context_parallel(chunk, layout, mesh)
    apply_expert_parallel(chunk, mesh)
    apply_recompute(chunk, stage)
    if compilation is not None:
        compile_chunk(chunk, stage, compilation, mesh.axis("tp") if layout.tp > 1 else None)
    if layout.on_fsdp(plan.job.precision, experts=mesh.expert_mesh is not None):
        frees = layout.zero == 3 and stage.reshard is not False
        apply_data_parallel(chunk, mesh, zero=layout.zero, frees=frees, precision=plan.job.precision)


def choose_loss(chunk: Chunk, plan: Plan) -> None:
    """How the head computes its loss under this plan's schedule ([Note: Loss in pieces])."""
    model, job = plan.model, plan.job
    if isinstance(chunk, ForeignChunk):
        chunk.loss_share = plan.layout.micro_batch / job.global_batch
        own = next(chunk.parameters()).dtype
        chunk.activation_dtype = torch.bfloat16 if job.precision == "bf16" else own
    elif chunk.head is not None:
        chunk.head.way = LossWay(
            tokens_per_step=job.global_batch * predicted_tokens(model, job.sequence),
            predicted=int(head_tokens(model, job.sequence, plan.layout.cp)) if model.bidirectional else None,
            logits_again=plan.layout.logits_again(plan.microbatches),
            backward_twice=plan.layout.splits_backward,
        )


def apply_context_parallel(chunk: Chunk, layout: Layout, mesh: RankMesh) -> None:
    """Tell the modules to which a token's place in its sequence matters what this rank holds of it."""
    shard = SequenceShard(mesh.coordinate.cp, layout.cp, layout.cp_style, mesh.context_group)
    for module in chunk.modules():
        if isinstance(module, Attention | LatentAttention | LearnedPositions):
            module.shard = shard
        elif isinstance(module, Router):
            module.sequence_group = mesh.sequence_group or mesh.context_group


def apply_expert_parallel(chunk: Chunk, mesh: RankMesh) -> None:
    """Experts over ep, and their width over etp."""
    for experts in (module for module in chunk.modules() if isinstance(module, Experts)):
        cuts = {name: mesh.axis(name) for name in ("ep", "etp") if mesh.axis(name).size() > 1}
        experts.ep_group, experts.etp_group = (
            cuts[name].get_group() if name in cuts else None for name in ("ep", "etp")
        )
        if not cuts or mesh.expert_mesh is None:
            continue
        grid = mesh.expert_mesh[tuple(cuts)]
        for name, whole in list(experts.named_parameters(recurse=False)):
            width: Placement = Replicate() if name == "w2_bias" else Shard(2 if name == "w2" else 1)
            placements = [Shard(0) if axis == "ep" else width for axis in cuts]
            weight = distribute_tensor(whole, grid, placements, src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(weight))


def apply_recompute(chunk: Chunk, stage: Stage) -> None:
    """Wrap the blocks that run forward again in the backward pass, all of it or what is cheap."""
    for name, block in list(chunk.blocks.items()):
        mode = stage.recompute_mode(int(name))
        if mode != "none":
            chunk.blocks[name] = _recomputing(block, selective=mode == "selective")


def _recomputing(block: nn.Module, *, selective: bool) -> nn.Module:
    # Nothing here draws random numbers, so there is no state to keep for the second forward.
    contexts: dict[str, Any] = {}
    if selective:
        contexts["context_fn"] = partial(keeping_products, _KEPT_TOO)
    return checkpoint_wrapper(block, preserve_rng_state=False, **contexts)


def apply_data_parallel(chunk: Chunk, mesh: RankMesh, *, zero: int, frees: bool, precision: str) -> None:
    """Shard (zero 1 to 3) or replicate (zero 0) block by block over the dp axis, then what is left at the root; what
    need not be widened is replicated without FSDP2 ([Note: Gradient sum] in replicas.py).

    A mesh of two dimensions, (replicate, shard), is HSDP. Experts go before their block, over the ranks that hold the
    same ones. Root last: torch's pipeline looks only at the stage's top module. Embedding and head stay in the root,
    so that a tied pair is one parameter of one group. `frees` is whether blocks free their gathered weights after
    forward; the root keeps its own from forward to backward, since nothing runs between the two.
    """
    policy = fsdp_policy(precision)
    experts = [module for module in chunk.modules() if isinstance(module, Experts)]
    for module in (*experts, *chunk.blocks.values(), chunk):
        axis = mesh.axis("edp" if isinstance(module, Experts) else "dp")
        if zero == 0:
            replicate(module, mesh=axis, mp_policy=policy)
        else:
            free = frees and module is not chunk
            by = partial(_shard_of_experts, axis) if isinstance(module, Experts) else None
            fully_shard(module, mesh=axis, reshard_after_forward=free, mp_policy=policy, shard_placement_fn=by)
        assert isinstance(module, FSDPModule)
        # The loss is already divided by all tokens of the step, so gradients are summed over dp. Of one rank there is
        # nothing to sum, and to be told of a factor makes FSDP2 divide by it.
        if axis.size() > 1:
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _shard_of_experts(axis: DeviceMesh, weight: nn.Parameter) -> Shard | None:
    """Whole experts to each rank where they divide, else slices of each, since whole ones would leave ranks empty."""
    ranks = axis.size(axis.ndim - 1)
    local = local_part(weight)
    return Shard(1) if local.shape[0] % ranks and local.shape[1] % ranks == 0 else None
