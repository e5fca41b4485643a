"""Measured collectives -> link tiers: known figures come back, tier by tier, and sharing is taken into account."""

from __future__ import annotations

import pytest

from profiles.alpha_beta import AlphaBeta
from profiles.cluster import ClusterSpec, LinkTier
from profiles.link_fit import fit_links, with_collectives
from profiles.link_tiers import Tier
from profiles.points import CollectivePoint

INSIDE = AlphaBeta(fixed_seconds=2e-5, step_seconds=3e-6, bandwidth_bytes_per_second=2e11)
ACROSS = AlphaBeta(fixed_seconds=0.0, step_seconds=1e-5, bandwidth_bytes_per_second=2e10)
TIERS = (Tier(span=4, bandwidth_bytes_per_second=1e11), Tier(span=8, bandwidth_bytes_per_second=1e10))


def points(operation: str, figures: AlphaBeta, ranks: int, stride: int, sharing: int = 1) -> list[CollectivePoint]:
    """As a tier of `figures` would be measured, with `sharing` devices of a node lending their links."""
    lent = AlphaBeta(
        fixed_seconds=figures.fixed_seconds,
        step_seconds=figures.step_seconds,
        bandwidth_bytes_per_second=sharing * figures.bandwidth_bytes_per_second,
    )
    return [
        CollectivePoint(
            operation=operation, ranks=ranks, stride=stride, bytes=size, seconds=lent.seconds(operation, ranks, size)
        )
        for size in (2**10, 2**20, 2**28)
    ]


def two_nodes() -> list[CollectivePoint]:
    return [
        *points("all_reduce", INSIDE, 2, 1),
        *points("all_reduce", INSIDE, 4, 1),
        *points("all_reduce", ACROSS, 2, 4),
        *points("all_reduce", ACROSS, 8, 1, sharing=4),
        *points("send_recv", ACROSS, 2, 4),
    ]


def test_the_figures_of_each_tier_come_back() -> None:
    node, network = fit_links(two_nodes(), TIERS, devices_per_node=4)
    assert (node.tier, node.span, network.tier, network.span) == ("node", 4, "network", 8)
    assert node.fixed_latency_seconds == pytest.approx(2e-5, rel=1e-3)
    assert node.latency_seconds == pytest.approx(3e-6, rel=1e-3)
    assert node.bandwidth_bytes_per_second == pytest.approx(2e11, rel=1e-3)
    # One device's share of the network, though a ring over all 8 was four times as fast.
    assert network.bandwidth_bytes_per_second == pytest.approx(2e10, rel=1e-3)
    assert network.latency_seconds == pytest.approx(1e-5, rel=1e-3)
    assert [o.operation for o in network.operations] == ["all_reduce", "send_recv"]
    assert "fit of 6 points, residual 0% in the median, 0% worst" in network.source


def test_a_tier_without_collectives_has_its_point_to_point_bandwidth() -> None:
    node, network = fit_links(points("all_reduce", INSIDE, 4, 1), TIERS, devices_per_node=4)
    assert node.bandwidth_bytes_per_second == pytest.approx(2e11, rel=1e-3)
    assert (network.bandwidth_bytes_per_second, network.operations) == (1e10, ())
    assert "latency nominal" in network.source


def test_one_rank_has_no_link_but_a_tier() -> None:
    (alone,) = fit_links([], [], devices_per_node=1)
    assert (alone.span, alone.source) == (1, "one rank: no link")


def test_collectives_of_more_ranks_than_the_cluster_add_nodes_and_a_tier() -> None:
    link = LinkTier(tier="node", span=4, bandwidth_bytes_per_second=1e9, latency_seconds=1e-6)
    one = ClusterSpec(name="c", hardware="h", nodes=1, devices_per_node=4, memory_bytes=1e9, links=(link,))
    two = with_collectives(one, two_nodes())
    assert (two.nodes, [link.span for link in two.links]) == (2, [4, 8])
    assert two.links[1].bandwidth_bytes_per_second == pytest.approx(2e10, rel=1e-3)
    assert with_collectives(one, points("all_reduce", INSIDE, 4, 1)).nodes == 1
