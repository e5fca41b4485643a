"""Seconds of communication: ring collectives and point-to-point over the link tier that a group spans.

[Note: Where a group lies]
Ranks count tp fastest, then cp, dp, pp. A group of axis a has `size` ranks, `stride` apart, so it spans
size·stride neighbouring devices, and the narrowest tier that joins so many carries it. When it crosses
nodes with k of its ranks in each node, a ring enters and leaves a node once, and k devices lend it their
share of the network: its bus bandwidth is min(inside, k·across). All groups of an axis run at once, and
each device's share of the link already counts for one device, so groups side by side need no further split.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile

# Bytes on the wire per rank and steps of latency of a ring, for `bytes` of the whole tensor over n ranks
# (Thakur, Rabenseifner, Gropp 2005; the factors of nccl-tests' bus bandwidth).
_RING_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1}


@dataclass(frozen=True)
class Group:
    """The ranks of one mesh axis: how many and how far apart."""

    size: int
    stride: int


class CommModel:
    """Prices communication of one cluster."""

    def __init__(self, cluster: ClusterSpec, hardware: HardwareProfile) -> None:
        self._cluster = cluster
        self._hardware = hardware

    def collective_seconds(self, operation: str, group: Group, bytes_total: float) -> float:
        """Seconds of a collective; `bytes_total` is the gathered, reduced or unscattered tensor."""
        if group.size == 1 or bytes_total == 0:
            return 0.0
        measured = self._hardware.collective_seconds(operation, group.size, bytes_total)
        if measured is not None:
            return measured
        bandwidth, latency = self._ring(group)
        passes = _RING_PASSES[operation]
        steps = passes * (group.size - 1)
        return steps * latency + passes * (group.size - 1) / group.size * bytes_total / bandwidth

    def _ring(self, group: Group) -> tuple[float, float]:
        """(bus bandwidth in bytes per second, latency of one step) of the group's ring."""
        link = self._cluster.link_within(group.size * group.stride)
        bandwidth = link.bandwidth_bytes_per_second
        inside = self._cluster.links[0]
        if link is not inside:
            sharing = max(1, min(group.size, inside.span // group.stride))
            bandwidth = min(inside.bandwidth_bytes_per_second, sharing * bandwidth)
        return bandwidth, link.latency_seconds

    def send_seconds(self, stride: int, size_bytes: float) -> float:
        """Seconds of one message to the rank `stride` further, as pipeline neighbours are."""
        measured = self._hardware.collective_seconds("send_recv", 2, size_bytes)
        if measured is not None:
            return measured
        link = self._cluster.link_within(2 * stride)
        return link.latency_seconds + size_bytes / link.bandwidth_bytes_per_second
