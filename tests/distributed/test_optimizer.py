"""The learning rate's path, which parameters decay, and when gradients are clipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from profiles.input_error import InputError
from runtime.gradients import clip, square_sum
from runtime.learning_rate import RateSchedule, learning_rate_at
from runtime.optimizer import Adam, build_optimizer
from runtime.parameters import initialise
from runtime.transformer import Chunk, build_chunk
from tests.plans import make_plan, tiny_gpt2


def rates(steps: int, warmup_steps: int, **schedule: Any) -> list[float]:
    how = RateSchedule(**schedule)
    return [
        learning_rate_at(step, steps=steps, warmup_steps=warmup_steps, peak=1.0, minimum=0.1, schedule=how)
        for step in range(1, steps + 1)
    ]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    assert rates(9, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert rates(3, 0) == pytest.approx([1.0, 0.55, 0.1])
    assert rates(2, 4) == pytest.approx([0.25, 0.5])
    assert rates(1, 0) == [1.0]


def test_other_schedules_fall_to_the_same_minimum() -> None:
    assert rates(6, 2, shape="linear") == pytest.approx([0.5, 1.0, 1.0, 0.7, 0.4, 0.1])
    assert rates(4, 2, shape="constant") == [0.5, 1.0, 1.0, 1.0]
    assert rates(7, 2, shape="wsd", cooldown_steps=3) == pytest.approx([0.5, 1, 1, 1, 0.7, 0.4, 0.1])
    assert rates(10, 0, shape="wsd") == pytest.approx([1.0] * 8 + [0.55, 0.1])  # a fifth of the steps
    assert rates(16, 4, shape="inverse-square-root")[4:16:11] == pytest.approx([(4 / 5) ** 0.5, 0.5])
    assert rates(500, 1, shape="inverse-square-root")[-1] == 0.1
    assert rates(6, 1, decay_steps=4) == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("cooldown", "half"), [("linear", 0.55), ("cosine", 0.55), ("minus-sqrt", 0.363604), ("exponential", 0.472792)]
)
def test_the_cooldown_has_a_shape(cooldown: str, half: float) -> None:
    found = rates(8, 0, shape="wsd", cooldown=cooldown, cooldown_steps=4)
    assert found[:4] == [1.0] * 4
    assert found[5] == pytest.approx(half, abs=1e-6)
    assert found[7] == 0.1


def test_a_schedule_that_cannot_be_is_refused() -> None:
    for schedule, said in (
        (RateSchedule(shape="cosin"), "expected: one of cosine, linear"),
        (RateSchedule(cooldown_steps=3), "only wsd has a cooldown"),
        (RateSchedule(shape="wsd", cooldown_steps=9), "expected: at most the 8 steps after the warm-up"),
    ):
        with pytest.raises(InputError, match=said):
            schedule.check(steps=10, warmup_steps=2)


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
    assert (decaying["betas"], decaying["eps"]) == ((0.9, 0.95), 1e-8)
    other = build_optimizer([chunk], weight_decay=0.1, adam=Adam(betas=(0.8, 0.99), epsilon=1e-6)).param_groups[1]
    assert (other["betas"], other["eps"]) == ((0.8, 0.99), 1e-6)
    assert len(decaying["params"]) + len(constant["params"]) == len(list(chunk.parameters()))
