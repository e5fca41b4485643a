"""Modules that compute with plain tensors on parameters which a mesh holds in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(like: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local` as this rank's part of a tensor that is cut as `like`, wherever it lies.

    DTensor.from_local would move it to the device of the mesh.
    """
    return DTensor(local, like._spec, requires_grad=False) if isinstance(like, DTensor) else local


class LocalParameters(nn.Module):
    """A module that computes with what this tp rank holds of its parameters, as plain tensors.

    `grad_placements` says what one rank's gradient is when tp > 1: None where it is the gradient of what the
    rank holds, Partial where a parameter is whole on each rank but each sees a shard of the sequence (their
    sum is the gradient).
    """

    grad_placements: Sequence[Placement] | None = None

    def plain(self, parameter: torch.Tensor) -> torch.Tensor:
        if isinstance(parameter, DTensor):
            return parameter.to_local(grad_placements=self.grad_placements)
        return parameter
