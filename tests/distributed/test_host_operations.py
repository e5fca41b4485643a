"""The operations that the host issues for experts, and for attention under cp, are those that the cost model counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from planner.compute_cost import ComputeModel
from planner.compute_seconds import ComputeCost
from planner.job import TrainingJob
from planner.layout import Layout
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import HOST_OPERATIONS
from profiles.software import load_software
from runtime.experts import Experts, Router
from runtime.head_exchange import all_to_all_attention
from runtime.ring_attention import ring_attention
from runtime.whole_attention import Reach
from tests.distributed.harness import run_ranks
from tests.operations import operations_of
from tests.oracles.small_world import small_hardware
from tests.plans import tiny_experts

TOKENS = 24


def counted(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """(forward, backward) of the router, and of the experts: alone, and as one rank of an ep and of an etp group."""
    assert model.experts is not None
    x = torch.randn(1, TOKENS, model.hidden_size, requires_grad=True)
    router = Router(model, model.experts)
    torch.nn.init.normal_(router.weight)
    found = {"router": operations_of(lambda: router(x)[0], [x, router.weight])}
    weights, chosen = (part.detach().flatten(0, 1) for part in router(x))
    rows = x.detach()[0].requires_grad_()
    weights.requires_grad_()
    for group in ("", "ep_group", "etp_group"):
        experts = Experts(model, model.experts)
        for weight in experts.parameters():
            torch.nn.init.normal_(weight)
        if group:
            setattr(experts, group, dist.group.WORLD)
        inputs = [rows, weights, *experts.parameters()]
        found[group or "alone"] = operations_of(lambda e=experts: e(rows, weights, chosen), inputs)
    return found


@pytest.mark.parametrize("number", [2, 5])
def test_the_host_issues_what_is_counted(number: int) -> None:
    model = tiny_experts()
    assert model.experts is not None
    model = replace(model, experts=replace(model.experts, number=number))
    found = run_ranks(counted, 1, model)[0]
    assert found["router"] == HOST_OPERATIONS["router"]
    for way in (0, 1):
        once = HOST_OPERATIONS["permute"][way] + HOST_OPERATIONS["experts"][way]
        assert found["alone"][way] == once + number * HOST_OPERATIONS["expert"][way]
        # Within etp the rows are repeated, backward summed, and the parts are summed besides.
        for group, more in (("ep_group", (0, 0)), ("etp_group", (2, 3))):
            exchanged = found[group][way] - found["alone"][way]
            assert exchanged == HOST_OPERATIONS["exchange"][way] + more[way]


def counted_under_cp() -> dict[str, tuple[int, int]]:
    """(forward, backward) of attention in one call, around the ring, and with heads exchanged."""
    q, k, v = (torch.randn(1, 4, 16, 8, requires_grad=True) for _ in range(3))
    group = dist.group.WORLD
    assert group is not None
    ways = {
        "alone": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "ring": lambda: ring_attention(q, k, v, group, causal=True),
        "head_exchange": lambda: all_to_all_attention(q, k, v, group, Reach()),
    }
    return {name: operations_of(attention, [q, k, v]) for name, attention in ways.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_host_issues_what_is_counted_under_cp(ranks: int) -> None:
    """Moving dims of a single head is no copy, so an exchange is of a few operations fewer on four ranks."""
    found = run_ranks(counted_under_cp, ranks)[0]
    for way in (0, 1):
        ring = HOST_OPERATIONS["ring"][way] + (ranks - 1) * HOST_OPERATIONS["ring_step"][way]
        assert found["ring"][way] == found["alone"][way] + ring
        exchange = HOST_OPERATIONS["head_exchange"][way]
        assert found["head_exchange"][way] - found["alone"][way] == pytest.approx(exchange, abs=2)


def block(hardware: HardwareProfile, **layout: int) -> ComputeCost:
    model = ComputeModel(tiny_experts(), hardware, TrainingJob(global_batch=8, sequence=16, precision="fp32"), OURS)
    return model.block(Layout(micro_batch=1, **layout), "experts")


OURS = load_software("meshwright").software


def test_experts_are_a_loop_where_the_host_is_the_device() -> None:
    """One expert fewer on each of two ranks: the operations of a loop are fewer, those of a grouped product are not."""
    experts = tiny_experts().experts
    assert experts is not None
    fewer = experts.number - experts.number // 2
    for each in (0.0, 1e-5):
        hardware = replace(small_hardware(), operation_overhead_seconds=each)
        whole, cut = block(hardware), block(hardware, dp=2, ep=2)
        for way, passes in enumerate((("forward",), ("backward_input", "backward_weight"))):
            less = sum(getattr(whole, p).operations - getattr(cut, p).operations for p in passes)
            loop = fewer * HOST_OPERATIONS["expert"][way] * bool(each)
            assert less == pytest.approx(loop - HOST_OPERATIONS["exchange"][way])
