"""The device and the links of a published run: the nearest of the catalogue, at the row's nominal bandwidths."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .catalogue import list_catalogue, resolve_cluster, resolve_hardware_path
from .cluster import ClusterSpec, LinkTier
from .hardware import HardwareProfile, load_hardware
from .input_error import InputError
from .published_runs import PublishedRun

# GB/s of one direction, (inside a node, per device between nodes), of the links that each cluster of the catalogue
# is built of, as its file's first lines say; None: it has no network. NVLink 2, 3, 4 and 5: 150, 300, 450 and 900;
# PCIe 4.0 x16: 32; a port of 200 or 400 Gbit/s: 25 or 50; what devices share is divided by them.
NOMINAL_GBPS: dict[str, tuple[float, float | None]] = {
    "aws-p5": (450.0, 50.0),
    "cloud-a100-400g": (300.0, 6.25),
    "dgx-2": (150.0, 6.25),
    "dgx-a100": (300.0, 25.0),
    "dgx-b200": (900.0, 50.0),
    "dgx-h100": (450.0, 50.0),
    "dgx-h200": (450.0, 50.0),
    "ethernet-25g": (32.0, 0.390625),
    "gb200-nvl72": (900.0, 50.0),
    "pcie-a100": (32.0, None),
}
# Clusters whose own site measured their collectives, and the word in the sources of the runs that ran there:
# nanotron's scripts submit to Hugging Face's cluster (huggingface/nanotron, scripts/scaling_benchmarks.py).
_SITES = {"aws-p5": "nanotron"}
# The same chip with fewer links, which the row's own bandwidths say.
_SAME_CHIP = {"A800": "A100", "H800": "H100"}
_NETWORK = "network"


@dataclass(frozen=True)
class Catalogue:
    """Every cluster and hardware profile of the catalogue, loaded once for many rows."""

    clusters: Mapping[str, ClusterSpec]
    hardware: Mapping[str, HardwareProfile]


def load_catalogue() -> Catalogue:
    return Catalogue(
        clusters={name: resolve_cluster(name) for name in list_catalogue("clusters")},
        hardware={name: load_hardware(resolve_hardware_path(name)) for name in list_catalogue("hardware")},
    )


class NoDeviceError(Exception):
    """The catalogue has nothing for the devices of a row; the text says for what."""


def hardware_of(gpu: str, names: list[str]) -> str:
    """The hardware profile that a GPU's name means: its chip, then SXM or PCIe, then the nearest memory.

    A profile of a lowered power limit is meant where the name states just that limit.

    >>> hardware_of("A100-SXM-40GB", ["a100-sxm-40gb", "a100-sxm-80gb"])
    'a100-sxm-40gb'

    Raises:
        NoDeviceError: no profile is of that chip.
    """
    text = gpu.upper()
    for other, chip in _SAME_CHIP.items():
        text = text.replace(other, chip)
    chips = sorted({name.partition("-")[0] for name in names}, key=lambda chip: (-len(chip), chip))
    chip = next((chip for chip in chips if re.search(rf"(?<![A-Z0-9]){chip.upper()}", text)), None)
    if chip is None:
        raise NoDeviceError(f"no hardware profile for {gpu or 'a GPU that is not named'}")
    of_chip = [name for name in names if name.partition("-")[0] == chip]
    of_chip = [n for n in of_chip if (w := _watts(n)) and w == _watts(text)] or [n for n in of_chip if not _watts(n)]
    form = "pcie" if "PCIE" in text else "sxm"
    of_form = [name for name in of_chip if form in name] or of_chip
    wanted = memory_gb(text)
    return min(of_form, key=lambda name: abs((memory_gb(name) or 0) - wanted) if wanted else -(memory_gb(name) or 0))


def _watts(text: str) -> int | None:
    """The power limit that a device's name states."""
    found = re.search(r"(?<![A-Z0-9])([0-9]+) ?W(?![A-Z0-9])", text.upper())
    return int(found[1]) if found else None


def memory_gb(text: str) -> int | None:
    """The memory that a device's name states."""
    found = re.search(r"([0-9]+) ?GB", text.upper())
    return int(found[1]) if found else None


