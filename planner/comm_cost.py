"""Seconds of communication: what was measured for a group, else the α-β formula over the link tiers it spans.

[Note: Where a group lies]
Ranks count tp fastest, then cp, dp, pp. A group of axis a has `size` ranks, `stride` apart, so it spans
size·stride neighbouring devices, and the narrowest tier that joins so many carries it. When it crosses
nodes with k of its ranks in each node, a ring enters and leaves a node once, and k devices lend it their
share of the network: its bus bandwidth is min(inside, k·across),
and so on with more tiers. All groups of an axis run at once, and
each device's share of the link already counts for one device, so groups side by side need no further split.
Points are measured the same way, every group of a (size, stride) at once, and outrank the formula
([Note: Alpha-beta with a ramp] in profiles/alpha_beta.py) wherever just this group was measured.
A message from one stage to the next is carried by the narrowest tier that has both in one of its blocks of `span`
neighbouring devices: of pp 4 on two nodes of 2 the first and the last hop stay inside, the middle one crosses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from profiles.alpha_beta import AlphaBeta
from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile
from profiles.points import FSDP_COLLECTIVES, SCALARS_BYTES, SUM_OF_SCALARS


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
        # On nodes of another width points hold for the groups that lie inside a node there and here.
        measured, here = hardware.devices_per_node, cluster.devices_per_node
        self._widest_span = cluster.devices if measured in (0, here) else min(measured, here)
        self._found: dict[tuple[str, Group, int], AlphaBeta] = {}
        self._tiers: dict[Group, tuple[int, ...]] = {}

    def collective_seconds(self, operation: str, group: Group, bytes_total: float) -> float:
        """Seconds of a collective; `bytes_total` is the gathered, reduced or unscattered tensor."""
        if group.size == 1 or bytes_total == 0:
            return 0.0
        measured = self._measured(operation, group, bytes_total)
        return (
            self._figures(operation, group).seconds(operation, group.size, bytes_total)
            if measured is None
            else measured
        )

    def fsdp_seconds(self, operation: str, group: Group, bytes_total: float) -> float | None:
        """Seconds of gathering or reducing one module's parameters as FSDP2 does it, where that was measured.

        Where one size was (a slow link leaves no time for more), what FSDP2 took there beyond its collective comes
        on top of the collective of this size.
        """
        only = self._hardware.only_collective_point(operation, group.size, group.stride)
        if only is None or not self._points_hold(group):
            return self._measured(operation, group, bytes_total)
        size_bytes, seconds = only
        collective = FSDP_COLLECTIVES[operation]
        beyond = seconds - self.collective_seconds(collective, group, size_bytes)
        return self.collective_seconds(collective, group, bytes_total) + max(0.0, beyond)

    def scalars_seconds(self, group: Group) -> float:
        """Seconds of summing a step's loss and gradient norm over the group."""
        measured = self._measured(SUM_OF_SCALARS, group, SCALARS_BYTES)
        return self.collective_seconds("all_reduce", group, SCALARS_BYTES) if measured is None else measured

    def pair_sum_seconds(self, group: Group, size_bytes: float) -> float:
        """Seconds of an all-reduce between the first and the last rank of the group alone."""
        ends = Group(2, (group.size - 1) * group.stride)
        measured = self._measured("all_reduce", ends, size_bytes)
        if measured is not None:
            return measured
        return self._figures("all_reduce", ends, group.size * group.stride).seconds("all_reduce", 2, size_bytes)

    def neighbour_seconds(self, group: Group, size_bytes: float) -> float:
        """Seconds of one step of a ring over the group: all send to the next and receive at once."""
        for operation in ("exchange", "send_recv") if group.size == 2 else ("exchange",):
            measured = self._measured(operation, group, size_bytes)
            if measured is not None:
                return measured
        # Published and older profiles know of single messages alone.
        known = {o.operation for link in self._cluster.links for o in link.operations}
        operation = "exchange" if "exchange" in known else "send_recv"
        return self._figures(operation, group).seconds(operation, group.size, size_bytes)

    def hop_seconds(self, group: Group, size_bytes: float) -> tuple[float, ...]:
        """Seconds of one message from each rank of the group to the next, and from the last round to the first.

        Of a group that spans several nodes some neighbours lie in one and some in two.
        """
        tiers = self._hop_tiers(group)
        seconds = {tier: self._message_seconds(tier, group.stride, size_bytes) for tier in set(tiers)}
        return tuple(seconds[tier] for tier in tiers)

    def _hop_tiers(self, group: Group) -> tuple[int, ...]:
        """The number of the narrowest tier that joins both sides of each hop wholly."""
        if group not in self._tiers:
            stride, last = group.stride, group.size * group.stride
            hops = [(begin, begin + 2 * stride) for begin in range(0, last - stride, stride)]
            self._tiers[group] = tuple(self._tier(begin, end) for begin, end in [*hops, (0, last)])
        return self._tiers[group]

    def _tier(self, begin: int, end: int) -> int:
        """The number of the narrowest tier that joins devices `begin` to `end` - 1."""
        spans = [link.span for link in self._cluster.links]
        return next((i for i, span in enumerate(spans) if begin // span == (end - 1) // span), len(spans) - 1)

    def _message_seconds(self, tier: int, stride: int, size_bytes: float) -> float:
        """Seconds of one message over the tier between two ranks of a group."""
        group, link = Group(2, stride), self._cluster.links[tier]
        if self._tier(0, 2 * stride) == tier:
            measured = self._measured("send_recv", group, size_bytes)
            if measured is not None:
                return measured
        figures = link.operation("send_recv", 2).figures
        if link.shared:
            # The groups beside this one cross the wire with it, as many as its stride or as there are devices.
            below = max((other.span for other in self._cluster.links if other.span < link.span), default=1)
            alone = below / min(group.stride, below)
            figures = replace(figures, bandwidth_bytes_per_second=alone * figures.bandwidth_bytes_per_second)
        return figures.seconds("send_recv", 2, size_bytes)

    def _measured(self, operation: str, group: Group, size_bytes: float) -> float | None:
        if not self._points_hold(group):
            return None
        return self._hardware.collective_seconds(operation, group.size, size_bytes, group.stride)

    def _points_hold(self, group: Group) -> bool:
        return (group.size - 1) * group.stride < self._widest_span

    def _figures(self, operation: str, group: Group, span: int = 0) -> AlphaBeta:
        """The tiers' figures for the group: latency of the widest it crosses, bandwidth of the tightest.

        `span` is how many neighbouring devices it lies among, where they are not size times stride.
        """
        key = (operation, group, span)
        if key not in self._found:
            self._found[key] = self._find_figures(*key)
        return self._found[key]

    def _find_figures(self, operation: str, group: Group, span: int) -> AlphaBeta:
        links = self._cluster.links
        span = span or group.size * group.stride
        widest = links.index(self._cluster.link_within(span))
        bandwidths, below = [], 1
        for link in links[: widest + 1]:
            # `below` neighbours share each entry into this tier, and those of them in the group lend theirs.
            sharing = max(1, min(group.size, below // group.stride))
            whole = group.size if span <= link.span else 0
            bandwidths.append(sharing * link.operation(operation, whole).bandwidth_bytes_per_second)
            below = link.span
        figures = links[widest].operation(operation, group.size).figures
        return replace(figures, bandwidth_bytes_per_second=min(bandwidths))
