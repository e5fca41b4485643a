"""Bytes that a plan predicts for ranks that hold experts, beside what they hold: routed evenly, and all to one rank."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.experts_spec import Experts
from runtime.dry_run import quiet_metadata
from runtime.live_bytes import LiveBytes
from runtime.step import build_state, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of
from tests.distributed.memory_cases import predicted_parts
from tests.plans import make_plan, tiny_experts
from tests.thinned import every

NUMBER, TOP_K = 4, 2
MODEL = tiny_experts(
    hidden_size=128,
    heads=4,
    head_dim=32,
    kv_heads=2,
    ffn_hidden_size=256,
    vocab_size=512,
    max_positions=128,
    experts=Experts(number=NUMBER, top_k=TOP_K, ffn_hidden_size=256),
)
JOB = TrainingJob(global_batch=8, sequence=128, precision="fp32")
MOST = 0.05  # relative; which expert a token goes to is the router's to say


def choice(scores: torch.Tensor, chosen: tuple[int, ...]) -> torch.Tensor:
    """`chosen` for each token; without, each token the next experts in turn."""
    tokens = scores[..., 0].numel()
    in_turn = (torch.arange(tokens).unsqueeze(-1) + torch.arange(TOP_K)) % NUMBER
    return (torch.tensor([chosen] * tokens) if chosen else in_turn).view(*scores.shape[:-1], TOP_K)


def held(plan: Plan, chosen: tuple[int, ...]) -> int:
    """Bytes of this rank at the peak of its second step; every token goes to the `chosen` experts, or as they come."""
    warnings.simplefilter("ignore")
    with LiveBytes("all") as live, quiet_metadata():
        state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.1)
        for router in state.routers:
            router._choose = partial(choice, chosen=chosen)  # type: ignore[method-assign]
        for step in range(2):
            tokens = own_samples(plan, tokens_of(plan, step), state.mesh.coordinate.dp)
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            gc.collect()
            start = live.mark()
            training_step(state, inputs, targets, learning_rate=1e-3, clip_norm=None)
            del tokens, inputs, targets
        return sum(live.peak(start).values())


def predicted(plan: Plan) -> float:
    """Bytes of the tensors of pipeline rank 0."""
    return sum(predicted_parts(plan, 0).values())


CASES: list[tuple[float, dict[str, Any]]] = [
    (2.0, {"dp": 2, "ep": 2, "zero": 1}),
    (1.0, {"dp": 2, "ep": 2}),
    (1.0, {"dp": 4, "ep": 4, "zero": 3}),
    (1.0, {"micro_batch": 4}),
    (2.0, {"dp": 2, "ep": 2}),
    (1.0, {"tp": 2, "sequence_parallel": True, "etp": 2, "micro_batch": 4}),
    (2.0, {"dp": 4, "ep": 4, "zero": 3}),
    (2.0, {"tp": 2, "dp": 2, "sequence_parallel": True, "ep": 2, "etp": 2}),
]


@pytest.mark.parametrize(("imbalance", "axes"), every(3, CASES), ids=str)
def test_the_busiest_rank_holds_what_its_plan_says(imbalance: float, axes: dict[str, Any]) -> None:
    """All tokens to the first two of four experts: with ep 2 and 4 these lie on half of the ranks."""
    sharded = {"dp_shard": axes["dp"]} if axes.get("zero") else {}
    layout = Layout(**{"micro_batch": 2} | axes | sharded)
    plan = make_plan(MODEL, layout, replace(JOB, expert_imbalance=imbalance))
    measured = run_ranks(held, layout.world_size, plan, (0, 1) if imbalance > 1 else ())
    assert predicted(plan) == pytest.approx(max(measured), rel=MOST)
    if imbalance > 1:
        assert predicted(make_plan(MODEL, layout, JOB)) < max(measured) * (1 - MOST)
