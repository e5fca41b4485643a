"""Compilation: each block and the loss of a few tokens by torch.compile, with tp's collectives in pieces on CUDA.

[Note: What is compiled]
A block's `forward` alone, replaced on the instance. Hooks of the block itself (FSDP2's gathers, which are no graph)
stay outside, those of its parts (tensor parallelism's) are inside. No module is wrapped, so no parameter changes its
name. Blocks of one kind share their compiled code. The graph is whole or an error: nothing falls back to eager in
silence.

Recomputation is inside, where torch's compiler sees what is kept and leaves out what the backward pass does not need.
Only full recomputation over tp is outside and calls the compiled block twice, to its end: inside, torch 2.12 and 2.13
save the device mesh of a DTensor as if it were a tensor of the block, and raise.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh

from planner.compile_rules import why_no_asynchronous_tp, why_not_compiled
from planner.plan import Plan, Stage
from profiles.input_error import InputError

from .loss_kernels import LossKernels
from .transformer import Chunk


@dataclass(frozen=True)
class Compilation:
    """How blocks and loss are compiled: by which of torch's backends; under `asynchronous_tp` tp's gathers and
    reduce-scatters run in pieces beside the pieces of their products."""

    backend: str = "inductor"
    asynchronous_tp: bool = False


def choose_compilation(plan: Plan, wanted: bool | None, device_type: str) -> tuple[Compilation | None, str]:
    """How this run compiles, None for not at all, and a line that says so and why.

    `wanted` is a person's word; None is yes on CUDA, where no rule forbids it. Raises InputError where it is wanted and
    forbidden.
    """
    reason = why_not_compiled(plan.layout, plan.model)
    if wanted and reason is not None:
        raise InputError("the plan cannot be compiled", where="--compile", expected="--no-compile", got=reason)
    if reason is None and wanted is None and device_type != "cuda":
        reason = "by default only on CUDA"
    if reason is not None or wanted is False:
        return None, f"off: {reason or 'as asked'}"
    asynchronous = why_no_asynchronous_tp(plan.layout, plan.model, plan.cluster.devices_per_node)
    if device_type != "cuda":
        asynchronous = "it exists on CUDA alone"
    how = Compilation(asynchronous_tp=asynchronous is None)
    return how, "blocks and loss" + (", asynchronous tp" if asynchronous is None else "")


def compile_chunk(chunk: Chunk, stage: Stage, how: Compilation, tp: DeviceMesh | None) -> None:
    """Compile the blocks and the loss of `stage`, as they are now ([Note: What is compiled]).

    It happens in the first step. `tp` is the axis that cuts the chunk, if any.
    """
    # The shapes of a run never change, and constants make better code than symbols.
    compiled: Any = partial(torch.compile, backend=how.backend, fullgraph=True, dynamic=False)
    if how.asynchronous_tp:
        assert tp is not None
        _share_memory(tp)
        compiled = partial(compiled, options={"_micro_pipeline_tp": True})
    for name, block in chunk.blocks.items():
        outside = _outside(stage.recompute_mode(int(name)), tp)
        target: Any = block._checkpoint_wrapped_module if outside else block
        target.forward = compiled(target.forward)
    if chunk.head is not None:
        way = chunk.head.way
        kernels = {field.name: compiled(getattr(way.kernels, field.name)) for field in fields(LossKernels)}
        chunk.head.way = replace(way, kernels=LossKernels(**kernels))


def _outside(recompute: str, tp: DeviceMesh | None) -> bool:
    """Whether a block's recomputation stays outside of what is compiled."""
    return recompute == "full" and tp is not None


def _share_memory(tp: DeviceMesh) -> None:
    """Let inductor's pass over the graph know the group: it leaves out groups that it was not told of, although torch
    2.13 calls the telling deprecated (`is_symm_mem_enabled_for_group`). Never run yet: it takes GPUs with NVLink."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(tp.get_group().group_name)
