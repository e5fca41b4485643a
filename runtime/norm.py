"""RMSNorm and LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from profiles.model import ModelSpec

from .local_parameters import LocalParameters


class Norm(LocalParameters):
    """RMSNorm, or LayerNorm with a bias, over the last dim."""

    def __init__(self, model: ModelSpec, width: int | None = None, *, kind: str | None = None) -> None:
        super().__init__()
        width, kind = width or model.hidden_size, kind or model.norm
        self.epsilon = model.norm_epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layernorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.plain(self.weight)
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.epsilon)
        return F.layer_norm(x, weight.shape, weight, self.plain(self.bias), self.epsilon)
