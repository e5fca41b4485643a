"""Weights' halves of our own: the gradients of an undivided backward, where torch before 2.13 loses or doubles them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from runtime.split_backward import TORCH_IS_RIGHT, graph_of, weights_half


class Product(torch.autograd.Function):
    """x · w and three times that."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, w)
        return x @ w, 3 * (x @ w)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        gradient = gradients[0] + 3 * gradients[1]
        return gradient @ w.T, x.T @ gradient


Stage = Callable[[torch.Tensor, list[torch.nn.Parameter]], torch.Tensor]
STAGES: dict[str, Stage] = {
    "plain": lambda x, w: (x @ w[0]).tanh() @ w[1] + x,
    "one weight twice, side by side": lambda x, w: (x @ w[0]).tanh() + (x.sin() @ w[0]) @ w[1],
    "one weight twice, one after the other": lambda x, w: ((x @ w[0]).tanh() @ w[0]).tanh() @ w[1] + x,
    "a Python function at the end": lambda x, w: Product.apply((x @ w[0]).tanh(), w[1])[0],
    "Python functions inside": lambda x, w: Product.apply(Product.apply(x, w[0])[0].tanh(), w[1])[0].tanh(),
    "its second output": lambda x, w: Product.apply(x, w[0])[1].sin() @ w[1] + x,
    "both outputs": lambda x, w: Product.apply(x, w[0])[1].sin() @ w[1] + Product.apply(x, w[0])[0].cos(),
}


def gradients(stage: Stage, half: Callable[..., Any] | None) -> list[torch.Tensor | None]:
    """Of the input and of the weights after two microbatches; without `half` by undivided backward passes."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64)) for _ in range(2)]
    of_inputs: list[torch.Tensor | None] = []
    for _ in range(2):
        x = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        output = stage(x, weights)
        given = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        if half is None:
            output.backward(given)
        else:
            held = graph_of([output]) if half is weights_half else None
            _, groups = stage_backward_input([output], [given], [x], iter(weights))
            del output
            half(iter(weights), groups)
            del held
        of_inputs.append(x.grad)
    return [*of_inputs, *(weight.grad for weight in weights)]


@pytest.mark.parametrize("name", STAGES)
def test_halves_are_the_whole(name: str) -> None:
    torch.testing.assert_close(gradients(STAGES[name], weights_half), gradients(STAGES[name], None))


def is_right(stage: Stage) -> bool:
    """Whether torch's own halves are; one that raises is not."""
    try:
        torch.testing.assert_close(gradients(stage, stage_backward_weight), gradients(stage, None))
    except (AssertionError, RuntimeError):
        return False
    return True


def test_torchs_own_halves_are_taken_where_they_are_right() -> None:
    assert all(is_right(stage) for stage in STAGES.values()) == TORCH_IS_RIGHT
