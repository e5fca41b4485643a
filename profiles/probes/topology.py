"""What the host says of itself: which node a rank is on, how GPUs are linked (NVML), clocks and temperature now."""

from __future__ import annotations

import importlib
import os
import platform
import re
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_SYS = Path("/sys")


@dataclass(frozen=True, kw_only=True)
class NodeIdentity:
    """What tells nodes apart: equal for two ranks on one node.

    The boot id tells machines of one name apart; the network namespace tells containers and namespaces on one
    machine apart, whose traffic does cross a (virtual) network.
    """

    hostname: str
    boot_id: str
    network_namespace: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def node_identity(proc: Path = _PROC) -> NodeIdentity:
    """This process's node; parts that the system does not tell are ""."""
    try:
        namespace = os.readlink(proc / "self/ns/net")  # "net:[4026531840]": the inode is the namespace
    except OSError:
        namespace = ""
    return NodeIdentity(
        hostname=platform.node(), boot_id=_read(proc / "sys/kernel/random/boot_id"), network_namespace=namespace
    )


@dataclass(frozen=True, kw_only=True)
class NvLink:
    """An active NVLink of a GPU: its version ("4.0") and what is at the other end (gpu, switch, ibmnpu)."""

    link: int
    version: str | None
    remote: str | None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as NVML sees it, by NVML's index (CUDA_VISIBLE_DEVICES does not change it). None: not known.

    `nvlink_bytes_per_second` is one link's, one direction; `cpus` the host's processors next to it ("0-31,64-95").
    """

    index: int
    name: str | None
    nvlinks: tuple[NvLink, ...]
    nvlink_bytes_per_second: float | None
    pcie_generation: int | None
    pcie_width: int | None
    pcie_generation_max: int | None
    pcie_width_max: int | None
    numa_node: int | None
    cpus: str | None
    sm_clock_hertz: float | None
    sm_clock_max_hertz: float | None
    memory_clock_hertz: float | None
    temperature_celsius: float | None
    power_limit_watts: float | None


@dataclass(frozen=True, kw_only=True)
class GpuPair:
    """How two GPUs meet: the nearest common ancestor on PCIe, and whether they read each other over NVLink.

    `ancestor` is internal (one board), single (one PCIe switch), multiple (several switches), hostbridge, node (one
    NUMA node) or system (across sockets): the levels of nvmlGpuTopologyLevel_t.
    """

    first: int
    second: int
    ancestor: str | None
    nvlink: bool | None


@dataclass(frozen=True, kw_only=True)
class GpuTopology:
    """The GPUs of this host and how each pair of them is joined."""

    driver_version: str | None
    gpus: tuple[Gpu, ...]
    pairs: tuple[GpuPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists, for provenance in a file."""
        return {
            "driver_version": self.driver_version,
            "gpus": [asdict(gpu) | {"nvlinks": [asdict(link) for link in gpu.nvlinks]} for gpu in self.gpus],
            "pairs": [asdict(pair) for pair in self.pairs],
        }


