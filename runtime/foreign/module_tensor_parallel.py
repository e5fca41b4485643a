"""Tensor parallelism of a module of another package by its tp_plan; what that does not name is whole on each rank."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from profiles.traced_model import TracedModel

from .foreign_chunk import ForeignChunk

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def apply_module_tensor_parallel(chunk: ForeignChunk, model: TracedModel, mesh: DeviceMesh) -> None:
    """Cut the linears of the chunk's blocks over `mesh` (one axis, tp) in place.

    A column-wise linear takes the whole input and gives this rank's columns; a row-wise one takes them and gives the
    sum. Between the two the module's own code runs on what is here, which must not count on how wide it is.
    """
    for block in chunk.blocks.values():
        plan = {name: _STYLES[style]() for name, style in model.tp_plan}
        # src_data_rank None: each rank has the same first values, so nothing is sent from rank 0.
        parallelize_module(block, mesh, plan, src_data_rank=None)
    chunk.plain_copies = mesh.size()
