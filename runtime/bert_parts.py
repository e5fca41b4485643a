"""What embedding and head of BERT have besides: token types, the transform before the output, the tokens it is for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from profiles.model import ModelSpec

from .local_parameters import LocalParameters
from .norm import Norm


class TokenTypes(LocalParameters):
    """One vector per type of token. All tokens are of the first ([Note: Masked language model])."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.token_types, model.hidden_size))

    def forward(self) -> torch.Tensor:
        """[hidden_size], which every token gets."""
        return self.plain(self.weight)[0]


class HeadTransform(LocalParameters):
    """Linear, GELU (its tanh form where the layers have that) and norm.

    The same on every tp rank: each leaves its part of the gradients.
    """

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.approximate = "tanh" if model.activation == "gelu_tanh" else "none"
        self.weight = nn.Parameter(torch.empty(model.hidden_size, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.hidden_size))
        self.norm = Norm(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(
            F.gelu(F.linear(x, self.plain(self.weight), self.plain(self.bias)), approximate=self.approximate)
        )


def with_targets(x: torch.Tensor, targets: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every sequence the `number` tokens that have a target, in order; where it has fewer, others fill up.

    x [batch, sequence, hidden_size], targets [batch, sequence], below 0 where there is none -> [batch · number,
    hidden_size] and [batch · number].
    """
    order = torch.argsort(targets < 0, dim=1, stable=True)[:, :number]
    rows = torch.arange(len(targets), device=targets.device).unsqueeze(1) * targets.shape[1]
    chosen = (order + rows).flatten()
    return x.flatten(0, 1).index_select(0, chosen), targets.flatten().index_select(0, chosen)
