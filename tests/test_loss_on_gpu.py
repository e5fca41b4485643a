"""The head's loss on a GPU, where rows of the logits are kept apart ([Note: Loss in pieces])."""

from __future__ import annotations

import pytest
import torch

from planner.layout import LOSS_TOKENS
from runtime.loss import LossWay, head_loss


def loss_and_gradients(device: str, dtype: torch.dtype, tokens: int, rows: int, *, again: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 64).to(device, dtype).requires_grad_()
    weight = (torch.randn(rows, 64) / 8).to(device, dtype).requires_grad_()
    bias = (torch.randn(rows) / 8).to(device, dtype).requires_grad_()
    targets = torch.randint(0, rows, (1, tokens)).to(device)
    loss = head_loss(hidden, weight, targets, LossWay(tokens_per_step=tokens, logits_again=again), bias)
    return [loss.detach().cpu(), *(g.cpu().double() for g in torch.autograd.grad(loss, (hidden, weight, bias)))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("rows", [512, 509])
@pytest.mark.parametrize("tokens", [LOSS_TOKENS // 2, 2 * LOSS_TOKENS + 100])
def test_a_gpu_gives_what_float64_gives(tokens: int, rows: int, *, again: bool) -> None:
    exact = loss_and_gradients("cpu", torch.float64, tokens, rows, again=again)
    rounded = loss_and_gradients("cpu", torch.bfloat16, tokens, rows, again=again)
    found = loss_and_gradients("cuda", torch.bfloat16, tokens, rows, again=again)
    for true, on_cpu, on_gpu in zip(exact, rounded, found, strict=True):
        assert (on_gpu - true).norm() <= 1.2 * (on_cpu - true).norm() + 1e-3 * true.norm()
