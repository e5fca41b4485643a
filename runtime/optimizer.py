"""AdamW over this rank's shards, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .parameters import parameters_of
from .transformer import Chunk


def build_optimizer(chunks: Sequence[Chunk], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); matrices decay, norms and biases do not. The learning rate is set each step.

    Fused: one kernel a dtype instead of a Python loop, and it takes DTensors, whose shards it updates in
    place without communication.
    """
    groups: dict[tuple[bool, int | None], list[nn.Parameter]] = {}
    for parameter in parameters_of(chunks):
        # The fused kernel takes DTensors of one mesh at a time: experts lie on another than what surrounds them.
        mesh = hash(parameter.device_mesh) if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim >= 2, mesh), []).append(parameter)
    options = [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), parameters in sorted(groups.items(), key=lambda item: not item[0][0])
    ]
    return torch.optim.AdamW(options, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def update(optimizer: torch.optim.AdamW, finite: torch.Tensor) -> None:
    """One step of `optimizer`, but where `finite`, a bool on its device, is False: then all stays as it is.

    Fused AdamW is told as torch.amp's GradScaler tells it, by `found_inf`: weights, moments and counts of steps are
    left alone by the kernel, so the host need not know.
    """
    optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def learning_rate_at(step: int, *, steps: int, warmup_steps: int, peak: float, minimum: float) -> float:
    """Linear from peak / warmup_steps up to `peak`, then a half cosine down to `minimum` at the last step.

    `step` counts from 1 to `steps`.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if steps <= warmup_steps + 1:
        return peak
    progress = (step - warmup_steps - 1) / (steps - warmup_steps - 1)
    return minimum + 0.5 * (peak - minimum) * (1.0 + math.cos(math.pi * min(1.0, progress)))
