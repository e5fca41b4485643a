"""After the backward pass: gradients that still are one rank's part, their global norm, and clipping."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from .local_parameters import local_part
from .mesh import RankMesh
from .parameters import parameters_of, tied_copies
from .transformer import Chunk


@torch.no_grad()
def complete_gradients(chunks: Sequence[Chunk], mesh: RankMesh) -> None:
    """Sum what the backward pass left in parts: over tp where each rank saw a part of the sequence, over the
    first and last stage where both hold a copy of a tied matrix. In place; every rank must call it."""
    parameters = parameters_of(chunks)
    partial = [(p, p.grad) for p in parameters if isinstance(p.grad, DTensor) and _is_partial(p.grad)]
    if partial:
        # All of them in one message: each is a vector or two, and a small collective costs only latency.
        flat = torch.cat([gradient.to_local().flatten() for _, gradient in partial])
        dist.all_reduce(flat, group=mesh.axis("tp").get_group())
        pieces = flat.split([gradient.to_local().numel() for _, gradient in partial])
        for (parameter, gradient), piece in zip(partial, pieces, strict=True):
            whole = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
            summed = piece.view_as(gradient.to_local())
            parameter.grad = DTensor.from_local(summed, gradient.device_mesh, whole, run_check=False)  # type: ignore[assignment]
    tied = [_local(copy.grad) for copy, _ in tied_copies(chunks)]
    if len(tied) == 2:  # both ends of a pipeline that is folded
        tied[0].add_(tied[1])
        tied[1].copy_(tied[0])
    elif tied and mesh.tied_group is not None:
        dist.all_reduce(tied[0], group=mesh.tied_group)


@torch.no_grad()
def square_sum(chunks: Sequence[Chunk]) -> torch.Tensor:
    """This rank's share of the squared norm of all gradients: added up over all ranks, each element counts once.

    float64 scalar on the gradients' device. What several ranks hold alike is divided by how many they are;
    of a tied pair the embedding counts. Call it after `complete_gradients`.
    """
    left_out = {id(copy) for copy, counts in tied_copies(chunks) if not counts}
    total: torch.Tensor | None = None
    for copies, gradients in _by_copies(chunks, left_out):
        norms = torch.stack(torch._foreach_norm(gradients)).double()  # pyright: ignore[reportPrivateImportUsage]
        share = norms.square().sum() / copies
        total = share if total is None else total + share
    return torch.zeros((), dtype=torch.float64) if total is None else total


@torch.no_grad()
def clip(chunks: Sequence[Chunk], norm: torch.Tensor, limit: float | None, loss_scale: float = 1.0) -> None:
    """Divide all gradients by `loss_scale`, and scale them so that their global norm is at most `limit`, if any.

    `norm`, a scalar tensor, is what it is after the division.
    """
    if loss_scale == 1.0 and (limit is None or (norm.device.type == "cpu" and norm <= limit)):
        return  # on a GPU to look at it would make the host wait
    scale = torch.ones_like(norm) if limit is None else (limit / norm).clamp(max=1.0)
    scale = scale / loss_scale
    gradients = [_local(p.grad) for p in parameters_of(chunks) if p.grad is not None]
    for dtype in {gradient.dtype for gradient in gradients}:
        of_dtype = [gradient for gradient in gradients if gradient.dtype == dtype]
        torch._foreach_mul_(of_dtype, scale.to(dtype))  # pyright: ignore[reportPrivateImportUsage]


def _by_copies(chunks: Sequence[Chunk], left_out: Container[int]) -> Iterable[tuple[int, list[torch.Tensor]]]:
    """Local gradients, grouped by how many ranks hold the same numbers; without the parameters of these ids."""
    groups: dict[int, list[torch.Tensor]] = {}
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.grad is not None and id(parameter) not in left_out:
                replicas = chunk.replicas.get(id(parameter), 1)
                copies = _copies(parameter.grad, chunk.plain_copies) * replicas
                groups.setdefault(copies, []).append(_local(parameter.grad))
    return groups.items()


def _copies(gradient: torch.Tensor, plain: int) -> int:
    """Ranks that hold the same numbers: of its mesh, and `plain` of tp where that is no part of it."""
    if not isinstance(gradient, DTensor):
        return plain
    assert not _is_partial(gradient), "complete_gradients comes first"
    copies = 1 if "tp" in (gradient.device_mesh.mesh_dim_names or ()) else plain
    for axis, placement in enumerate(gradient.placements):
        if isinstance(placement, Replicate):
            copies *= gradient.device_mesh.size(axis)
    return copies


def _is_partial(gradient: DTensor) -> bool:
    return any(placement.is_partial() for placement in gradient.placements)


def _local(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return local_part(gradient)
