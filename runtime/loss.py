"""The loss of a microbatch: its share of the mean cross-entropy over all tokens of the step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def token_loss(tokens_per_step: int) -> Loss:
    """A function of logits [batch, sequence, vocabulary] and targets [batch, sequence] -> scalar, in nats.

    It is the sum of cross-entropies over `tokens_per_step`, the tokens of the whole step: the shares of
    microbatches and dp ranks add up to the mean, and gradients are summed, never averaged. bfloat16 logits
    are widened first.
    """

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens_per_step

    return loss


def loss_context(tp: int) -> AbstractContextManager[None]:
    """What must surround loss and backward when logits are split over the vocabulary."""
    return loss_parallel() if tp > 1 else nullcontext()


def plain_loss(loss: torch.Tensor) -> float:
    """The loss as a number; the same on every tp rank."""
    loss = loss.detach()
    return (loss.to_local() if isinstance(loss, DTensor) else loss).item()
