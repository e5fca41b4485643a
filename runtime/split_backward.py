"""The weights' half of a split backward, for torch 2.11 and 2.12, whose own is wrong; to be deleted with their support.

Between the halves those versions let go of nodes that are functions written in Python, and raise. Silently wrong they
are where operations that one leads to the other have the same weight, and 2.11 where an operation has several outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node
from torch.distributed.pipelining._backward import _get_grad_fn_or_grad_acc
from torch.torch_version import TorchVersion

TORCH_IS_RIGHT = TorchVersion(torch.__version__) >= "2.13"  # versions compare as numbers


def graph_of(outputs: Sequence[torch.Tensor]) -> list[Node | None]:
    """Nodes behind `outputs` that keep their graph alive when they are detached from it."""
    return [output.view_as(output).grad_fn for output in outputs]


def weights_half(weights: Iterable[torch.nn.Parameter], groups: Sequence[dict[str, Any]]) -> None:
    """Add the gradients of `weights` to them, as `stage_backward_weight` of torch 2.13 does.

    Each of `groups`, as `stage_backward_input` makes them: `intermediates`, the nodes of operations that have weights;
    `grads`, for each the gradients of its outputs; `params`, the nodes that sum the weights' gradients.
    """
    weight_of = {_get_grad_fn_or_grad_acc(weight): weight for weight in weights}
    for group in groups:
        given = list(zip(group.pop("intermediates"), group.pop("grads"), strict=True))
        outputs = [
            (GradientEdge(node, place), gradient)
            for node, gradients in given
            for place, gradient in enumerate(gradients)
            if gradient is not None
        ]
        # What a node was given is all of it: what another of the group sends it now would count twice.
        several = given if len(given) > 1 else []
        hooks = [node.register_prehook(lambda _, all_of_it=gradients: all_of_it) for node, gradients in several]
        edges = [GradientEdge(node, 0) for node in group["params"]]
        found = torch.autograd.grad([edge for edge, _ in outputs], edges, [gradient for _, gradient in outputs])
        for hook in hooks:
            hook.remove()
        for node, gradient in zip(group["params"], found, strict=True):
            weight = weight_of[node]
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
