"""Link tiers out of measured matrices, and what a host says of its node, GPUs and clocks (NVML faked)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.input_error import InputError
from profiles.link_tiers import Tier, tiers_from_matrix
from profiles.probes.topology import device_conditions, node_identity, nvlink_topology


def matrix(ranks: int, speed: Callable[[int, int], float]) -> list[list[float]]:
    return [[0.0 if i == j else speed(i, j) for j in range(ranks)] for i in range(ranks)]


def two_nodes(i: int, j: int) -> float:
    return 300e9 if i // 4 == j // 4 else 25e9


# ---- link tiers ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(noise=st.lists(st.floats(0.85, 1.15), min_size=64, max_size=64))
def test_two_nodes_of_four_under_noise(noise: list[float]) -> None:
    found = tiers_from_matrix(matrix(8, lambda i, j: two_nodes(i, j) * noise[8 * i + j]))
    assert [tier.span for tier in found.tiers] == [4, 8]
    assert [tier.bandwidth_bytes_per_second for tier in found.tiers] == [
        pytest.approx(300e9, rel=0.15),
        pytest.approx(25e9, rel=0.15),
    ]
    assert found.notes == ()


def test_nvlink_pairs_then_pcie_then_network() -> None:
    found = tiers_from_matrix(matrix(8, lambda i, j: 50e9 if i // 2 == j // 2 else 12e9 if i // 4 == j // 4 else 1.2e9))
    assert found.tiers == (
        Tier(span=2, bandwidth_bytes_per_second=50e9),
        Tier(span=4, bandwidth_bytes_per_second=12e9),
        Tier(span=8, bandwidth_bytes_per_second=1.2e9),
    )
    assert found.notes == ()


def test_links_of_one_kind_are_one_tier() -> None:
    assert tiers_from_matrix(matrix(6, lambda i, j: 10e9 + i)).tiers == (
        Tier(span=6, bandwidth_bytes_per_second=10e9 + 1),  # the slower direction; the median over 15 pairs
    )


def test_a_pair_is_as_fast_as_its_slower_direction() -> None:
    found = tiers_from_matrix([[0, 9e9], [3e9, 0]])
    assert found.tiers == (Tier(span=2, bandwidth_bytes_per_second=3e9),)


def test_one_slow_link_is_named_and_moves_no_median() -> None:
    found = tiers_from_matrix(matrix(8, lambda i, j: 100e9 if {i, j} == {1, 2} else two_nodes(i, j)))
    assert [(tier.span, tier.bandwidth_bytes_per_second) for tier in found.tiers] == [(4, 300e9), (8, 25e9)]
    assert found.notes == ("slower than the others of their tier (3e+11 bytes/s): links 1-2",)


def test_a_slow_rank_breaks_the_groups_and_is_named() -> None:
    found = tiers_from_matrix(matrix(4, lambda i, j: 1e9 if 3 in (i, j) else 10e9))
    assert [tier.span for tier in found.tiers] == [4]
    assert found.notes[0] == (
        "links of 1e+10 bytes/s and faster make no tier: ranks 3 form a group of 1 where others are of 3"
    )


def test_nodes_that_interleave_are_no_tier() -> None:
    found = tiers_from_matrix(matrix(8, lambda i, j: 300e9 if i % 2 == j % 2 else 25e9))
    assert [tier.span for tier in found.tiers] == [8]
    assert found.notes[0] == (
        "links of 3e+11 bytes/s and faster make no tier: ranks 0, 2, 4, 6 share them and are not neighbours; "
        "number the ranks node by node"
    )


def test_one_fast_link_between_nodes_does_not_make_them_one() -> None:
    found = tiers_from_matrix(matrix(8, lambda i, j: 300e9 if {i, j} == {3, 4} else two_nodes(i, j)))
    assert [tier.span for tier in found.tiers] == [8]
    assert "most pairs of which have no such link" in found.notes[0]


def test_one_rank_has_no_tiers() -> None:
    assert tiers_from_matrix([[0.0]]).tiers == ()


@pytest.mark.parametrize(
    ("rows", "where"),
    [([[0, 1e9]], "bandwidth[0]"), ([[0, 1e9], [0.0, 0]], "bandwidth[1][0]"), ([[0, float("nan")], [1, 0]], "[0][1]")],
)
def test_a_matrix_that_cannot_be(rows: list[list[float]], where: str) -> None:
    with pytest.raises(InputError) as caught:
        tiers_from_matrix(rows)
    assert where in caught.value.where


# ---- the node --------------------------------------------------------------------------------------------


def host(tmp_path: Path, namespace: str = "net:[4026531840]") -> Path:
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/net").symlink_to(namespace)
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("b0-07\n")
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 2000.5\ncpu MHz\t\t: 3000.5\ncache size\t: 1 KB\n")
    return tmp_path


def test_network_namespaces_of_one_machine_are_nodes_of_their_own(tmp_path: Path) -> None:
    first = node_identity(host(tmp_path / "a"))
    assert (first.boot_id, first.network_namespace) == ("b0-07", "net:[4026531840]")
    assert first == node_identity(host(tmp_path / "b"))
    assert first != node_identity(host(tmp_path / "c", "net:[4026532001]"))
    assert set(first.to_dict()) == {"hostname", "boot_id", "network_namespace"}


def test_a_host_that_tells_nothing(tmp_path: Path) -> None:
    identity = node_identity(tmp_path)
    assert (identity.boot_id, identity.network_namespace) == ("", "")


# ---- GPUs ------------------------------------------------------------------------------------------------


def fake_nvml(**changes: Any) -> Any:
    """A module with NVML's names: two GPUs of a board with NVSwitch, 18 links each."""
    nvml: Any = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def not_supported(*_: Any) -> Any:
        raise NVMLError_NotSupported("Not Supported")

    field = SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=26562))
    values: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVML_FEATURE_ENABLED": 1,
        "NVML_NVLINK_MAX_LINKS": 36,
        "NVML_NVLINK_VERSION_3_1": 5,
        "NVML_NVLINK_VERSION_4_0": 6,
        "NVML_NVLINK_DEVICE_TYPE_GPU": 0,
        "NVML_NVLINK_DEVICE_TYPE_SWITCH": 2,
        "NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON": 90,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_TOPOLOGY_NODE": 40,
        "NVML_TOPOLOGY_CPU": 40,
        "NVML_TOPOLOGY_SYSTEM": 50,
        "NVML_P2P_CAPS_INDEX_NVLINK": 2,
        "NVML_P2P_STATUS_OK": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"570.86.15",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu{index}",
        "nvmlDeviceGetName": lambda handle: "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetNvLinkState": lambda handle, link: 1 if link < 18 else not_supported(),
        "nvmlDeviceGetNvLinkVersion": lambda handle, link: 6,
        "nvmlDeviceGetNvLinkRemoteDeviceType": lambda handle, link: 2,
        "nvmlDeviceGetFieldValues": lambda handle, fields: [field] if fields == [90] else not_supported(),
        "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetMaxPcieLinkGeneration": not_supported,
        "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId="00000000:1B:00.0"),
        "nvmlDeviceGetCpuAffinity": lambda handle, words: [0b100000111] + [0] * (words - 1),
        "nvmlDeviceGetClockInfo": lambda handle, clock: {1: 1980, 2: 2619}[clock],
        "nvmlDeviceGetMaxClockInfo": lambda handle, clock: {1: 1980}[clock],
        "nvmlDeviceGetTemperature": lambda handle, sensor: 41,
        "nvmlDeviceGetPowerUsage": lambda handle: 120_500,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTopologyCommonAncestor": lambda first, second: 40,
        "nvmlDeviceGetP2PStatus": lambda first, second, index: 0,
    }
    for name, value in (values | changes).items():
        setattr(nvml, name, value)
    return nvml


