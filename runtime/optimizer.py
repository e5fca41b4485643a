"""AdamW over this rank's shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .host_moments import OffloadedAdamW
from .local_parameters import local_part
from .parameters import parameters_of
from .transformer import Chunk


@dataclass(frozen=True, kw_only=True)
class Adam:
    """What AdamW (arXiv 1711.05101) goes by besides its learning rate and decay; these betas are GPT-3's."""

    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8


GPT3_ADAM = Adam()


class ShardedAdamW(torch.optim.AdamW):
    """Fused AdamW of what this rank holds: the kernel is given each DTensor's local part, as the way through DTensor
    takes longer than the update of a small tensor. State is as the parameters are.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> bool:
        """The tensors that a step takes, which torch puts into `lists`."""
        complex_ones = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local_part(tensor) for tensor in tensors]
        return complex_ones


def build_optimizer(
    chunks: Sequence[Chunk], *, weight_decay: float, adam: Adam = GPT3_ADAM, offload: bool = False
) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not. The learning rate is set each step.

    Fused: one kernel a dtype instead of a Python loop. `offload`: moments lie in the host's memory.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters_of(chunks):
        groups[parameter.ndim >= 2].append(parameter)
    options = [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]
    kind = OffloadedAdamW if offload else ShardedAdamW
    return kind(options, lr=0.0, betas=adam.betas, eps=adam.epsilon, fused=True)


def update(optimizer: torch.optim.AdamW, sound: torch.Tensor) -> None:
    """One step of `optimizer`, but where `sound`, a bool on its device, is False: then all stays as it is.

    Fused AdamW is told as torch.amp's GradScaler tells it, by `found_inf`: weights, moments and counts of steps are
    left alone by the kernel, so the host need not know.
    """
    optimizer.found_inf = (~sound).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
