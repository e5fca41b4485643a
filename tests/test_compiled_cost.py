"""What compiled blocks cost on a GPU, and what selective recomputation costs where the host is the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.compute_cost import ComputeModel
from planner.compute_seconds import ComputeCost, ComputeSeconds
from planner.job import TrainingJob
from planner.layout import Layout
from planner.step_cost import CostModel
from planner.target_software import compiled_software, eager_software, software_of
from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.hardware import HardwareProfile, load_hardware
from tests.oracles.small_world import small_hardware
from tests.plans import tiny_experts, tiny_llama

JOB = TrainingJob(global_batch=8, sequence=4096)


def h200(**changes: Any) -> HardwareProfile:
    return replace(load_hardware(resolve_hardware_path("h200")), **changes)


def block_of(software: Any, hardware: HardwareProfile) -> ComputeCost:
    return ComputeModel(resolve_model("llama-3.2-1b"), hardware, JOB, software).block(Layout(micro_batch=2))


def test_what_runs_compiled() -> None:
    model, gpu, cpu = tiny_llama(), h200(), small_hardware(backend="gloo")
    assert software_of(JOB, gpu, Layout(), model).compiled
    assert not software_of(JOB, cpu, Layout(), model).compiled
    assert not software_of(JOB, gpu, Layout(pp=2, schedule="zb1p"), model).compiled
    assert not software_of(JOB, gpu, Layout(), tiny_experts()).compiled
    assert compiled_software(replace(JOB, target="megatron"), gpu) is None


def test_compiled_blocks_have_fewer_passes_through_memory_and_the_same_products() -> None:
    compiled = compiled_software(JOB, h200())
    fused, eager = (block_of(software, h200()) for software in (compiled, eager_software(JOB)))
    assert fused.forward.gemm == eager.forward.gemm
    assert fused.forward.attention == eager.forward.attention
    assert fused.forward.memory < 0.7 * eager.forward.memory


def test_a_compiled_block_is_issued_at_its_own_pace() -> None:
    """Far slower than the device, so that the pass is as long as its issue."""
    slow = h200(host_operation_seconds=1e-2, compiled_operation_seconds=1e-3)
    fused, eager = (block_of(software, slow) for software in (compiled_software(JOB, slow), eager_software(JOB)))
    assert fused.forward.total == pytest.approx(eager.forward.total / 10, rel=0.2)
    unmeasured = h200(host_operation_seconds=1e-2)
    as_any = block_of(compiled_software(JOB, unmeasured), unmeasured)
    assert as_any.forward.total == pytest.approx(eager.forward.total, rel=0.2)


def test_schedules_that_split_backwards_are_priced_uncompiled() -> None:
    model, cluster = resolve_model("llama3-8b"), resolve_cluster("dgx-h200:1")
    prices = CostModel(model, cluster, load_hardware(resolve_hardware_path("h200-sxm")), JOB)
    whole, split = (
        prices.price(Layout(pp=8, micro_batch=1, schedule=schedule)).segments[0].seconds
        for schedule in ("1f1b", "zb1p")
    )
    assert whole.forward.compute < split.forward.compute


def test_one_rank_that_trains_in_16_bits_narrows_weights_and_widens_gradients() -> None:
    cluster, hardware = resolve_cluster("dgx-h200:1").with_devices(1), h200()
    for precision, pays in (("bf16", True), ("fp32", False)):
        job = replace(JOB, precision=precision)
        known = replace(hardware, gemm=tuple(replace(p, dtype=precision) for p in hardware.gemm))
        known = replace(known, attention=tuple(replace(p, dtype=precision) for p in hardware.attention))
        layer = CostModel(resolve_model("llama-3.2-1b"), cluster, known, job).price(Layout()).segments[0].seconds
        assert (layer.gather.dp > 0, layer.reduce.dp > 0) == (pays, pays)


def test_selective_recomputation_has_each_forward_operation_pass_a_mode() -> None:
    hardware = small_hardware(backend="gloo", operation_overhead_seconds=1e-6, selective_overhead_seconds=1e-3)
    again = ComputeSeconds(memory=1.0, operations=2)
    cost = ComputeCost(ComputeSeconds(gemm=1.0, operations=10), selective=again).issued(hardware)
    assert cost.selective.total == pytest.approx(1.0 + 2e-6 + 10e-3)
    assert cost.forward.total == pytest.approx(1.0 + 10e-6)
