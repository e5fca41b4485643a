"""The learning rate's path, which parameters decay, and when gradients are clipped."""

from __future__ import annotations

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from runtime.gradients import clip, square_sum
from runtime.optimizer import build_optimizer, learning_rate_at
from runtime.parameters import initialise
from runtime.transformer import Chunk, build_chunk
from tests.plans import make_plan, tiny_gpt2


def rates(steps: int, warmup_steps: int) -> list[float]:
    return [
        learning_rate_at(step, steps=steps, warmup_steps=warmup_steps, peak=1.0, minimum=0.1)
        for step in range(1, steps + 1)
    ]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    assert rates(9, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert rates(3, 0) == pytest.approx([1.0, 0.55, 0.1])
    assert rates(2, 4) == pytest.approx([0.25, 0.5])
    assert rates(1, 0) == [1.0]


def chunk_with_gradients() -> Chunk:
    plan = make_plan(tiny_gpt2(), Layout(), TrainingJob(global_batch=1, sequence=16, precision="fp32"))
    chunk = build_chunk(plan.model, plan.stages[0]).to_empty(device="cpu")
    chunk.tie()
    initialise([chunk], layers=4, seed=0)
    for parameter in chunk.parameters():
        parameter.grad = torch.ones_like(parameter)
    return chunk


def test_only_gradients_above_the_limit_are_clipped() -> None:
    chunk = chunk_with_gradients()
    norm = square_sum([chunk]).sqrt()
    assert norm.item() == pytest.approx(sum(p.numel() for p in chunk.parameters()) ** 0.5)  # the tied pair once
    clip([chunk], norm, 1.001 * norm.item())
    assert square_sum([chunk]).sqrt() == norm
    clip([chunk], norm, 0.999 * norm.item())
    assert square_sum([chunk]).sqrt().item() == pytest.approx(0.999 * norm.item())


def test_matrices_decay_and_vectors_do_not() -> None:
    chunk = chunk_with_gradients()
    decaying, constant = build_optimizer([chunk], weight_decay=0.1).param_groups
    assert (decaying["weight_decay"], constant["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in constant["params"]} == {1}
    assert len(decaying["params"]) + len(constant["params"]) == len(list(chunk.parameters()))