def test_gpus_of_a_host_with_nvlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    slot = tmp_path / "bus/pci/devices/0000:1b:00.0"
    slot.mkdir(parents=True)
    (slot / "numa_node").write_text("1\n")
    topology, reason = nvlink_topology(tmp_path)
    assert topology is not None
    assert reason == ""
    assert topology.driver_version == "570.86.15"
    gpu = topology.gpus[1]
    assert len(gpu.nvlinks) == 18
    assert (gpu.nvlinks[17].link, gpu.nvlinks[17].version, gpu.nvlinks[17].remote) == (17, "4.0", "switch")
    assert gpu.nvlink_bytes_per_second == 26562e6
    assert (gpu.pcie_generation, gpu.pcie_width, gpu.pcie_generation_max, gpu.pcie_width_max) == (5, 16, None, None)
    assert (gpu.numa_node, gpu.cpus) == (1, "0-2,8")
    assert (gpu.sm_clock_hertz, gpu.memory_clock_hertz, gpu.sm_clock_max_hertz) == (1980e6, 2619e6, 1980e6)
    assert (gpu.temperature_celsius, gpu.power_limit_watts) == (41, 700)
    assert [(p.first, p.second, p.ancestor, p.nvlink) for p in topology.pairs] == [(0, 1, "node", True)]


def test_the_topology_is_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetCount=lambda: 1, NVML_NVLINK_MAX_LINKS=1))
    topology, _ = nvlink_topology(tmp_path)
    assert topology is not None
    document = topology.to_dict()
    assert document["gpus"][0]["nvlinks"] == [{"link": 0, "version": "4.0", "remote": "switch"}]
    assert document["pairs"] == []
    assert document["gpus"][0]["numa_node"] is None


def test_no_library_no_driver_and_no_gpu_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvlink_topology() == (None, "the package nvidia-ml-py is not installed")
    nvml = fake_nvml(nvmlDeviceGetCount=lambda: 0)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert nvlink_topology() == (None, "NVML sees no GPU")

    def no_driver() -> None:
        raise nvml.NVMLError("Driver Not Loaded")

    nvml.nvmlInit = no_driver
    assert nvlink_topology() == (None, "NVML does not start: Driver Not Loaded")


def test_conditions_of_cpu_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for zone, millidegrees in enumerate(["45000", "61500", "no sensor"]):
        (tmp_path / f"class/thermal/thermal_zone{zone}").mkdir(parents=True)
        (tmp_path / f"class/thermal/thermal_zone{zone}/temp").write_text(millidegrees + "\n")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetCount=lambda: 1))
    assert device_conditions(host(tmp_path / "proc"), tmp_path) == {
        "cpu_clock_hertz": 2500.5e6,
        "cpu_temperature_celsius": 61.5,
        "gpus": [
            {
                "index": 0,
                "sm_clock_hertz": 1980e6,
                "memory_clock_hertz": 2619e6,
                "temperature_celsius": 41,
                "power_watts": 120.5,
            }
        ],
    }


def test_conditions_that_nobody_tells_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device_conditions(tmp_path, tmp_path) == {}


def test_this_process_has_a_node() -> None:
    identity = node_identity()
    assert identity == node_identity()
    if sys.platform == "linux" and os.path.exists("/proc/self/ns/net"):
        assert identity.network_namespace.startswith("net:[")