def cluster_of(run: PublishedRun, devices: int, catalogue: Catalogue) -> tuple[ClusterSpec, tuple[str, ...]]:
    """The cluster of a row's devices, and what of it the row did not state.

    Tiers are those of the nearest cluster of the catalogue (by device, then by links, then the faster network):
    what its links achieve of their nominal bandwidth, of the row's nominal bandwidth; latencies stay.

    Raises:
        NoDeviceError: nothing for this GPU, or devices that do not fill their nodes.
    """
    name = hardware_of(run.gpu, list(catalogue.hardware))
    hardware = catalogue.hardware[name]
    width = run.gpus_per_node
    near = _nearest(run, name, devices, catalogue)
    assumed = [] if width else [f"gpus_per_node {near.devices_per_node}"]
    width = width or near.devices_per_node
    intra, inter = NOMINAL_GBPS[near.name]
    tiers = [_scaled(link, (run.intra_bw_GBps or intra) / intra) for link in near.links if link.tier != _NETWORK]
    if width != near.devices_per_node:
        tiers = [replace(tiers[-1], span=width, operations=tuple(o for o in tiers[-1].operations if o.ranks == 0))]
    if run.intra_bw_GBps is None and devices > 1:
        assumed.append(f"links inside a node as {near.name}")
    if devices > width:
        wide = next((link for link in near.links if link.tier == _NETWORK), None)
        if wide is None or inter is None:
            raise NoDeviceError(f"no network figures for {run.gpu}")
        if run.inter_bw_GBps_per_gpu is None:
            assumed.append(f"network as {near.name}")
        wide = _scaled(wide, (run.inter_bw_GBps_per_gpu or inter) / inter)
        tiers.append(replace(wide, span=max(width * -(-wide.span // width), devices)))
    whole = ClusterSpec(
        name=f"{near.name} of the row",
        hardware=name,
        nodes=-(-devices // width),
        devices_per_node=width,
        memory_bytes=hardware.memory_bytes * _memory_ratio(run.gpu, name),
        links=tuple(tiers),
    )
    try:
        return whole.with_devices(devices), tuple(assumed)
    except InputError:
        raise NoDeviceError(f"{devices} devices do not fill nodes of {width}") from None


def _nearest(run: PublishedRun, hardware: str, devices: int, catalogue: Catalogue) -> ClusterSpec:
    chip, form = hardware.partition("-")[0], "pcie" in hardware

    def likeness(cluster: ClusterSpec) -> tuple[bool, bool, bool, bool, bool, float, float]:
        intra, inter = NOMINAL_GBPS[cluster.name]
        wanted = run.inter_bw_GBps_per_gpu
        network = -abs(math.log(wanted / inter)) if wanted and inter else 0.0
        inside = -abs(math.log(run.intra_bw_GBps / intra)) if run.intra_bw_GBps else 0.0
        enough = inter is not None or devices <= (run.gpus_per_node or cluster.devices_per_node)
        same = cluster.hardware.partition("-")[0] == chip
        return (
            enough,
            cluster.name in _SITES,
            cluster.hardware == hardware,
            same,
            ("pcie" in cluster.hardware) == form,
            inside + network,
            inter or 0.0,
        )

    strangers = {name for name, site in _SITES.items() if site not in run.source}
    return max((c for name, c in catalogue.clusters.items() if name not in strangers), key=likeness)


def _scaled(link: LinkTier, ratio: float) -> LinkTier:
    operations = tuple(
        replace(o, bandwidth_bytes_per_second=o.bandwidth_bytes_per_second * ratio) for o in link.operations
    )
    return replace(link, bandwidth_bytes_per_second=link.bandwidth_bytes_per_second * ratio, operations=operations)


def _memory_ratio(gpu: str, name: str) -> float:
    """Memory that the row's device has for each byte of the profile's (an H100 of 96 GB and the one of 80)."""
    stated, known = memory_gb(gpu), memory_gb(name)
    return stated / known if stated and known else 1.0
