"""The vocabulary head's cross-entropy, some tokens at a time: the logits of a microbatch never exist as a whole.

[Note: Loss in pieces]
For every `LOSS_TOKENS` tokens the logits are computed, turned into the loss and into its gradient in place, and that
into the gradients of the hidden states and of the head's weight; then they are gone. So the backward pass is left with
nothing to compute, and what is kept has the size of the hidden states and of the weight, not of the logits. Schedules
that hold many microbatches before their first backward would hold as many gradients of the weight; there the logits
are computed once more in the backward pass (`logits_again`).

On a GPU products of 16 bits are several times as slow where rows of the logits do not begin at multiples of 16 bytes,
as with GPT-2's 50257 words. There rows of logits and of their gradients are a little apart (`_room`).

With the vocabulary cut over tp each rank has the logits of its rows. All that the ranks must agree on is the logarithm
of the sum of exponentials of each token: one all-gather of a number a token and rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from planner.layout import LOSS_TOKENS

from .loss_kernels import EAGER, LossKernels, wide

_ALIGNED = 8  # elements of 16 bits


@dataclass(frozen=True)
class LossWay:
    """How a head computes its loss.

    `tokens_per_step`: tokens of the whole step, by which the sum of cross-entropies is divided, so that the shares of
    microbatches, dp ranks and tp ranks add up to the mean and gradients are summed, never averaged. `first_row`,
    `group`: the rows of the vocabulary that this rank holds start there, and the group of those that hold the others.
    `counted`: how many tokens of the step count, a whole number, where only the data tell; it takes the place of
    tokens_per_step then. `backward_twice`: the schedule runs a backward in two halves, each of which asks for all
    gradients. `predicted`: of each sequence only so many tokens on this rank, at most, have a target; None: all have.
    `scale`, a scalar on the device, multiplies the gradients and not the loss ([Note: Loss scale]).
    """

    tokens_per_step: int = 1
    predicted: int | None = None
    first_row: int = 0
    group: dist.ProcessGroup | None = None
    logits_again: bool = False
    backward_twice: bool = False
    counted: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    kernels: LossKernels = EAGER

    @property
    def tokens(self) -> int | torch.Tensor:
        """What sums over tokens are divided by, to have the step's loss."""
        return self.tokens_per_step if self.counted is None else self.counted

    def divisors(self, targets: torch.Tensor, dtype: torch.dtype) -> int | torch.Tensor:
        """What the gradient of each token's logits is divided by, scaled; without a target it is thereby zero."""
        divisor = self.tokens if self.scale is None else self.tokens / self.scale
        if self.predicted is None and self.counted is None:
            return divisor
        one = torch.as_tensor(divisor, dtype=dtype, device=targets.device)
        return torch.where(targets < 0, torch.inf, one).unsqueeze(-1)


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, way: LossWay, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """This rank's share of the loss, in nats; a scalar in float32, or float64 for float64.

    hidden [batch, sequence, hidden_size] whole, weight [rows, hidden_size] and bias [rows] of this rank, targets
    [batch, sequence]; or the first and the last of so many tokens alone. The loss is the end of its graph: it must be
    added to others or scaled after its backward, not before.
    """
    return _HeadLoss.apply(hidden.flatten(0, -2), weight, bias, targets.flatten(), way, torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        way: LossWay,
        wanted: bool,
    ) -> torch.Tensor:
        ctx.way = way
        now = wanted and not way.logits_again
        gradients = _Gradients(hidden, weight, bias, way) if now else None
        divisors = way.divisors(targets, wide(hidden.dtype))
        total = hidden.new_zeros((), dtype=wide(hidden.dtype))
        normalisers = []
        for piece in _pieces(len(hidden)):
            if gradients is not None:
                loss, of_logits = way.kernels.loss_and_gradient(
                    _logits(hidden[piece], weight, bias),
                    targets[piece],
                    way.first_row,
                    _of_piece(divisors, piece),
                    way.group,
                )
                gradients.add(piece, of_logits)
                del of_logits  # before the next piece's
            else:
                loss, normaliser = way.kernels.loss(
                    _logits(hidden[piece], weight, bias), targets[piece], way.first_row, way.group
                )
                normalisers.append(normaliser)
            total += loss
        if gradients is not None:
            ctx.gradients = gradients
        elif wanted:
            ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        return total / way.tokens

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (of_loss,) = outputs
        assert of_loss.is_cuda or type(of_loss) is not torch.Tensor or of_loss.item() == 1, "the loss ends its graph"
        way: LossWay = ctx.way
        if way.logits_again:
            hidden, weight, bias, targets, normalisers = ctx.saved_tensors
            gradients = _Gradients(hidden, weight, bias, way)
            divisors = way.divisors(targets, wide(hidden.dtype))
            for piece in _pieces(len(hidden)):
                of_logits = way.kernels.gradient(
                    _logits(hidden[piece], weight, bias),
                    normalisers[piece],
                    targets[piece],
                    way.first_row,
                    _of_piece(divisors, piece),
                )
                gradients.add(piece, of_logits)
                del of_logits  # before the next piece's
            return *gradients.take(), None, None, None
        gradients = ctx.gradients
        if not way.backward_twice:
            ctx.gradients = None  # so that autograd may keep the weight's as the parameter's, without a copy
        return *gradients.take(), None, None, None


