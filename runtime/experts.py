"""Experts: the router that chooses them, the way of tokens to them and back, and what keeps them evenly loaded.

[Note: Way of a token]
Each rank routes the tokens that it holds, sorted by expert. They go to the ranks of its ep group that hold their
experts (an all-to-all, as uneven as the router is: nothing is dropped or padded), from there to all ranks of the etp
group where experts are cut over it, through the experts, and the same way back, where a token's results are summed
by their weights. The order of every sum is fixed by expert and token, never by rank.

[Note: Balance]
The balance loss is that of each sequence (arXiv 2412.19437, equations 17 to 20): alpha · sum over experts of f_i · P_i,
f_i the share of the sequence's choices that fell on expert i times the number of experts, P_i its mean probability. A
sequence that is cut over tp counts as a whole, so no layout changes the loss. Its gradient joins that of the weights;
the reported loss is the cross-entropy alone. Taken over a batch instead, f and P are of all sequences that a microbatch
has on a dp rank: less is asked of each, and the layout, which says what a microbatch is, changes the loss.

With a selection bias (the same paper, section 2.1.2) the bias of every expert that had more tokens in a step than the
mean goes down by a fixed amount, that of the others up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn

from profiles.experts_spec import Experts as ExpertsSpec
from profiles.input_error import InputError
from profiles.model import ModelSpec

from .gated import gated
from .local_parameters import LocalParameters

BALANCED = ("sequence", "batch")
SMALL = 1e-20  # keeps a sum of sigmoid scores from being zero (transformers' DeepSeek-V3)


@dataclass(frozen=True)
class Balance:
    """`loss_weight` is alpha; `bias_rate` the amount by which a selection bias moves in a step. Zero switches off.

    `over`: of what the loss is taken, one of BALANCED ([Note: Balance]); of a batch, it depends on the layout.
    """

    loss_weight: float = 0.0
    bias_rate: float = 0.0
    over: str = "sequence"

    def check(self) -> None:
        """Raise InputError where the loss is over nothing that there is."""
        if self.over not in BALANCED:
            raise InputError(
                f"{self.over!r} is not known",
                where="--balance-over",
                expected="one of " + ", ".join(BALANCED),
                got=self.over,
                hint="sequence does not depend on the layout",
            )


class Router(LocalParameters):
    """Scores the experts of each token and chooses `top_k` of them.

    `loads` counts the tokens that each expert was given since the last step, once for each backward pass.
    `sequence_group` are the ranks that hold the other parts of the same sequences; `sequences_per_step` those of the
    global batch. `loss_scale` is that of the head's loss ([Note: Loss scale]), a scalar on the device.
    """

    loads: torch.Tensor
    selection_bias: torch.Tensor | None

    def __init__(self, model: ModelSpec, spec: ExpertsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.number, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(spec.number)) if spec.router_bias else None
        self.register_buffer("selection_bias", torch.empty(spec.number) if spec.selection_bias else None)
        self.register_buffer("loads", torch.empty(spec.number, dtype=torch.int64), persistent=False)
        self.balance = Balance()
        self.sequences_per_step = 1
        self.sequence_group: dist.ProcessGroup | None = None
        self.loss_scale: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [batch, sequence, hidden_size] -> (weights, chosen experts), each [batch, sequence, top_k]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.plain(self.bias).to(wide)
        logits = F.linear(x.to(wide), self.plain(self.weight).to(wide), bias)
        sigmoid = self.spec.router_score == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        chosen = self._choose(scores.detach())
        weights = scores.gather(-1, chosen)
        if self.spec.normalize_top_k:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + (SMALL if sigmoid else 0.0))
        weights = weights * self.spec.router_scale
        if torch.is_grad_enabled():
            probabilities = scores / scores.sum(dim=-1, keepdim=True) if sigmoid else scores
            weights = self._balanced(weights, probabilities, chosen)
        return weights.to(x.dtype), chosen

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        if self.selection_bias is not None:
            scores = scores + self.selection_bias
        if spec.groups > 1:
            grouped = scores.unflatten(-1, (spec.groups, -1))
            # The best of a group, or with a selection bias the sum of its best two (DeepSeek-V2, DeepSeek-V3).
            best = min(2, grouped.shape[-1]) if spec.selection_bias else 1
            of_group = grouped.topk(best, dim=-1).values.sum(dim=-1)
            kept = torch.zeros_like(of_group, dtype=torch.bool)
            kept.scatter_(-1, of_group.topk(spec.top_groups, dim=-1).indices, True)
            scores = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(spec.top_k, dim=-1).indices

    def _balanced(self, weights: torch.Tensor, probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The weights, with the balance loss and the count of loads in their backward pass ([Note: Balance])."""
        sequences = probabilities.shape[0]  # that one loss is of, in their mean
        if self.balance.over == "batch":
            probabilities, chosen = (part.flatten(0, 1).unsqueeze(0) for part in (probabilities, chosen))
        batch, sequence, number = probabilities.shape
        loads = chosen.new_zeros(batch, number)
        loads.scatter_add_(1, chosen.flatten(1), torch.ones_like(chosen.flatten(1)))
        whole, parts = loads, 1
        if self.sequence_group is not None and self.balance.loss_weight:
            whole, parts = loads.clone(), self.sequence_group.size()
            dist.all_reduce(whole, group=self.sequence_group)
        tokens = sequence * parts
        shares = whole.to(probabilities.dtype) * (number / (self.spec.top_k * tokens))
        means = probabilities.sum(dim=1) / tokens
        weight = self.balance.loss_weight * (sequences / batch) / self.sequences_per_step
        loss = weight * (shares * means).sum()
        one = torch.ones_like(loss) if self.loss_scale is None else self.loss_scale.to(loss.dtype)
        return _AddLoss.apply(weights, loss, one, loads.sum(dim=0), self.loads)


