"""Products in fp8: the numbers of what was cast, training beside bf16's, and the refusal where a device lacks them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.input_error import InputError
from runtime.compilation import Compilation
from runtime.float8 import Float8Linear, check_device
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import Trajectory, run_plain, run_plan
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.thinned import every

STEPS = 4
WITHOUT_FP8 = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is left of x: its largest element is the format's, and each has the format's digits."""
    scale = x.abs().max() / torch.finfo(dtype).max
    return (x / scale).to(dtype).to(x.dtype) * scale


def a_linear(device: str = "cpu") -> tuple[nn.Linear, Float8Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(2, 16, 64)
    x[0, 3] *= 30
    return linear.to(device), Float8Linear.of(linear.to(device)), x.to(device)


def test_each_product_is_that_of_the_cast_tensors() -> None:
    _, ours, x = a_linear()
    x.requires_grad_()
    y = ours(x)
    of_y = torch.randn_like(y)
    y.backward(of_y)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    left, weight, of_left = cast(x.detach(), e4m3), cast(ours.weight.detach(), e4m3), cast(of_y, e5m2)
    torch.testing.assert_close(y, left @ weight.T + ours.bias, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, of_left @ weight, rtol=1e-5, atol=1e-5)
    of_weight = of_left.flatten(0, 1).T @ left.flatten(0, 1)
    torch.testing.assert_close(ours.weight.grad, of_weight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.bias.grad, of_y.sum(dim=(0, 1)), rtol=1e-5, atol=1e-5)


def test_the_parameters_are_the_linears() -> None:
    linear, ours, _ = a_linear()
    assert dict(ours.named_parameters()) == dict(linear.named_parameters())


def test_zeros_stay_zeros_and_what_is_not_finite_shows() -> None:
    _, ours, x = a_linear()
    assert torch.equal(ours(torch.zeros(16, 64)), ours.bias.expand(16, 48))
    x[1, 2, 3] = torch.inf
    assert not ours(x).isfinite().all()


# ---- training --------------------------------------------------------------------------------------------------


def plan_of(model: Any, precision: str = "fp8", recompute: Any = None, selective: Any = None, **layout: Any) -> Plan:
    if layout.get("zero"):
        layout.setdefault("dp_shard", layout["dp"])
    job = TrainingJob(global_batch=8, sequence=32, precision=precision)
    return make_plan(model, Layout(**{"micro_batch": 1, **layout}), job, None, recompute, selective)


CASES = [
    plan_of(tiny_llama(), dp=2, zero=3, recompute=(2,)),
    plan_of(tiny_gpt2(), pp=2, selective=(1, 1)),
    plan_of(tiny_llama(), dp=2),
    plan_of(tiny_llama(), cp=2, cp_style="ring", zero=0),
    plan_of(tiny_llama(), pp=2, schedule="interleaved-1f1b", virtual_stages=2),
]


def trained(plan: Plan, compilation: Compilation | None = None) -> Trajectory:
    return run_plan(plan, STEPS, torch.float32, 1.0, compilation)


@pytest.mark.parametrize("plan", every(len(CASES), CASES), ids=lambda plan: f"{plan.model.name} {plan.layout.short()}")
def test_a_layout_trains_as_one_rank_does_and_near_fp32(plan: Plan) -> None:
    alone = run_ranks(trained, 1, plan_of(plan.model))[0]
    found = run_ranks(trained, 2, plan)[-1]
    # Of the same microbatches the scales are the same; what else differs is the order of sums in bf16.
    assert found.losses == pytest.approx(alone.losses, rel=2e-3)
    assert found.norms == pytest.approx(alone.norms, rel=2e-2)
    exact = run_plain(plan_of(plan.model, "fp32"), STEPS, torch.float32, 1.0)
    assert found.losses == pytest.approx(exact.losses, rel=5e-3)
    assert found.norms == pytest.approx(exact.norms, rel=5e-2)
    rounded = run_ranks(trained, 1, plan_of(plan.model, "bf16"))[0]
    assert found.losses != pytest.approx(rounded.losses, rel=1e-6)  # it did run in fp8


@pytest.mark.full
def test_compiled_training_is_training() -> None:
    plan = plan_of(tiny_llama(), recompute=(1,), selective=(1,))
    compiled = run_ranks(trained, 1, plan, Compilation(backend="aot_eager"), timeout_seconds=180.0)[0]
    assert compiled.losses == pytest.approx(run_ranks(trained, 1, plan)[0].losses, rel=1e-6)


# ---- devices ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not WITHOUT_FP8, reason="this device has products in fp8")
def test_a_device_without_fp8_is_refused_before_anything_starts() -> None:
    check_device(plan_of(tiny_llama(), "bf16"))
    with pytest.raises(InputError, match=r"no products in fp8.*compute capability 8\.9 or above.*--precision bf16"):
        check_device(plan_of(tiny_llama()))


@pytest.mark.skipif(WITHOUT_FP8, reason="needs a GPU of compute capability 8.9 or above")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    found = []
    for device in ("cpu", "cuda"):
        _, ours, x = a_linear(device)
        ours, x = ours.bfloat16(), x.bfloat16().requires_grad_()
        ours(x).square().sum().backward()
        assert x.grad is not None
        assert ours.weight.grad is not None
        found.append((x.grad.cpu(), ours.weight.grad.cpu()))
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0.05, atol=0.05 * on_cpu.abs().max().item())
