"""Measured collectives -> the link tiers of a ClusterSpec: α, β and ramp of each operation on each tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .alpha_beta import Fit, Sample, fit
from .cluster import COLLECTIVES, ClusterSpec, LinkOperation, LinkTier
from .link_tiers import Tier
from .points import CollectivePoint

_NOTHING_MEASURED = Tier(span=1, bandwidth_bytes_per_second=1e9)  # one device: no link, and no plan asks for one
_FIRST_GUESS_SECONDS = 1e-4  # latency of a tier that only its point-to-point bandwidth is known of


def fit_links(
    points: Sequence[CollectivePoint],
    tiers: Sequence[Tier],
    devices_per_node: int,
    *,
    shared_wires: bool = False,
) -> tuple[LinkTier, ...]:
    """The tiers with the figures that fit the groups which span each of them best, operation by operation.

    A group that was measured is priced by its points; these figures price the others. `source` tells how far
    off the fit is where it can be compared. `shared_wires` says that a node has one wire for all its devices.
    """
    links = []
    for index, tier in enumerate(tiers or (_NOTHING_MEASURED,)):
        below = tiers[index - 1].span if index else 1
        inside = [p for p in points if below < p.ranks * p.stride <= tier.span and not p.uneven]
        fits = {}
        for operation in COLLECTIVES:
            samples = [_sample(p, below) for p in inside if p.operation == operation]
            found = fit(samples) if samples else None
            if found is not None:
                fits[operation] = found
        link = _tier(tier, _name(tier, devices_per_node), fits)
        links.append(replace(link, shared=shared_wires and tier.span > devices_per_node))
    return tuple(links)


def with_collectives(cluster: ClusterSpec, points: Sequence[CollectivePoint]) -> ClusterSpec:
    """The cluster with its links fitted to these points, and as many nodes more as their groups have ranks for."""
    tiers = [Tier(span=link.span, bandwidth_bytes_per_second=link.bandwidth_bytes_per_second) for link in cluster.links]
    widest = max((p.ranks * p.stride for p in points), default=1)
    nodes = max(cluster.nodes, -(-widest // cluster.devices_per_node))
    if nodes * cluster.devices_per_node > tiers[-1].span:
        tiers.append(replace(tiers[-1], span=nodes * cluster.devices_per_node))
    shared = any(link.shared for link in cluster.links)
    fitted = fit_links(points, tiers, cluster.devices_per_node, shared_wires=shared)
    return replace(cluster, nodes=nodes, links=fitted)


def _sample(point: CollectivePoint, below: int) -> Sample:
    """`below` neighbours share each entry into the tier; those of them in the group lend it theirs."""
    sharing = 1 if point.operation == "send_recv" else max(1, min(point.ranks, below // point.stride))
    return Sample(point.operation, point.ranks, point.bytes, point.seconds, float(sharing))


def _name(tier: Tier, devices_per_node: int) -> str:
    if tier.span == devices_per_node:
        return "node"
    return "network" if tier.span > devices_per_node else f"link of {tier.span}"


def _tier(tier: Tier, name: str, fits: dict[str, Fit]) -> LinkTier:
    common = fits.get("all_reduce") or next(iter(fits.values()), None)
    if common is None:
        return LinkTier(
            tier=name,
            span=tier.span,
            bandwidth_bytes_per_second=tier.bandwidth_bytes_per_second,
            latency_seconds=_FIRST_GUESS_SECONDS,
            source="measured: point to point only, latency nominal" if tier.span > 1 else "one rank: no link",
        )
    operations = tuple(
        LinkOperation(
            operation=operation,
            bandwidth_bytes_per_second=found.figures.bandwidth_bytes_per_second,
            latency_seconds=found.figures.step_seconds,
            fixed_latency_seconds=found.figures.fixed_seconds,
            ramp_bytes=found.figures.ramp_bytes,
            source=f"measured: {found.summary}",
        )
        for operation, found in fits.items()
    )
    return LinkTier(
        tier=name,
        span=tier.span,
        bandwidth_bytes_per_second=common.figures.bandwidth_bytes_per_second,
        latency_seconds=common.figures.step_seconds,
        fixed_latency_seconds=common.figures.fixed_seconds,
        operations=operations,
        source=f"measured: all-reduce, {common.summary}",
    )
