"""Two profiles side by side, and the tables of the catalogue; golden."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from planner.profile_differences import part_differences
from planner.profile_figures import (
    quantile,
)
from planner.profile_report import catalogue_report, difference_report
from profiles.catalogue import list_catalogue, resolve_cluster, resolve_hardware_path, resolve_model
from profiles.hardware import HardwareProfile, load_hardware
from profiles.points import (
    ManyGemmPoint,
)
from tests.oracles.small_world import small_hardware
from tests.test_profile_report import cube, measured, text

# ---- two profiles ----------------------------------------------------------------------------------------

DIFFERENT = """\
this   local: Made Up 9000, nccl, 2026-03-04
other  later: Made Up 9000, nccl, 2026-03-04

figures that differ
figure                            this  other  other / this
launch seconds                   1e-06  2e-06         2.000
host to device bytes per second  5e+09   none
peak flops per second, fp32      1e+11  9e+10         0.900
correction of gemm                   1    1.1         1.100

seconds, other / this (~ interpolated or modelled on one side at least)
part                     points  median         range  most different
GEMM fp32                     2     1.3    1.1 to 1.5  forward m 512 n 512 k 512: 3.36 ms, 5.03 ms
attention fp32 forward       ~1    1.07  1.07 to 1.07  batch 1 heads 4 sequence 1024 head dim 64: 10
                                                       ms, 10.7 ms
attention fp32 backward      ~1    1.01  1.01 to 1.01  batch 1 heads 4 sequence 1024 head dim 64: 40
                                                       ms, 40.3 ms

the same at every point: GEMM bf16; memory rmsnorm; all reduce, 2 ranks, stride 1

only this has: all reduce, 4 ranks, stride 1; all to all, 2 ranks, stride 1; all to all uneven, 2
ranks, stride 1

only other has: products grouped bf16
"""


def changed() -> HardwareProfile:
    """`measured` with slower products and attention that was not measured but modelled."""
    before = measured()
    return replace(
        before,
        name="later",
        launch_seconds=2e-6,
        host_to_device_bytes_per_second=None,
        corrections={"memory": 1.25, "gemm": 1.1},
        peak_flops_per_second={"fp32": 9e10, "bf16": 2e11},
        gemm=(cube(128, 5e10 / 1.1), cube(512, 8e10 / 1.5)),
        attention=(),
        attention_models=small_hardware(flops=1e11).attention_models[:1],
        many_gemm=(ManyGemmPoint(kind="grouped", dtype="bf16", count=8, m=64, n=64, k=64, seconds=1e-4),),
        collectives=tuple(p for p in before.collectives if p.operation == "all_reduce" and p.ranks == 2),
    )


def test_the_report_of_a_difference() -> None:
    assert text(difference_report(measured(), changed())) == DIFFERENT.strip("\n")


def test_differences_by_hand() -> None:
    found, only_here, only_there = part_differences(measured(), changed())
    parts = {d.part: d for d in found}
    gemm = parts["GEMM fp32"]
    # Measured seconds are compared as they are; the correction of 1.1 is listed, not multiplied in.
    assert (gemm.points, gemm.priced) == (2, False)
    assert (gemm.median, gemm.least, gemm.most) == pytest.approx((1.3, 1.1, 1.5))
    assert gemm.largest_at == "forward m 512 n 512 k 512"
    assert gemm.seconds == pytest.approx((2 * 512**3 / 8e10, 1.5 * 2 * 512**3 / 8e10))
    forward = parts["attention fp32 forward"]
    assert forward.priced
    assert forward.median == pytest.approx(2 * 4 * 1024**2 * 64 / 5e10 / 0.01)  # the model's 50 GFLOP/s over measured
    assert only_here == [
        "all reduce, 4 ranks, stride 1",
        "all to all, 2 ranks, stride 1",
        "all to all uneven, 2 ranks, stride 1",
    ]
    assert only_there == ["products grouped bf16"]
    swapped, there, here = part_differences(changed(), measured())
    assert (here, there) == (only_here, only_there)
    assert {d.part: 1 / d.median for d in swapped if d.points == 1} == pytest.approx(
        {d.part: d.median for d in found if d.points == 1}
    )


def test_two_models_are_compared_at_square_products_and_missing_dtypes_are_named() -> None:
    this, other = small_hardware(flops=1e11), small_hardware(flops=2e11)
    other = replace(other, gemm_models=other.gemm_models[:1])
    found, only_here, only_there = part_differences(this, other)
    (gemm,) = [d for d in found if d.part.startswith("GEMM")]
    assert (gemm.part, gemm.points) == ("GEMM fp32", 5)
    assert 0.5 < gemm.median < 0.52  # half of the products' seconds, but not of the writes of the results
    assert (only_here, only_there) == (["GEMM bf16"], [])


# ---- the catalogue ---------------------------------------------------------------------------------------

CATALOGUE = """\
models
name          family   layers  hidden  parameters, B  active, B       experts
gpt2          gpt2         12     768          0.124
mixtral-8x7b  mixtral      32   4,096           46.7       12.9  8, 2 a token

clusters, as NAME:NODES
name       hardware        devices a node  most nodes  GB/s a device, tier by tier
dgx-a100   a100-sxm-80gb                8      16,384  node 229, network 24.7
pcie-a100  a100-pcie-80gb               8           1  socket 22.3, node 3.36

hardware: TFLOP/s at peak and as a GEMM achieves it
name           device                       GiB  dtype  peak  GEMM  kind
a100-sxm-80gb  NVIDIA A100-SXM4-80GB         79  bf16    312   271  published
v100-sxm-16gb  NVIDIA Tesla V100-SXM2-16GB   16  fp16    125  95.9  published
local          Made Up 9000                   1  bf16    0.2  0.16  measured

to add one: CONTRIBUTING.md says how, a YAML file each
"""


def test_the_report_of_the_catalogue() -> None:
    shown = catalogue_report(
        [resolve_model(name) for name in ("gpt2", "mixtral-8x7b")],
        [resolve_cluster(name) for name in ("dgx-a100", "pcie-a100")],
        [load_hardware(resolve_hardware_path(name)) for name in ("a100-sxm-80gb", "v100-sxm-16gb")] + [measured()],
    )
    assert text(shown) == CATALOGUE.strip("\n")


def test_the_whole_catalogue_fits_its_width() -> None:
    shown = text(
        catalogue_report(
            [resolve_model(name) for name in list_catalogue("models")],
            [resolve_cluster(name) for name in list_catalogue("clusters")],
            [load_hardware(resolve_hardware_path(name)) for name in list_catalogue("hardware")],
        )
    )
    assert "…" not in shown
    for kind in ("models", "clusters", "hardware"):
        for name in list_catalogue(kind):
            assert f"\n{name} " in shown


def test_a_share_of_one_value_is_that_value() -> None:
    assert quantile([0.3], 0.9) == 0.3
    assert math.isclose(quantile([0.0, 1.0], 0.5), 0.5)