class _Nvml:
    """NVML's functions by name; a function that is missing or refuses answers None."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def ask(self, function: str, *arguments: Any) -> Any:
        call = getattr(self.module, function, None)
        try:
            return call(*arguments) if call is not None else None
        except self.module.NVMLError:
            return None

    def constant(self, name: str) -> Any:
        return getattr(self.module, name, None)

    def name_of(self, prefix: str, value: Any) -> str | None:
        """The constant with that prefix and value, without the prefix, in lower case."""
        names = [key for key, known in vars(self.module).items() if key.startswith(prefix) and known == value]
        return min(names).removeprefix(prefix).lower() if value is not None and names else None


@contextmanager
def _nvml() -> Iterator[_Nvml | str]:
    """NVML while it is open, or the reason why there is none."""
    try:
        module: Any = importlib.import_module("pynvml")
    except ImportError:
        yield "the package nvidia-ml-py is not installed"
        return
    try:
        module.nvmlInit()
    except module.NVMLError as error:
        yield f"NVML does not start: {error}"
        return
    try:
        yield _Nvml(module)
    finally:
        module.nvmlShutdown()


def nvlink_topology(sysfs: Path = _SYS) -> tuple[GpuTopology | None, str]:
    """The GPUs of this host and "", or None and the reason why NVML tells none."""
    with _nvml() as nvml:
        if isinstance(nvml, str):
            return None, nvml
        handles = _handles(nvml)
        if not handles:
            return None, "NVML sees no GPU"
        topology = GpuTopology(
            driver_version=_text(nvml.ask("nvmlSystemGetDriverVersion")),
            gpus=tuple(_gpu(nvml, index, handle, sysfs) for index, handle in handles.items()),
            pairs=tuple(
                _pair(nvml, (i, first), (j, second))
                for i, first in handles.items()
                for j, second in handles.items()
                if i < j
            ),
        )
    return topology, ""


def device_conditions(proc: Path = _PROC, sysfs: Path = _SYS) -> dict[str, Any]:
    """Clocks, temperatures and power now, to lay beside a measurement; only keys whose value is known.

    `cpu_clock_hertz` is the median over the processors, `cpu_temperature_celsius` the hottest zone of the host;
    `gpus` has one mapping per GPU that NVML sees.
    """
    clocks = re.findall(r"^cpu MHz\s*:\s*(\d+(?:\.\d+)?)", _read(proc / "cpuinfo"), flags=re.MULTILINE)
    zones = [_read(zone / "temp") for zone in sorted(sysfs.glob("class/thermal/thermal_zone*"))]
    celsius = [int(zone) / 1e3 for zone in zones if re.fullmatch(r"-?\d{1,9}", zone)]
    conditions: dict[str, Any] = {}
    if clocks:
        conditions["cpu_clock_hertz"] = statistics.median(float(clock) for clock in clocks) * 1e6
    if celsius:
        conditions["cpu_temperature_celsius"] = max(celsius)
    with _nvml() as nvml:
        gpus = [] if isinstance(nvml, str) else [_now(nvml, i, handle) for i, handle in _handles(nvml).items()]
    return conditions | ({"gpus": gpus} if gpus else {})


# ---- one GPU, one pair -----------------------------------------------------------------------------------


def _handles(nvml: _Nvml) -> dict[int, Any]:
    found = {i: nvml.ask("nvmlDeviceGetHandleByIndex", i) for i in range(nvml.ask("nvmlDeviceGetCount") or 0)}
    return {index: handle for index, handle in found.items() if handle is not None}


def _gpu(nvml: _Nvml, index: int, handle: Any, sysfs: Path) -> Gpu:
    now = _now(nvml, index, handle)
    words = -(-(os.cpu_count() or 1) // 64)
    affinity = nvml.ask("nvmlDeviceGetCpuAffinity", handle, words)
    bits = [64 * w + b for w, word in enumerate(affinity or []) for b in range(64) if word >> b & 1]
    return Gpu(
        index=index,
        name=_text(nvml.ask("nvmlDeviceGetName", handle)),
        nvlinks=tuple(_nvlinks(nvml, handle)),
        nvlink_bytes_per_second=_nvlink_speed(nvml, handle),
        pcie_generation=nvml.ask("nvmlDeviceGetCurrPcieLinkGeneration", handle),
        pcie_width=nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
        pcie_generation_max=nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_width_max=nvml.ask("nvmlDeviceGetMaxPcieLinkWidth", handle),
        numa_node=_numa_node(nvml, handle, sysfs),
        cpus=_ranges(bits) or None,
        sm_clock_hertz=now.get("sm_clock_hertz"),
        sm_clock_max_hertz=_times(nvml.ask("nvmlDeviceGetMaxClockInfo", handle, nvml.constant("NVML_CLOCK_SM")), 1e6),
        memory_clock_hertz=now.get("memory_clock_hertz"),
        temperature_celsius=now.get("temperature_celsius"),
        power_limit_watts=_times(nvml.ask("nvmlDeviceGetEnforcedPowerLimit", handle), 1e-3),
    )


def _now(nvml: _Nvml, index: int, handle: Any) -> dict[str, Any]:
    sensor = nvml.constant("NVML_TEMPERATURE_GPU")
    temperature = nvml.ask("nvmlDeviceGetTemperatureV", handle, sensor)
    if temperature is None:  # a library from before that function
        temperature = nvml.ask("nvmlDeviceGetTemperature", handle, sensor)
    values = {
        "sm_clock_hertz": _times(nvml.ask("nvmlDeviceGetClockInfo", handle, nvml.constant("NVML_CLOCK_SM")), 1e6),
        "memory_clock_hertz": _times(nvml.ask("nvmlDeviceGetClockInfo", handle, nvml.constant("NVML_CLOCK_MEM")), 1e6),
        "temperature_celsius": _times(temperature, 1.0),
        "power_watts": _times(nvml.ask("nvmlDeviceGetPowerUsage", handle), 1e-3),
    }
    return {"index": index} | {key: value for key, value in values.items() if value is not None}


def _nvlinks(nvml: _Nvml, handle: Any) -> Iterator[NvLink]:
    for link in range(nvml.constant("NVML_NVLINK_MAX_LINKS") or 0):
        if nvml.ask("nvmlDeviceGetNvLinkState", handle, link) != nvml.constant("NVML_FEATURE_ENABLED"):
            continue
        version = nvml.name_of("NVML_NVLINK_VERSION_", nvml.ask("nvmlDeviceGetNvLinkVersion", handle, link))
        remote = nvml.ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        yield NvLink(
            link=link,
            version=version.replace("_", ".") if version else None,
            remote=nvml.name_of("NVML_NVLINK_DEVICE_TYPE_", remote),
        )


def _nvlink_speed(nvml: _Nvml, handle: Any) -> float | None:
    """Bytes per second of one link and direction: the field that holds for all active links, in MB/s."""
    values = nvml.ask("nvmlDeviceGetFieldValues", handle, [nvml.constant("NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON")])
    if not values or values[0].nvmlReturn != 0 or not values[0].value.uiVal:
        return None
    return values[0].value.uiVal * 1e6


def _numa_node(nvml: _Nvml, handle: Any, sysfs: Path) -> int | None:
    """The NUMA node of the slot, from the kernel: NVML's own call answers only where the GPU is a node itself."""
    address = _text(getattr(nvml.ask("nvmlDeviceGetPciInfo", handle), "busId", None))
    if not address:
        return None
    domain, _, rest = address.lower().partition(":")  # NVML writes eight digits of domain, the kernel four
    node = _read(sysfs / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node")
    return int(node) if re.fullmatch(r"\d{1,6}", node) else None


def _pair(nvml: _Nvml, first: tuple[int, Any], second: tuple[int, Any]) -> GpuPair:
    level = nvml.ask("nvmlDeviceGetTopologyCommonAncestor", first[1], second[1])
    status = nvml.ask("nvmlDeviceGetP2PStatus", first[1], second[1], nvml.constant("NVML_P2P_CAPS_INDEX_NVLINK"))
    ancestor = nvml.name_of("NVML_TOPOLOGY_", level)
    return GpuPair(
        first=first[0],
        second=second[0],
        ancestor="node" if ancestor == "cpu" else ancestor,  # two names of one level
        nvlink=None if status is None else status == nvml.constant("NVML_P2P_STATUS_OK"),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _text(value: Any) -> str | None:
    """Text of NVML, which old libraries give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _times(value: Any, factor: float) -> float | None:
    return None if value is None else value * factor


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 8] -> "0-2,8"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
