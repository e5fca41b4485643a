"""Seconds of communication: ring collectives and point-to-point over the link tier that a group spans.

[Note: Where a group lies]
Ranks count tp fastest, then cp, dp, pp. A group of axis a has `size` ranks, `stride` apart, so it spans
size·stride neighbouring devices, and the narrowest tier that joins so many carries it. When it crosses
nodes with k of its ranks in each node, a ring enters and leaves a node once, and k devices lend it their
share of the network: its bus bandwidth is min(inside, k·across),
and so on with more tiers. All groups of an axis run at once, and
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
        links = self._cluster.links
        widest = links.index(self._cluster.link_within(group.size * group.stride))
        bandwidths, below = [], 1
        for link in links[: widest + 1]:
            # `below` neighbours share each entry into this tier, and those of them in the group lend theirs.
            sharing = max(1, min(group.size, below // group.stride))
            bandwidths.append(sharing * link.bandwidth_bytes_per_second)
            below = link.span
        return min(bandwidths), links[widest].latency_seconds

    def pair_sum_seconds(self, group: Group, size_bytes: float) -> float:
        """Seconds of an all-reduce between the first and the last rank of the group alone."""
        measured = self._hardware.collective_seconds("all_reduce", 2, size_bytes)
        if measured is not None:
            return measured
        link = self._cluster.link_within(group.size * group.stride)
        return 2 * link.latency_seconds + size_bytes / link.bandwidth_bytes_per_second

    def send_seconds(self, group: Group, size_bytes: float) -> float:
        """Seconds of one message between neighbours of the group, the slowest pair of them.

        Of a group that spans several nodes some neighbours lie in two.
        """
        measured = self._hardware.collective_seconds("send_recv", 2, size_bytes)
        if measured is not None:
            return measured
        link = self._cluster.link_within(group.size * group.stride)
        return link.latency_seconds + size_bytes / link.bandwidth_bytes_per_second
