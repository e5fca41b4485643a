"""Gradients under zero 0: messages of any size, and parameters that some ranks have not used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from planner.layout import Layout
from planner.plan import Plan
from runtime import replicas
from runtime.clock import Clock
from runtime.mesh import RankMesh
from runtime.transformer import Chunk
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import run_plain, run_plan
from tests.distributed.pairwise import JOB
from tests.plans import make_plan, tiny_llama

MODEL, STEPS = tiny_llama(), 2


def run_with_messages_of(most_bytes: int, plan: Plan) -> tuple[Any, int, list[str]]:
    """The run on this rank, its number of messages, and the reductions that its timeline shows."""
    found: list[int] = []
    reduced: list[str] = []
    made, add = replicas._messages_of, Clock.add

    def counted(*arguments: Any) -> Any:
        messages = made(*arguments)
        found.append(len(messages))
        return messages

    def booked(clock: Clock, name: str, start: Any, action: str = "") -> None:
        add(clock, name, start, action)
        reduced.extend([action] if action.endswith("R") else [])

    with (
        mock.patch.multiple(replicas, MESSAGE_BYTES=most_bytes, _messages_of=counted),
        mock.patch.object(Clock, "add", booked),
    ):
        return run_plan(plan, STEPS, torch.float64), found[0], reduced


@pytest.mark.parametrize("most_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize("pp", [1, 2])
def test_no_size_of_a_message_changes_what_is_trained(most_bytes: int, pp: int) -> None:
    layout = Layout(pp=pp, dp=2, micro_batch=JOB.global_batch // 4)
    expected = run_plain(make_plan(MODEL, Layout(), JOB), STEPS, torch.float64)
    ranks = run_ranks(run_with_messages_of, layout.world_size, most_bytes, make_plan(MODEL, layout, JOB))
    run, messages, _ = ranks[0]
    assert run.losses == pytest.approx(expected.losses, rel=1e-9)
    assert run.norms == pytest.approx(expected.norms, rel=1e-9)
    assert (messages == 1) == (most_bytes == 2**30)
    # Without a pipeline it is a part of the backward; under one there is one a step, not torch's empty one besides.
    stages = [rank // 2 for rank in range(layout.world_size)]
    assert [reduced for *_, reduced in ranks] == [STEPS * [f"{stage}R"] if pp > 1 else [] for stage in stages]


def gradients_where_some_are_missing(most_bytes: int) -> list[list[float] | None]:
    """Of a parameter that both ranks used, one that rank 1 used, one that none did."""
    module, group = nn.Module(), dist.group.WORLD
    for name in ("both", "one", "none"):
        module.register_parameter(name, nn.Parameter(torch.zeros(3)))
    axis = SimpleNamespace(size=lambda: 2, get_group=lambda: group)
    mesh = cast(RankMesh, SimpleNamespace(axis=lambda _name: axis))
    with mock.patch.object(replicas, "MESSAGE_BYTES", most_bytes):
        reducer = replicas.Replicas([cast(Chunk, module)], mesh, overlap=True)
        reducer.begin()
        rank = dist.get_rank()
        used = [module.get_parameter(name) for name in (("both",), ("one", "both"))[rank]]
        torch.stack([parameter.sum() * (rank + 1) for parameter in used]).sum().backward()
        reducer.finish()
    return [None if p.grad is None else p.grad.tolist() for p in module.parameters()]


@pytest.mark.parametrize("most_bytes", [1, 2**20])
def test_a_gradient_that_a_rank_lacks_comes_from_the_others(most_bytes: int) -> None:
    for found in run_ranks(gradients_where_some_are_missing, 2, most_bytes):
        assert found == [[3.0] * 3, [2.0] * 3, None]
