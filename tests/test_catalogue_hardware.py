"""The catalogue's hardware and clusters: every figure has its source, and the published ones come out again."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import pytest

from planner.comm_cost import CommModel, Group
from profiles.catalogue import list_catalogue, resolve_cluster, resolve_hardware_path
from profiles.cluster import ClusterSpec, LinkOperation, LinkTier
from profiles.hardware import HardwareProfile, load_hardware
from profiles.points import DTYPES

MIB, GIB = 2.0**20, 2.0**30
EVERY_HARDWARE = list_catalogue("hardware")
MEASURED = ["h200"]  # by `cli.py profile`; the others are published
HARDWARE = [name for name in EVERY_HARDWARE if name not in MEASURED]
CLUSTERS = list_catalogue("clusters")
SCALARS = [f.name for f in fields(HardwareProfile) if f.type == "float" and f.default is MISSING]
# A source says first whether the figure is published or a data sheet's times a stated efficiency.
STATED = re.compile(r"(published|nominal)\b")


def profile(name: str) -> HardwareProfile:
    return load_hardware(resolve_hardware_path(name))


def comm(cluster: str) -> CommModel:
    spec = resolve_cluster(cluster)
    return CommModel(spec, profile(spec.hardware))


def seconds(cluster: str, operation: str, ranks: int, size: float) -> float:
    return comm(cluster).collective_seconds(operation, Group(ranks, 1), size)


def bus_bandwidth(cluster: str, operation: str, ranks: int, size: float) -> float:
    """As nccl-tests prints it."""
    passes = 2 if operation == "all_reduce" else 1
    return passes * (ranks - 1) / ranks * size / seconds(cluster, operation, ranks, size)


# ---- every figure has its source -------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARDWARE)
def test_a_profile_names_a_source_for_every_figure(name: str) -> None:
    hardware = profile(name)
    assert (hardware.name, hardware.backend) == (name, "nccl")
    for key in (*SCALARS, "peak_flops_per_second", "units"):
        assert STATED.match(hardware.provenance[key]), key
    assert (hardware.host_to_device_bytes_per_second is None) == ("host_link" not in hardware.provenance)
    for model in (*hardware.gemm_models, *hardware.attention_models):
        assert STATED.match(model.source), model


@pytest.mark.parametrize("name", HARDWARE)
def test_a_profile_stays_below_its_data_sheet(name: str) -> None:
    hardware = profile(name)
    peaks = hardware.peak_flops_per_second
    assert [dtype for dtype in DTYPES if hardware.supports(dtype)] == [dtype for dtype in DTYPES if dtype in peaks]
    assert {model.dtype for model in hardware.gemm_models} == set(peaks)
    for gemm in hardware.gemm_models:
        assert 0.4 < gemm.achievable_flops_per_second / peaks[gemm.dtype] < 0.9
        assert gemm.units == hardware.gemm_models[0].units
    for attention in hardware.attention_models:
        assert attention.backward_flops_per_second < attention.forward_flops_per_second
        assert attention.backward_flops_per_second / peaks[attention.dtype] > 0.2
        assert attention.forward_flops_per_second / peaks[attention.dtype] < 0.65
    assert 1 <= hardware.overlap_compute_slowdown <= 2 >= hardware.overlap_communication_slowdown


@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_profile_says_where_when_and_by_what(name: str) -> None:
    hardware = profile(name)
    assert (hardware.name, hardware.backend, hardware.provenance["kind"]) == (name, "nccl", "measured")
    assert {"date", "command", "host", "driver", "libraries", "conditions"} <= set(hardware.provenance)
    assert hardware.left_out == {}
    assert not hardware.gemm_models
    # What the chip cannot do it was not measured to do (NVIDIA H200 data sheet).
    assert all(2 * p.m * p.n * p.k / p.seconds < 9.895e14 for p in hardware.gemm if p.dtype == "bf16")
    assert hardware.memory_bandwidth_bytes_per_second < 4.8e12


def test_what_a_device_lacks_is_not_offered() -> None:
    assert not profile("v100-sxm-32gb").supports("bf16")
    assert profile("v100-sxm-16gb").supports("fp16")
    for name in HARDWARE:  # FP8 came with Hopper, Ada and CDNA 3
        assert ("fp8" in profile(name).peak_flops_per_second) == (not name.startswith(("v100", "a100")))


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_names_its_hardware_and_a_source_for_every_link(name: str) -> None:
    cluster = resolve_cluster(name)
    assert cluster.name == name
    assert cluster.memory_bytes == profile(cluster.hardware).memory_bytes
    links: list[LinkTier | LinkOperation] = []
    for tier in cluster.links:
        links += [tier, *tier.operations]
        assert [(o.operation, o.ranks) for o in tier.operations] == list(
            dict.fromkeys((o.operation, o.ranks) for o in tier.operations)
        )
        assert all(o.ranks <= tier.span for o in tier.operations)
    for link in links:
        bandwidth, latency = link.source.split(" latency: ")
        assert bandwidth.startswith("bandwidth: ")
        assert STATED.match(bandwidth.removeprefix("bandwidth: ")), link
        assert STATED.match(latency), link


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_wider_tier_is_not_faster_for_one_device(name: str) -> None:
    bandwidths = [tier.bandwidth_bytes_per_second for tier in resolve_cluster(name).links]
    assert bandwidths == sorted(bandwidths, reverse=True)


# ---- what was published comes out again ------------------------------------------------------------------

BUS_BANDWIDTHS = [
    # vTrain trace/a100, nccl-tests look-up table over 8 A100: the rate its times tend to.
    ("dgx-a100", "all_reduce", 8, 16 * GIB, 229e9),
    *(
        (name, "all_reduce", n, GIB, rate)
        for name in ("dgx-a100", "cloud-a100-400g")
        for n, rate in ((2, 196.9e9), (4, 221.4e9))
    ),
    # vTrain trace/v100, the same over 8 V100.
    ("dgx-2", "all_reduce", 8, 16 * GIB, 134.5e9),
    # stas00/ml-engineering network/README, 8 H200, NCCL 2.27.7; NVLS is the same on H100.
    ("dgx-h100", "all_reduce", 8, 16 * GIB, 480.0e9),
    ("dgx-h200", "all_reduce", 8, 8 * GIB, 473.1e9),
    ("dgx-h200", "all_reduce", 4, 8 * GIB, 363.3e9),
    *((name, "all_gather", 8, 16 * GIB, 361.4e9) for name in ("dgx-h100", "dgx-h200")),
    *((name, "reduce_scatter", 8, 16 * GIB, 362.9e9) for name in ("dgx-h100", "dgx-h200")),
    # nccl-tests over 8 H200, NCCL 2.30.7, stas00/ml-engineering network/benchmarks/README.
    ("dgx-h200", "all_reduce", 8, 1 * MIB, 72.45e9),
    ("dgx-h200", "all_reduce", 8, 16 * MIB, 242.45e9),
    ("dgx-h200", "all_reduce", 8, 128 * MIB, 411.21e9),
    ("dgx-h200", "all_reduce", 8, 1 * GIB, 464.0e9),
    # The Ultra-Scale Playbook's fragments/pp_comm_bandwidth.html, 8 H100 of a p5.
    ("aws-p5", "all_reduce", 8, GIB / 4, 436.0e9),
    ("aws-p5", "all_gather", 8, GIB / 4, 249.8e9),
    ("aws-p5", "reduce_scatter", 8, GIB / 4, 249.7e9),
    # stas00/ml-engineering network/README, 8 B200, NCCL 2.27.7.
    ("dgx-b200", "all_reduce", 8, 8 * GIB, 838.0e9),
    ("dgx-b200", "all_reduce", 4, 8 * GIB, 673.2e9),
    # SimuMax configs/system/b200_bf16_ceperm.json, GiB/s.
    ("dgx-b200", "all_gather", 8, 16 * GIB, 0.6735 * 900 * GIB),
    ("dgx-b200", "reduce_scatter", 8, 16 * GIB, 0.6731 * 900 * GIB),
    ("dgx-b200", "all_to_all", 8, 16 * GIB, 0.5968 * 900 * GIB),
    # coreweave/nccl-tests pull request 43, 72 GB200 of one rack.
    ("gb200-nvl72", "all_reduce", 72, GIB / 2, 586.06e9),
    ("gb200-nvl72", "all_reduce", 72, 4 * GIB, 839.16e9),
    # SimuMax configs/system/a100_pcie.json, GiB/s.
    *(
        ("pcie-a100", "all_reduce", n, 4 * GIB, share * 30 * GIB)
        for n, share in ((2, 0.6965), (4, 0.6924), (8, 0.4176))
    ),
    *(
        ("pcie-a100", "all_gather", n, 4 * GIB, share * 30 * GIB)
        for n, share in ((2, 0.6866), (4, 0.6915), (8, 0.4497))
    ),
]


@pytest.mark.parametrize(("cluster", "operation", "ranks", "size", "published"), BUS_BANDWIDTHS)
def test_published_bus_bandwidths(cluster: str, operation: str, ranks: int, size: float, published: float) -> None:
    assert bus_bandwidth(cluster, operation, ranks, size) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    ("operation", "within", "published"),
    [
        ("all_gather", 0.2, (184.6, 119.0, 69.0, 55.0, 28.0, 11.0)),
        ("reduce_scatter", 0.2, (181.6, 115.8, 68.6, 54.5, 27.9, 11.1)),
        ("all_reduce", 0.4, (361.7, 160.1, 99.6, 84.7, 64.9, 32.9)),
    ],
)
def test_a_p5s_collectives_over_2_to_64_nodes(operation: str, within: float, published: tuple[float, ...]) -> None:
    """Seconds of 256 MB, as Hugging Face measured them; NCCL does not ring in all of the all-reduces, which are far off
    it."""
    for power, rate in enumerate(published, start=1):
        found = bus_bandwidth(f"aws-p5:{2**power}", operation, 8 * 2**power, GIB / 4)
        assert rate * 1e9 / found == pytest.approx(1.0, abs=within)


@pytest.mark.parametrize(
    ("cluster", "operation", "ranks", "published"),
    [
        # Constant terms of the fits to vTrain's look-up tables.
        ("dgx-a100", "all_reduce", 2, 46e-6),
        ("dgx-a100", "all_reduce", 4, 54e-6),
        ("dgx-a100", "all_reduce", 8, 79e-6),
        ("dgx-2", "all_reduce", 8, 76e-6),
        # SimuMax: once plus (n-1) steps in each pass, b200_bf16_ceperm.json and a100_pcie.json.
        ("dgx-b200", "all_reduce", 4, 22.2e-6 + 6 * 5.5e-6),
        ("dgx-b200", "all_gather", 8, 23.1e-6 + 7 * 9.18e-6),
        ("dgx-b200", "all_to_all", 4, 19.2e-6 + 3 * 7.3e-6),
        ("pcie-a100", "all_reduce", 2, 2 * 15.51e-6),
        ("pcie-a100", "all_reduce", 4, 6 * 3.45e-6),
        ("pcie-a100", "all_reduce", 8, 14 * 8.98e-6),
    ],
)
def test_published_latencies(cluster: str, operation: str, ranks: int, published: float) -> None:
    assert seconds(cluster, operation, ranks, 8.0) == pytest.approx(published, rel=0.05)


# SimAI nic_ratio.csv: bus bandwidth as a share of 8 NICs of 25 GB/s, over so many nodes of 8.
NIC_RATIOS = {
    1 * GIB: {2: 0.92, 4: 0.93, 8: 0.90, 16: 0.76, 32: 0.74, 128: 0.31},
    16 * MIB: {2: 0.32, 4: 0.24, 8: 0.13, 16: 0.05},
}


def test_the_network_of_a100_nodes_loses_its_bandwidth_to_latency_as_simai_has_it() -> None:
    errors = {
        (size, nodes): bus_bandwidth(f"dgx-a100:{nodes}", "all_reduce", 8 * nodes, size) / (8 * 25e9) / ratio - 1
        for size, ratios in NIC_RATIOS.items()
        for nodes, ratio in ratios.items()
    }
    assert len(errors) == 10
    worst = max(errors, key=lambda key: abs(errors[key]))
    assert worst == (16 * MIB, 16)
    assert errors[worst] == pytest.approx(0.21, abs=0.02)


@pytest.mark.parametrize(("size", "ratio"), [(16 * MIB, 0.45), (128 * MIB, 0.69), (GIB, 0.77), (16 * GIB, 0.81)])
def test_one_a100_node_has_simai_s_share_of_nvlink(size: float, ratio: float) -> None:
    """300 GB/s a GPU; the worst is 6 %, at 16 GiB and 16 MiB."""
    assert bus_bandwidth("dgx-a100", "all_reduce", 8, size) / 300e9 == pytest.approx(ratio, rel=0.07)


def test_b200_nodes_reach_what_was_measured_over_four_of_them() -> None:
    """stas00/ml-engineering network/benchmarks/README, 4 P6-B200 nodes."""
    for size, published in ((16 * MIB, 71.80e9), (128 * MIB, 260.50e9), (GIB, 365.99e9), (16 * GIB, 376.71e9)):
        assert bus_bandwidth("dgx-b200:4", "all_reduce", 32, size) == pytest.approx(published, rel=0.1)


def test_four_nodes_of_400_gbit_a_node_share_340() -> None:
    """stas00/ml-engineering network/README: 340 of 400 Gbit/s in all-reduce over EFA v1."""
    assert bus_bandwidth("cloud-a100-400g:4", "all_reduce", 32, 64 * GIB) == pytest.approx(340e9 / 8, rel=0.01)


def test_a_server_s_port_is_shared_by_its_devices() -> None:
    ethernet: ClusterSpec = resolve_cluster("ethernet-25g")
    network = ethernet.links[-1].bandwidth_bytes_per_second * ethernet.devices_per_node
    assert network == pytest.approx(0.9 * 25e9 / 8, rel=0.001)
