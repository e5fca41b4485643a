"""Passes that the host issues slower than the device runs them, and what trainers have it do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.axis_cost import AxisModel
from planner.comm_cost import CommModel, Group
from planner.compute_cost import ComputeModel
from planner.compute_seconds import ComputeCost, ComputeSeconds
from planner.job import TrainingJob
from planner.layout import Layout
from planner.local_shapes import joined_tensors
from planner.overflow_cost import overflow_seconds
from planner.step_cost import CostModel
from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.hardware import HardwareProfile, load_hardware
from profiles.points import CHECKPOINT_OPERATIONS, FORK_OPERATIONS, FUNCTION_OPERATIONS
from profiles.software import load_software
from tests.oracles.small_world import small_hardware
from tests.plans import tiny_gpt2

EACH = 10e-6
SLOW_HOST = replace(small_hardware(units=1, launch_seconds=0.0), host_operation_seconds=EACH)
JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")


def block(mpu_layers: bool) -> ComputeCost:
    software = replace(load_software("megatron-2021").software, mpu_layers=mpu_layers)
    return ComputeModel(tiny_gpt2(), SLOW_HOST, JOB, software).block(Layout())


def test_megatrons_layers_have_the_host_do_more() -> None:
    plain, megatron = block(False), block(True)
    assert plain.forward.idle > 0
    assert plain.checkpoint.total == 0.0
    there, back = FUNCTION_OPERATIONS
    assert megatron.forward.total - plain.forward.total == pytest.approx((there + FORK_OPERATIONS) * EACH)
    assert megatron.backward.total - plain.backward.total == pytest.approx(back * EACH)
    assert megatron.checkpoint.total == pytest.approx(CHECKPOINT_OPERATIONS * EACH)


def test_a_recomputed_layer_takes_its_states_besides() -> None:
    cluster, a100 = resolve_cluster("dgx-a100:1"), load_hardware(resolve_hardware_path("a100-sxm-80gb"))
    job = TrainingJob(global_batch=1, sequence=16, precision="fp16")
    layer = CostModel(tiny_gpt2(), cluster.with_devices(1), a100, job, load_software("megatron-2021").software)
    seconds = layer.price(Layout()).segments[0].seconds
    besides = CHECKPOINT_OPERATIONS * a100.host_operation_seconds
    assert seconds.recompute_full.compute - seconds.forward.compute == pytest.approx(besides)


def test_a_pass_behind_its_host_waits_and_a_busy_one_does_not() -> None:
    waits = ComputeSeconds(gemm=3.0, operations=5).behind_host(1.0)
    assert (waits.idle, waits.total) == (2.0, 5.0)
    assert ComputeSeconds(gemm=7.0, operations=5).behind_host(1.0).idle == 0.0


@pytest.mark.parametrize(("idle", "seconds"), [(0.0, "all"), (1e-9, "all but"), (1.0, "issued")])
def test_sums_over_tp_fall_into_the_time_that_the_device_waits(idle: float, seconds: str) -> None:
    cluster = resolve_cluster("dgx-a100:1")
    a100 = load_hardware(resolve_hardware_path("a100-sxm-80gb"))
    comm, model = CommModel(cluster, a100), resolve_model("gpt2")
    job = TrainingJob(global_batch=8, sequence=1024, precision="fp16")
    axes = AxisModel(model, a100, comm, job, load_software("megatron-2021").software)
    layout = Layout(tp=4, micro_batch=8)
    waiting = ComputeSeconds(gemm=1.0, idle=idle)
    sent = axes.block_tp(layout, ComputeCost(waiting, waiting), "dense")
    whole = 2 * comm.collective_seconds("all_reduce", Group(4, 1), 2.0 * 8 * 1024 * model.hidden_size)
    expected = {"all": whole, "all but": whole - idle, "issued": 2 * a100.host_operation_seconds}[seconds]
    assert sent.forward == sent.backward == sent.full == pytest.approx(expected)


def test_joined_weights_are_fewer_tensors() -> None:
    assert [joined_tensors(resolve_model(name)) for name in ("gpt2", "llama3-8b", "qwen2.5-7b")] == [4, 3, 5]


def looked(check: str, hardware: HardwareProfile, tensors: int) -> float:
    software = replace(load_software("megatron-2021").software, overflow_check=check)
    return overflow_seconds(hardware, software, "fp32", 1e6, tensors)


def test_gradients_are_looked_at_as_the_trainer_does() -> None:
    each_pass = 4 * 1e6 / SLOW_HOST.memory_bandwidth_bytes_per_second
    assert looked("by_norm", SLOW_HOST, 3) == 0.0
    assert looked("one_kernel", SLOW_HOST, 3) == pytest.approx(2 * each_pass)
    # Cast 1.5 and sum 1, of each tensor three operations; unscaled by 2, or with the clipping.
    assert looked("sums_read", SLOW_HOST, 3) == pytest.approx(4.5 * each_pass + 9 * EACH)
    assert looked("sums_read_clip_unscales", SLOW_HOST, 3) == pytest.approx(2.5 * each_pass + 9 * EACH)
    # Zeros 1.5, added to in 16 bits 1.5; two operations more for each norm.
    assert looked("tensor_by_tensor", SLOW_HOST, 3) == pytest.approx((4.5 + 1.5 + 1.5) * each_pass + 15 * EACH)


def test_many_small_tensors_take_what_the_host_takes() -> None:
    """Sum 3, norm 2, loops 4 and zeros 4 operations, where no kernel takes longer than its issuing."""
    few, many = looked("tensor_by_tensor", SLOW_HOST, 10**6), looked("tensor_by_tensor", SLOW_HOST, 2 * 10**6)
    assert many - few == pytest.approx(13e6 * EACH)


def test_only_fp16_is_looked_at() -> None:
    software = load_software("megatron-2021").software
    h100 = load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    fp16, bf16 = (
        ComputeModel(tiny_gpt2(), h100, replace(JOB, precision=precision), software).overflow_seconds(1e6, 3)
        for precision in ("fp16", "bf16")
    )
    assert (fp16 > 0, bf16) == (True, 0.0)
