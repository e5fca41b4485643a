"""What the loss computes of the logits of a few tokens: pure functions, so that they can be compiled.

Logits are [tokens, rows] in the precision of the head's product; computed with is float32, or float64 for float64.
`first_row` and `group`: the rows of the vocabulary that this rank holds start there, and who holds the others.
`divisor`: of gradients, the tokens of the whole step that have a target; under a loss scale so many times fewer, as a
scalar tensor; or a column [tokens, 1] of it, infinite for tokens without a target, whose loss is 0 and row -1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

# Renamed in torch 2.13.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
Divisor = int | torch.Tensor


def _loss(
    logits: torch.Tensor, targets: torch.Tensor, first_row: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ cross-entropy of the targets on this rank, log Σ exp of each token)."""
    log_probabilities, normaliser = _log_probabilities(logits.to(wide(logits.dtype)), group)
    return _cross_entropy(log_probabilities, *_rows(targets, logits.shape[-1], first_row)), normaliser


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, first_row: int, divisor: Divisor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ cross-entropy, gradient of the logits in their precision)."""
    dtype = logits.dtype
    logits = logits.to(wide(dtype))
    log_probabilities, _ = _log_probabilities(logits, group)
    del logits  # the caller keeps none either
    rows, present = _rows(targets, log_probabilities.shape[-1], first_row)
    loss = _cross_entropy(log_probabilities, rows, present)
    return loss, _of_logits(log_probabilities, rows, present, divisor).to(dtype)


def _gradient(
    logits: torch.Tensor, normaliser: torch.Tensor, targets: torch.Tensor, first_row: int, divisor: Divisor
) -> torch.Tensor:
    """The gradient of the logits in their precision, where a forward pass has left log Σ exp of each token.

    In place of the logits, where they are wide already.
    """
    dtype = logits.dtype
    logits = logits.to(normaliser.dtype).sub_(normaliser.unsqueeze(-1))
    rows, present = _rows(targets, logits.shape[-1], first_row)
    return _of_logits(logits, rows, present, divisor).to(dtype)


@dataclass(frozen=True)
class LossKernels:
    """What is computed of a piece's logits [tokens, rows]: see the functions of these names."""

    loss: Callable[..., Any] = _loss
    loss_and_gradient: Callable[..., Any] = _loss_and_gradient
    gradient: Callable[..., Any] = _gradient


EAGER = LossKernels()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(targets: torch.Tensor, rows: int, first_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(target's row on this rank, whether it is there); any row where it is not."""
    own = targets - first_row
    present = (own >= 0) & (own < rows)
    return own.clamp(0, rows - 1), present


def _cross_entropy(log_probabilities: torch.Tensor, rows: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return -(log_probabilities.gather(-1, rows.unsqueeze(-1)).squeeze(-1) * present).sum()


def _of_logits(
    log_probabilities: torch.Tensor, rows: torch.Tensor, present: torch.Tensor, divisor: Divisor
) -> torch.Tensor:
    """d loss / d logits = (probability - [row is the target]) / divisor, computed in place of what is given."""
    probabilities = log_probabilities.exp_()
    if torch.compiler.is_compiling():
        # Element by element, which fuses with the rest; a scatter would be a kernel of its own.
        columns = torch.arange(probabilities.shape[-1], device=rows.device)
        return (
            probabilities - ((columns == rows.unsqueeze(-1)) & present.unsqueeze(-1)).to(probabilities.dtype)
        ) / divisor
    probabilities.scatter_add_(-1, rows.unsqueeze(-1), -present.to(probabilities.dtype).unsqueeze(-1))
    return probabilities.div_(divisor)


def _log_probabilities(logits: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities [tokens, rows], log Σ exp over the whole vocabulary [tokens])."""
    own = torch.log_softmax(logits, dim=-1)
    normaliser = logits[:, 0] - own[:, 0]
    if group is None:
        return own, normaliser
    gathered = collectives.wait_tensor(_all_gather(normaliser.unsqueeze(0), 0, group))
    whole = torch.logsumexp(gathered, dim=0)
    return own.add_((normaliser - whole).unsqueeze(-1)), whole