class _AddLoss(torch.autograd.Function):
    """Passes `weights` on; backward, `loss` gets the gradient `of_loss` and `counter` grows by `loads`.

    Counted backward because forward runs twice where it is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        loss: torch.Tensor,
        of_loss: torch.Tensor,
        loads: torch.Tensor,
        counter: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(of_loss, loads)
        ctx.counter = counter
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_loss, loads = ctx.saved_tensors
        ctx.counter.add_(loads)
        return outputs[0], of_loss, None, None, None


class _WeightedSums(torch.autograd.Function):
    """The sum of the rows of each token, times their weights. torch's own index_add would keep the products too.

    done [rows, hidden_size], weights and tokens [rows] -> [number of tokens, hidden_size].
    """

    @staticmethod
    def forward(ctx: Any, done: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor, number: int) -> torch.Tensor:
        ctx.save_for_backward(done, weights, tokens)
        sums = done.new_zeros(number, done.shape[-1])
        return sums.index_add_(0, tokens, done * weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        done, weights, tokens = ctx.saved_tensors
        of_rows = outputs[0].index_select(0, tokens)
        of_weights = (of_rows * done).sum(dim=-1)
        return of_rows * weights.unsqueeze(-1), of_weights, None, None


class Experts(LocalParameters):
    """This rank's experts, stacked: w1 and w3 [experts, width, hidden_size], w2 [experts, hidden_size, width], and
    their biases, if they have some, without the last dim.

    `ep_group` are the ranks that hold the other experts, `etp_group` those that hold other slices of the width.
    """

    w1_bias: nn.Parameter | None
    w3_bias: nn.Parameter
    w2_bias: nn.Parameter

    def __init__(self, model: ModelSpec, spec: ExpertsSpec) -> None:
        super().__init__()
        self.number, self.activation = spec.number, model.activation
        width, hidden = spec.ffn_hidden_size, model.hidden_size
        self.w1 = nn.Parameter(torch.empty(spec.number, width, hidden))
        self.w3 = nn.Parameter(torch.empty(spec.number, width, hidden))
        self.w2 = nn.Parameter(torch.empty(spec.number, hidden, width))
        for name, outputs in (("w1", width), ("w3", width), ("w2", hidden)):
            bias = nn.Parameter(torch.empty(spec.number, outputs)) if spec.expert_bias else None
            self.register_parameter(f"{name}_bias", bias)
        self.ep_group: dist.ProcessGroup | None = None
        self.etp_group: dist.ProcessGroup | None = None

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size], weights and chosen [tokens, top_k] -> [tokens, hidden_size]."""
        order = chosen.flatten().argsort(stable=True)
        rows = order // chosen.shape[-1]
        loads = torch.bincount(chosen.flatten(), minlength=self.number)
        done = self._at_their_ranks(x[rows], loads)
        return _WeightedSums.apply(done, weights.flatten()[order], rows, len(x))

    def _at_their_ranks(self, sorted_rows: torch.Tensor, loads: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, `loads` of each of all experts -> what the experts make of them."""
        if self.ep_group is None:
            return self._over_width(sorted_rows, loads)
        ranks = self.ep_group.size()
        received = _exchanged(loads, self.ep_group).view(ranks, -1)  # rows from each rank for each expert here
        local = received.shape[1]
        sent, got = loads.view(ranks, local).sum(dim=1).tolist(), received.sum(dim=1).tolist()
        rows = _all_to_all(sorted_rows, got, sent, self.ep_group)
        expert = torch.arange(local, device=loads.device).repeat(ranks).repeat_interleave(received.flatten())
        order = expert.argsort(stable=True)
        done = self._over_width(rows[order], received.sum(dim=0))
        return _all_to_all(done[_inverse(order)], sent, got, self.ep_group)

    def _over_width(self, rows: torch.Tensor, loads: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, `loads` of each expert here -> outputs; gathered and summed over etp."""
        if self.etp_group is None:
            return self._products(rows, loads)
        ranks = self.etp_group.size()
        all_loads = _exchanged(loads.repeat(ranks), self.etp_group).view(ranks, -1)
        own, counts = len(rows), all_loads.sum(dim=1).tolist()
        # Uneven gathers and sums, as all-to-alls of the same bytes: every rank sends all it has to each.
        gathered = _all_to_all(rows.repeat(ranks, 1), counts, [own] * ranks, self.etp_group)
        expert = (
            torch.arange(all_loads.shape[1], device=loads.device).repeat(ranks).repeat_interleave(all_loads.flatten())
        )
        order = expert.argsort(stable=True)
        done = self._products(gathered[order], all_loads.sum(dim=0))
        parts = _all_to_all(done[_inverse(order)], [own] * ranks, counts, self.etp_group)
        return parts.view(ranks, own, rows.shape[-1]).sum(dim=0)

    def _products(self, rows: torch.Tensor, loads: torch.Tensor) -> torch.Tensor:
        """w2(gated(w1 x, w3 x)) of each expert on its rows."""
        weights = [self.plain(w) for w in (self.w1, self.w3, self.w2)]
        biases = self._biases()
        if rows.device.type == "cuda" and rows.dtype == torch.bfloat16:
            ends = loads.cumsum(0).to(torch.int32)

            def product(x: torch.Tensor, which: int) -> torch.Tensor:
                y = torch._grouped_mm(x, weights[which].transpose(1, 2), offs=ends)  # pyright: ignore[reportPrivateImportUsage]
                return y if biases is None else y + biases[which].repeat_interleave(loads, dim=0, output_size=len(x))

            return product(gated(self.activation, product(rows, 0), product(rows, 1)), 2)
        pieces = rows.split(loads.tolist())
        by_expert = [(None,) * 3] * len(pieces) if biases is None else zip(*biases, strict=True)
        # An expert without tokens still takes part, so that its gradient is zero and not missing.
        return torch.cat(
            [
                F.linear(gated(self.activation, F.linear(p, a, i), F.linear(p, b, j)), c, k)
                for p, a, b, c, (i, j, k) in zip(pieces, *weights, by_expert, strict=True)
            ]
        )

    def _biases(self) -> tuple[torch.Tensor, ...] | None:
        """Those of w1, w3 and w2, if there are some. Each etp rank adds its share of the last, whole on all of them, to
        its part of a sum over them, and sees the gradient of the sum, which is the whole one."""
        if self.w1_bias is None:
            return None
        b1, b3, b2 = (self.plain(b) for b in (self.w1_bias, self.w3_bias, self.w2_bias))
        if self.etp_group is not None:
            b2 = b2 - b2.detach() * (1 - 1 / self.etp_group.size())
        return b1, b3, b2


def routers_of(chunks: Sequence[nn.Module]) -> list[Router]:
    """Every router of a rank's chunks, in the order of the layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]


def update_selection_bias(
    routers: Sequence[Router], groups: Sequence[dist.ProcessGroup], sound: torch.Tensor | bool = True
) -> None:
    """Move each selection bias by what its experts were given in this step on all ranks of `groups`; loads start anew.

    Where `sound`, a bool on the device, is False, biases stay as they are, as all else does (`optimizer.update`).
    Every rank of the groups must call it with the same routers.
    """
    biased = [router for router in routers if router.selection_bias is not None and router.balance.bias_rate]
    if biased:
        loads = torch.stack([router.loads for router in biased])
        for group in groups:
            dist.all_reduce(loads, group=group)
        for router, load in zip(biased, loads, strict=True):
            assert router.selection_bias is not None
            mean = load.sum() / len(load)
            direction = (mean - load).sign().to(router.selection_bias.dtype)
            router.selection_bias += router.balance.bias_rate * direction * sound
    for router in routers:
        router.loads.zero_()


def _exchanged(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Each rank's part of `counts` to it, and theirs for this rank."""
    return collectives.wait_tensor(collectives.all_to_all_single(counts, None, None, group))


def _all_to_all(rows: torch.Tensor, got: list[int], sent: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    return collectives.wait_tensor(collectives.all_to_all_single_autograd(rows, got, sent, group))


def _inverse(order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
