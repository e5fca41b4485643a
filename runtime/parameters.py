"""Names and first values of parameters, the same under every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .experts import Router
from .local_parameters import local_part
from .transformer import Chunk

WEIGHT_STD = 0.02  # of every matrix, as in GPT-2 (Radford et al. 2019) and most decoders since
RECOMPUTE_PREFIX = "_checkpoint_wrapped_module."  # what torch's checkpoint_wrapper puts into names


def parameters_of(chunks: Sequence[Chunk]) -> list[nn.Parameter]:
    """Every parameter of a rank's chunks once."""
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


def named_parameters(chunks: Sequence[Chunk]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of a rank's chunks by its name in the whole model.

    The head of a tied pair goes by the embedding's name, also where pp > 1 gives it a copy of its own: a rank that
    holds both ends of a folded pipeline has two parameters of that name.
    """
    for chunk in chunks:
        for path, parameter in chunk.named_parameters():
            name = path.replace(RECOMPUTE_PREFIX, "")
            tied_head = chunk.tied and name == "head.weight"
            yield ("embedding.tokens.weight" if tied_head else name), parameter


def named_buffers(chunks: Sequence[Chunk]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is trained but has no gradient, by its name in the whole model: routers' selection biases."""
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if isinstance(module, Router) and module.selection_bias is not None:
                yield f"{path.replace(RECOMPUTE_PREFIX, '')}.selection_bias", module.selection_bias


def tied_copies(chunks: Sequence[Chunk]) -> list[tuple[torch.Tensor, bool]]:
    """The parameters here of which another chunk holds a copy, and whether each is the one that counts."""
    return [copy for chunk in chunks if (copy := chunk.tied_copy()) is not None]


def initialise(chunks: Sequence[Chunk], *, layers: int, seed: int) -> None:
    """Draw first values into chunks that have memory, before or after they are sharded.

    Each parameter is drawn whole from a generator seeded with (seed, name), in float32 on the CPU, and this
    rank's shard is cut out: torch's own random init of DTensors gives every CPU rank the same numbers.
    `layers` is the whole model's, which scales the projections into the residual stream.
    """
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            whole = _first_value(name, parameter.shape, layers, seed)
            local_part(parameter).copy_(cut(whole, parameter))
    clear_buffers(chunks)


def clear_buffers(chunks: Sequence[Chunk]) -> None:
    """Routers start without a bias and with no loads counted."""
    for chunk in chunks:
        for buffer in chunk.buffers():
            buffer.zero_()


def cut(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's shard of `whole`, sharded as the parameter `like` is."""
    return whole[own_box(like)]


def own_box(like: torch.Tensor) -> tuple[slice, ...]:
    """What this rank holds of the parameter `like`: for each dim where it begins and ends in the whole.

    The last mesh axis (tp) cuts first and dp cuts the result, which is how FSDP lays its shards over a
    tensor-parallel parameter. Shards are ceil(length / ranks) long as torch's are, the last ones shorter or empty.
    """
    first, end = [0] * like.ndim, list(like.shape)
    if isinstance(like, DTensor):
        coordinate = like.device_mesh.get_coordinate()
        assert coordinate is not None, "a rank holds only parameters of its own mesh"
        for axis in reversed(range(like.device_mesh.ndim)):
            placement = like.placements[axis]
            if placement.is_shard() or hasattr(placement, "split_factor"):
                dim = placement.dim  # type: ignore[attr-defined]
                longest = -(-(end[dim] - first[dim]) // like.device_mesh.size(axis))
                first[dim] = min(first[dim] + coordinate[axis] * longest, end[dim])
                end[dim] = min(first[dim] + longest, end[dim])
    return tuple(map(slice, first, end))


def _first_value(name: str, shape: torch.Size, layers: int, seed: int) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    # Two projections a block add to the residual stream, so 2·layers of them keep its variance (GPT-2).
    residual = name.endswith(("wo.weight", "w2.weight", "experts.w2"))
    return torch.empty(shape).normal_(
        0.0, WEIGHT_STD / (2 * layers) ** 0.5 if residual else WEIGHT_STD, generator=generator
    )
