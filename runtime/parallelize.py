"""The order of parallelisation, on one screen: tensor parallel, recomputation, data parallel."""

from __future__ import annotations

import torch
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from planner.plan import Plan, Stage

from .mesh import RankMesh
from .parameters import initialise
from .tensor_parallel import apply_tensor_parallel
from .transformer import Chunk, build_chunk


def build_stage(plan: Plan, mesh: RankMesh, device: torch.device, *, dtype: torch.dtype, seed: int) -> Chunk:
    """This rank's stage, parallel as the plan says, in memory and with first values. Parameters are `dtype`."""
    chunk = shape_stage(plan, mesh, dtype=dtype)
    fill_stage(chunk, plan, device, seed=seed)
    return chunk


def shape_stage(plan: Plan, mesh: RankMesh, *, dtype: torch.dtype) -> Chunk:
    """This rank's stage, parallel as the plan says, on the meta device: no memory yet."""
    stage = plan.stages[mesh.coordinate.pp]
    chunk = build_chunk(plan.model, stage).to(dtype)
    parallelize(chunk, plan, stage, mesh)
    return chunk


def fill_stage(chunk: Chunk, plan: Plan, device: torch.device, *, seed: int) -> None:
    """Give a stage its memory and first values."""
    chunk.to_empty(device=device)
    chunk.tie()
    initialise(chunk, layers=plan.model.layers, seed=seed)


def parallelize(chunk: Chunk, plan: Plan, stage: Stage, mesh: RankMesh) -> None:
    """Everything that happens to a chunk, in the only order in which the parts compose."""
    layout = plan.layout
    if layout.tp > 1:
        apply_tensor_parallel(chunk, plan.model, mesh.axis("tp"), sequence_parallel=layout.sequence_parallel)
    apply_recompute(chunk, stage)
    if layout.dp > 1 or plan.job.precision == "bf16":
        apply_data_parallel(chunk, mesh.axis("dp"), zero=layout.zero, precision=plan.job.precision)


def apply_recompute(chunk: Chunk, stage: Stage) -> None:
    """Wrap the blocks that keep only their input and run forward again in the backward pass."""
    for name, block in list(chunk.blocks.items()):
        if stage.recompute_mode(int(name)) == "full":
            # Nothing here draws random numbers, so there is no state to keep for the second forward.
            chunk.blocks[name] = checkpoint_wrapper(block, preserve_rng_state=False)


def apply_data_parallel(chunk: Chunk, mesh: DeviceMesh, *, zero: int, precision: str) -> None:
    """Shard (zero 1 to 3) or replicate (zero 0) block by block over the dp axis, then what is left at the root.

    Root last: torch's pipeline looks only at the stage's top module. Embedding and head stay in the root, so
    that a tied pair is one parameter of one group. Under zero 3 the root keeps its parameters from forward
    to backward, since nothing runs between the two.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*chunk.blocks.values(), chunk):
        if zero == 0 and mesh.size() > 1:
            replicate(module, mesh=mesh, mp_policy=policy)
        else:
            free = zero == 3 and module is not chunk
            fully_shard(module, mesh=mesh, reshard_after_forward=free, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        # The loss is already divided by all tokens of the step, so gradients are summed over dp.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