class _Gradients:
    """The gradients of hidden states, weight and bias, filled piece by piece."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, way: LossWay) -> None:
        self.inputs, self.weights, self.way = hidden.detach(), weight.detach(), way
        self.hidden = torch.empty_like(self.inputs)
        self.weight: torch.Tensor | None = None
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=wide(bias.dtype))

    def add(self, piece: slice, of_logits: torch.Tensor) -> None:
        """What the gradient of a piece's logits [tokens, rows] makes of hidden states and weight."""
        if (room := _room(len(of_logits), of_logits.shape[1], of_logits)) is not None:
            of_logits = room.copy_(of_logits)
        torch.mm(of_logits, self.weights, out=self.hidden[piece])
        if self.bias is not None:
            self.bias += of_logits.sum(dim=0, dtype=self.bias.dtype)
        factors, sums = (of_logits.T, self.inputs[piece]), wide(self.weights.dtype)
        if len(self.inputs) <= LOSS_TOKENS:
            self.weight = torch.mm(*factors)
        elif sums == self.weights.dtype:
            self.weight = torch.mm(*factors) if self.weight is None else self.weight.addmm_(*factors)
        else:
            added = torch.mm(*factors)
            self.weight = added.to(sums) if self.weight is None else self.weight.add_(added)

    def take(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(of the hidden states [tokens, hidden_size], of the weight, of the bias), in the precision of each."""
        assert self.weight is not None
        hidden, weight = self.hidden, self.weight.to(self.weights.dtype)
        bias = None if self.bias is None else self.bias.to(self.weights.dtype)
        if not self.way.backward_twice:
            del self.hidden, self.weight
        return hidden, weight, bias


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = _room(len(hidden), len(weight), hidden)
    return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


def _room(tokens: int, rows: int, like: torch.Tensor) -> torch.Tensor | None:
    """[tokens, rows] with rows that begin where a GPU's products of 16 bits want them; None where any do."""
    if not like.is_cuda or like.element_size() != 2 or rows % _ALIGNED == 0:
        return None
    return like.new_empty(tokens, -(-rows // _ALIGNED) * _ALIGNED)[:, :rows]


def _of_piece(divisors: int | torch.Tensor, piece: slice) -> int | torch.Tensor:
    return divisors[piece] if isinstance(divisors, torch.Tensor) and divisors.ndim else divisors


def _pieces(tokens: int) -> list[slice]:
    return [slice(start, min(start + LOSS_TOKENS, tokens)) for start in range(0, tokens, LOSS_TOKENS)]
