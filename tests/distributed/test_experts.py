"""Routers: what they choose, how they are balanced, and that the most uneven of them trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.experts_spec import Experts as ExpertsSpec
from profiles.model import ModelSpec
from runtime.experts import BALANCED, Balance, Router, routers_of, update_selection_bias
from runtime.step import build_state, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of
from tests.plans import DEEPSEEK_EXPERTS, make_plan, tiny_experts, tiny_shared_experts

JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
BATCH, SEQUENCE = 2, 12


def router_of(model: ModelSpec) -> Router:
    assert model.experts is not None
    router = Router(model, model.experts).double()
    torch.manual_seed(3)
    torch.nn.init.normal_(router.weight)
    for buffer in router.buffers():
        buffer.zero_()
    return router


def hidden_states(model: ModelSpec) -> torch.Tensor:
    return torch.randn(
        BATCH, SEQUENCE, model.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )


@pytest.mark.parametrize("over", BALANCED)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_loss_is_of_each_sequence_or_of_the_batch(score: str, over: str) -> None:
    model = tiny_experts(experts=ExpertsSpec(number=4, top_k=2, ffn_hidden_size=48, router_score=score))
    router, x = router_of(model), hidden_states(model)
    router.sequences_per_step = 8
    weights, chosen = router(x)
    weights.sum().backward()  # without a balance loss
    assert router.weight.grad is not None
    plain, router.weight.grad = router.weight.grad.clone(), None
    router.balance = Balance(loss_weight=0.3, over=over)
    router(x)[0].sum().backward()
    balanced = router.weight.grad - plain

    logits = F.linear(x, router.weight)
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    probabilities = scores / scores.sum(-1, keepdim=True)
    by_hand = torch.zeros((), dtype=torch.float64)
    for sequences in [slice(0, BATCH)] if over == "batch" else [slice(i, i + 1) for i in range(BATCH)]:
        number = sequences.stop - sequences.start
        for expert in range(4):
            share = 4 / (2 * SEQUENCE * number) * (chosen[sequences] == expert).sum()
            by_hand = by_hand + 0.3 * number / 8 * share * probabilities[sequences, :, expert].mean()
    router.weight.grad = None
    by_hand.backward()
    torch.testing.assert_close(balanced, router.weight.grad)
    assert balanced.norm() > 1e-3 * plain.norm() > 0


def test_tokens_choose_within_the_best_groups() -> None:
    router = router_of(tiny_shared_experts())
    _, chosen = router(hidden_states(tiny_shared_experts()))
    in_group = DEEPSEEK_EXPERTS.number // DEEPSEEK_EXPERTS.groups
    groups = (chosen // in_group).flatten(0, 1)
    assert max(len(set(token.tolist())) for token in groups) <= DEEPSEEK_EXPERTS.top_groups
    assert all(len(set(token.tolist())) == DEEPSEEK_EXPERTS.top_k for token in chosen.flatten(0, 1))


def test_selection_bias_pulls_towards_the_experts_that_had_too_little() -> None:
    model = tiny_shared_experts()
    router = router_of(model)
    router.balance = Balance(bias_rate=0.5)
    router(hidden_states(model))[0].sum().backward()
    loads = router.loads.clone()
    assert loads.sum() == BATCH * SEQUENCE * DEEPSEEK_EXPERTS.top_k
    update_selection_bias([router], [])
    assert router.selection_bias is not None
    mean = loads.sum() / len(loads)
    assert router.selection_bias.tolist() == [0.5 * float((mean - load).sign()) for load in loads]
    assert router.loads.tolist() == [0] * 8


def test_loads_are_counted_once_where_forward_runs_twice() -> None:
    model = tiny_shared_experts()
    router, x = router_of(model), hidden_states(model).requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda y: router(y)[0].sum(), x, use_reentrant=False).backward()
    with torch.no_grad():
        router(x)
    assert router.loads.sum() == BATCH * SEQUENCE * DEEPSEEK_EXPERTS.top_k


def all_to_the_first_experts(plan: Plan, steps: int) -> list[tuple[float, float]]:
    """Losses and norms where every token's choice is the same `top_k` experts."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float64, seed=7, weight_decay=0.1)
    for router in routers_of(state.chunks):
        assert router.selection_bias is not None
        router.selection_bias[: router.spec.top_k] = 100.0
    results = []
    for step in range(steps):
        tokens = own_samples(plan, tokens_of(plan, step), state.mesh.coordinate.dp)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        result = training_step(state, inputs, targets, learning_rate=1e-3, clip_norm=None)
        results.append((result.loss, result.grad_norm))
    return results


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(dp=2, ep=2), marks=pytest.mark.full),
        Layout(dp=4, ep=4, zero=3, dp_shard=4),
        Layout(tp=2, dp=2, sequence_parallel=True, ep=2, etp=2),
        pytest.param(Layout(pp=2, dp=2, ep=2, zero=1, dp_shard=2), marks=pytest.mark.full),
    ],
    ids=lambda layout: layout.short(),
)
def test_a_router_that_sends_all_tokens_to_the_same_experts_trains(layout: Layout) -> None:
    experts = replace(DEEPSEEK_EXPERTS, groups=1, top_groups=1, top_k=2)
    model = tiny_shared_experts(experts=experts)
    alone = run_ranks(all_to_the_first_experts, 1, make_plan(model, Layout(), JOB), 3)[0]
    for rank in run_ranks(all_to_the_first_experts, layout.world_size, make_plan(model, layout, JOB), 3):
        for (loss, norm), (expected_loss, expected_norm) in zip(rank, alone, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-9)
            assert norm == pytest.approx(expected_norm, rel=1e-9)
