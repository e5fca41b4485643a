"""Optimizer state in the host's memory: its price, where it is refused, and that the update is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.errors import InfeasibleError, UnsupportedError
from planner.layout import Layout
from planner.plan import load, save
from planner.question import ask
from planner.reduced_plan import reduce_plan
from planner.search import search
from profiles.input_error import InputError
from runtime.dry_run import check_plan
from runtime.host_moments import OffloadedAdamW, check_offload
from runtime.optimizer import update
from tests.oracles.small_world import counts, price, small_hardware, small_question
from tests.plans import make_plan, tiny_llama

LINK = {"host_to_device_bytes_per_second": 2e9, "device_to_host_bytes_per_second": 1e9}
HARDWARE = small_hardware(**LINK)


def question(**job: Any):
    return small_question(devices=4, hardware=HARDWARE, **job)


# ---- price -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout(dp=4), Layout(dp=4, dp_shard=4, zero=3), Layout(dp=4, dp_shard=2, zero=2)])
def test_moments_leave_memory_and_pass_the_link_twice(layout: Layout) -> None:
    held = counts((4, 0))
    here, there = price(layout, question()), price(layout, question(offload="optimizer"))
    moments = 8 * question().model.parameters / layout.shards
    before, after = here.rank_memory(0, held), there.rank_memory(0, held)
    assert before.optimizer == pytest.approx(moments)
    assert after.optimizer == 0.0
    assert replace(before, optimizer=0.0, transient=0.0, allocator_slack=0.0) == replace(
        after, transient=0.0, allocator_slack=0.0
    )
    assert after.total < before.total
    assert there.step(held) - here.step(held) == pytest.approx(moments / 2e9 + moments / 1e9)


def test_what_the_largest_tensors_moments_take_while_they_pass_is_held() -> None:
    wide = small_question(tiny_llama(vocab_size=4096), devices=1, hardware=HARDWARE, offload="optimizer")
    held = price(Layout(micro_batch=1), wide).rank_memory(0, counts((4, 0)))
    assert held.transient >= 8 * 4096 * 32


def test_where_state_is_what_does_not_fit_a_plan_offloads(tmp_path: Path) -> None:
    layout = {"pins": {"dp": 4, "zero": 0, "recompute": "full", "micro_batch": 1}}
    need = search(question(**layout)).prediction.peak_memory_bytes
    limit = need - 4 * question().model.parameters
    with pytest.raises(InfeasibleError, match="nothing fits") as caught:
        search(question(**layout, memory_limit_bytes=limit))
    assert any(
        line.startswith("  --offload optimizer, for example dp4 zero0 mb1: step ") for line in caught.value.lines
    )
    plan = search(question(**layout, memory_limit_bytes=limit, offload="optimizer"))
    assert plan.prediction.peak_memory_bytes <= limit
    save(plan, tmp_path / "plan.yaml")
    assert load(tmp_path / "plan.yaml") == plan
    assert "offload: optimizer" in (tmp_path / "plan.yaml").read_text(encoding="utf-8")
    assert "offload" not in search(question()).to_dict()["job"]
    assert reduce_plan(plan).plan.job.offload == "none"
    assert any(change.what == "offload" for change in reduce_plan(plan).changes)


# ---- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "hardware", "reason"),
    [
        ({}, {"backend": "gloo", **LINK}, "small is a CPU, whose memory is the host's already"),
        ({}, {}, "does not say how fast host and device exchange bytes; profile the machine"),
        ({"target": "megatron"}, LINK, "offload=optimizer with target megatron: how it offloads is not modelled"),
    ],
)
def test_where_nothing_can_be_offloaded(changes: dict[str, Any], hardware: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        search(small_question(hardware=small_hardware(**hardware), offload="optimizer", **changes))
    assert caught.value.what.endswith(reason)


def test_a_cpu_is_refused_before_any_rank_starts() -> None:
    plan = make_plan(tiny_llama(), Layout(dp=2, dp_shard=2, zero=1), question(offload="optimizer").job)
    with pytest.raises(InputError) as caught:
        check_offload(plan, "cpu")
    assert (caught.value.where, caught.value.expected) == ("plan: job.offload", "a CUDA device beside the host")
    assert caught.value.got == "ranks on the CPU, whose memory is the host's"
    check_offload(plan, "cuda")
    check_offload(replace(plan, job=question().job), "cpu")
    with pytest.raises(InputError, match="an offloading plan cannot run dry"):
        check_plan(plan)


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        ask("gpt2", "dgx-a100:1", 8, 64, offload="weights")
    assert (caught.value.where, caught.value.expected) == ("--offload", "one of none, optimizer")


# ---- the update --------------------------------------------------------------------------------------------


def steps(kind: type[torch.optim.AdamW], device: str) -> tuple[list[torch.Tensor], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in ((8, 4), (4,), (3, 5))]
    options = [
        {"params": parameters[::2], "weight_decay": 0.1},
        {"params": parameters[1:2], "weight_decay": 0.0},
    ]
    optimizer = kind(options, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        # The third step is not sound: nothing may change.
        update(optimizer, torch.tensor(step != 2, device=device))
    return parameters, optimizer


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory takes a CUDA device")
        ),
    ],
)
def test_the_update_is_adamws_and_moments_rest_on_the_host(device: str) -> None:
    plain, at_home = steps(torch.optim.AdamW, device)
    offloaded, away = steps(OffloadedAdamW, device)
    if device == "cuda":
        torch.cuda.synchronize()
    for one, other in zip(plain, offloaded, strict=True):
        assert torch.equal(one, other)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(at_home.state[one][moment].cpu(), away.state[other][moment])
            assert away.state[other][moment].is_pinned() == (device == "cuda")
        assert away.state[other]["step"].item() == at_home.state[one]["step"].item() == 3
    assert len(away.param_groups) == 2
