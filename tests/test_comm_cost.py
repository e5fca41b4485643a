"""Seconds of communication: the formula over the tiers a group spans, sends, and what was measured for a group.

What the catalogue's clusters come to is in test_catalogue_hardware.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.comm_cost import CommModel, Group
from profiles.cluster import ClusterSpec, LinkOperation, LinkTier
from profiles.points import CollectivePoint
from tests.oracles.small_world import small_cluster, small_hardware

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def nodes_of_8(nodes: int, *, inside: dict[str, Any] | None = None, across: dict[str, Any] | None = None) -> CommModel:
    """Nodes of 8 devices: 200 GB/s, 40 us and 3 us a step inside; 20 GB/s and 10 us a step across."""
    node: dict[str, Any] = {
        "bandwidth_bytes_per_second": 200e9,
        "latency_seconds": 3e-6,
        "fixed_latency_seconds": 40e-6,
    }
    network: dict[str, Any] = {"bandwidth_bytes_per_second": 20e9, "latency_seconds": 10e-6}
    links = (
        LinkTier(tier="node", span=8, **(node | (inside or {}))),
        LinkTier(tier="network", span=128, **(network | (across or {}))),
    )
    return CommModel(replace(small_cluster(8), nodes=nodes, links=links), small_hardware())


# ---- the formula -----------------------------------------------------------------------------------------


def test_inside_a_node_a_ring_passes_the_tensor_once_or_twice_in_n_minus_1_steps() -> None:
    comm, group, size = nodes_of_8(1), Group(8, 1), 8e9
    # 7 GB over 200 GB/s are 35 ms, 7 steps 21 us; an all-reduce has both twice and the 40 us once.
    for operation in ("all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        assert comm.collective_seconds(operation, group, size) == pytest.approx(0.035 + 21e-6 + 40e-6, rel=1e-12)
    assert comm.collective_seconds("all_reduce", group, size) == pytest.approx(0.07 + 42e-6 + 40e-6, rel=1e-12)


def test_small_messages_are_latency() -> None:
    assert nodes_of_8(1).collective_seconds("all_reduce", Group(8, 1), 4.0) == pytest.approx(82e-6, rel=1e-5)
    assert nodes_of_8(1).collective_seconds("all_gather", Group(2, 1), 4.0) == pytest.approx(43e-6, rel=1e-5)
    # The network's own latencies, which have nothing that comes once.
    assert nodes_of_8(2).collective_seconds("all_reduce", Group(16, 1), 4.0) == pytest.approx(300e-6, rel=1e-5)


def test_across_nodes_a_ring_has_the_network_shares_of_its_ranks_in_a_node() -> None:
    comm, size = nodes_of_8(4), 1e12  # latency does not matter

    def bandwidth(group: Group) -> float:
        return (group.size - 1) / group.size * size / comm.collective_seconds("all_gather", group, size)

    assert bandwidth(Group(32, 1)) == pytest.approx(8 * 20e9, rel=0.001)
    assert bandwidth(Group(16, 2)) == pytest.approx(4 * 20e9, rel=0.001)
    assert bandwidth(Group(8, 4)) == pytest.approx(2 * 20e9, rel=0.001)
    assert bandwidth(Group(4, 8)) == pytest.approx(20e9, rel=0.001)
    assert bandwidth(Group(2, 16)) == pytest.approx(20e9, rel=0.001)
    # Inside a node a group has the node's links whatever its stride.
    assert bandwidth(Group(4, 2)) == pytest.approx(200e9, rel=0.001)


def test_a_network_faster_than_the_node_does_not_make_a_ring_faster_than_its_node() -> None:
    comm = CommModel(small_cluster(16, 2, inside=(1e9, 0.0), across=(9e8, 0.0)), small_hardware())
    assert comm.collective_seconds("all_gather", Group(16, 1), 16e9) == pytest.approx(15.0)


def test_a_tier_may_carry_one_collective_otherwise_than_its_ring() -> None:
    """A switch that reduces: twice the bandwidth for 8 ranks, a ramp of 3 GB for all others."""
    reduces = LinkOperation(
        operation="all_reduce", ranks=8, bandwidth_bytes_per_second=400e9, latency_seconds=0.0, ramp_bytes=0.0
    )
    other = LinkOperation(
        operation="all_reduce", bandwidth_bytes_per_second=100e9, latency_seconds=1e-6, ramp_bytes=3e9
    )
    comm, plain = nodes_of_8(4, inside={"operations": (reduces, other)}), nodes_of_8(4)
    assert comm.collective_seconds("all_reduce", Group(8, 1), 8e9) == pytest.approx(14e9 / 400e9, rel=1e-12)
    # 4 ranks: 6 steps; 2 * 3/4 of 1 GB over 100 GB/s, and sqrt(1 + 3) of that for the ramp.
    assert comm.collective_seconds("all_reduce", Group(4, 2), 1e9) == pytest.approx(6e-6 + 2 * 0.015, rel=1e-12)
    assert comm.collective_seconds("all_gather", Group(8, 1), 8e9) == plain.collective_seconds(
        "all_gather", Group(8, 1), 8e9
    )
    # Over 32 ranks the switch's 8 are a part of a ring: the node lends it the ring's 100 GB/s, which is less than
    # the 8 shares of the network, and the network's latency rules.
    assert comm.collective_seconds("all_reduce", Group(32, 1), 32e9) == pytest.approx(62e9 / 100e9 + 62 * 10e-6)
    assert plain.collective_seconds("all_reduce", Group(32, 1), 32e9) == pytest.approx(62e9 / 160e9 + 62 * 10e-6)
    # Nor has the switch all of 8 ranks that lie 2 in a node, however fast the network.
    fast = nodes_of_8(4, inside={"operations": (reduces, other)}, across={"bandwidth_bytes_per_second": 190e9})
    assert fast.collective_seconds("all_reduce", Group(8, 4), 8e9) == pytest.approx(14e9 / 100e9 + 14 * 10e-6)


@given(
    st.sampled_from(OPERATIONS),
    st.sampled_from([2, 4, 8, 16, 32]),
    st.sampled_from([1, 2, 4]),
    st.floats(1, 1e12),
    st.floats(0, 1e12),
)
def test_more_bytes_are_never_cheaper(operation: str, size: int, stride: int, less: float, more: float) -> None:
    comm, group = (
        nodes_of_8(16, inside={"operations": (ramped("all_reduce"), ramped("send_recv"))}),
        Group(size, stride),
    )
    cheaper = comm.collective_seconds(operation, group, less)
    assert 0 < cheaper <= comm.collective_seconds(operation, group, less + more)
    sent = zip(comm.hop_seconds(group, less), comm.hop_seconds(group, less + more), strict=True)
    assert all(one <= other for one, other in sent)


def ramped(operation: str) -> LinkOperation:
    return LinkOperation(
        operation=operation, bandwidth_bytes_per_second=300e9, latency_seconds=1e-6, ramp_bytes=float(1 << 24)
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_larger_group_is_never_cheaper(operation: str) -> None:
    comm = nodes_of_8(16)
    seconds = [comm.collective_seconds(operation, Group(size, 1), 1e8) for size in (1, 2, 4, 8, 16, 64, 128)]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0.0 < seconds[1]


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_but_for_what_comes_once() -> None:
    comm = nodes_of_8(4)
    for group, once in ((Group(4, 1), 40e-6), (Group(16, 2), 0.0)):
        both = sum(comm.collective_seconds(op, group, 1e9) for op in ("reduce_scatter", "all_gather"))
        assert comm.collective_seconds("all_reduce", group, 1e9) == pytest.approx(both - once, rel=1e-12)


def test_nothing_is_sent_for_nothing() -> None:
    assert nodes_of_8(1).collective_seconds("all_reduce", Group(8, 1), 0.0) == 0.0
    assert nodes_of_8(1).collective_seconds("all_reduce", Group(1, 8), 1e9) == 0.0


def test_a_send_to_a_neighbour_goes_over_the_tier_that_joins_both() -> None:
    comm = nodes_of_8(2)
    assert comm.hop_seconds(Group(2, 4), 200e6) == pytest.approx((40e-6 + 3e-6 + 1e-3,) * 2, rel=1e-12)
    assert comm.hop_seconds(Group(2, 8), 20e6) == pytest.approx((10e-6 + 1e-3,) * 2, rel=1e-12)
    fast = LinkOperation(operation="send_recv", ranks=2, bandwidth_bytes_per_second=50e9, latency_seconds=0.0)
    comm = nodes_of_8(2, across={"operations": (fast,)})
    # Of 16 stages one boundary crosses nodes, and the way back; a send moves all its bytes, not (n-1)/n of them.
    hops = comm.hop_seconds(Group(16, 1), 50e6)
    assert (hops[7], hops[15]) == pytest.approx((1e-3, 1e-3), rel=1e-12)
    assert {*hops[:7], *hops[8:15]} == {comm.hop_seconds(Group(2, 1), 50e6)[0]}


def test_the_first_and_the_last_rank_sum_over_the_tier_that_joins_them() -> None:
    """A pair's ring: two steps, and 2 * 1/2 of the bytes."""
    comm = nodes_of_8(2)
    assert comm.pair_sum_seconds(Group(8, 1), 200e6) == pytest.approx(40e-6 + 6e-6 + 1e-3, rel=1e-12)
    assert comm.pair_sum_seconds(Group(4, 2), 200e6) == pytest.approx(40e-6 + 6e-6 + 1e-3, rel=1e-12)
    assert comm.pair_sum_seconds(Group(16, 1), 20e6) == pytest.approx(20e-6 + 1e-3, rel=1e-12)
    # Ranks 0 and 8 of 9 lie in two nodes of 8, ranks 0 and 2 of 3 in one of 3.
    assert comm.pair_sum_seconds(Group(9, 1), 20e6) == pytest.approx(20e-6 + 1e-3, rel=1e-12)
    node = LinkTier(tier="node", span=3, bandwidth_bytes_per_second=1e9, latency_seconds=0.0)
    network = replace(node, tier="network", span=6, bandwidth_bytes_per_second=1e8)
    comm = CommModel(replace(small_cluster(3), nodes=2, links=(node, network)), small_hardware())
    assert comm.pair_sum_seconds(Group(3, 1), 1e9) == pytest.approx(1.0, rel=1e-12)


# ---- what was measured -----------------------------------------------------------------------------------


def point(operation: str, ranks: int, stride: int, seconds: float, **changes: Any) -> CollectivePoint:
    return CollectivePoint(
        **({"operation": operation, "ranks": ranks, "stride": stride, "bytes": 1000, "seconds": seconds} | changes)
    )


def measured(cluster: ClusterSpec, *points: CollectivePoint, devices_per_node: int = 0) -> CommModel:
    return CommModel(cluster, small_hardware(collectives=points, devices_per_node=devices_per_node))


def test_a_point_outranks_the_links_for_just_its_group() -> None:
    points = (point("all_reduce", 4, 1, 0.5), point("all_reduce", 2, 2, 0.25))
    comm, plain = measured(small_cluster(4), *points), measured(small_cluster(4))
    assert comm.collective_seconds("all_reduce", Group(4, 1), 1000) == 0.5
    assert comm.collective_seconds("all_reduce", Group(4, 1), 3000) == 1.5
    assert comm.collective_seconds("all_reduce", Group(2, 2), 1000) == 0.25
    for operation, group in (
        ("all_gather", Group(4, 1)),  # another collective
        ("all_reduce", Group(2, 1)),  # another stride
        ("all_reduce", Group(3, 1)),  # another size
    ):
        assert comm.collective_seconds(operation, group, 1e6) == plain.collective_seconds(operation, group, 1e6) < 0.1


def test_a_step_s_two_numbers_take_what_their_own_sum_does_and_else_what_a_small_all_reduce_does() -> None:
    own = point("scalar_all_reduce", 4, 1, 0.1, bytes=16)
    small, large = point("all_reduce", 4, 1, 0.5), point("all_reduce", 4, 1, 1.0, bytes=10**6)
    assert measured(small_cluster(4), own, small, large).scalars_seconds(Group(4, 1)) == 0.1
    assert measured(small_cluster(4), small, large).scalars_seconds(Group(4, 1)) == pytest.approx(0.5, rel=1e-3)
    comm = measured(small_cluster(4), own)
    assert comm.scalars_seconds(Group(2, 1)) == comm.collective_seconds("all_reduce", Group(2, 1), 16) < 0.1
    assert comm.scalars_seconds(Group(1, 1)) == 0


def test_an_uneven_all_to_all_says_nothing_of_an_even_one() -> None:
    comm, plain = (
        measured(small_cluster(4), *points) for points in ((point("all_to_all", 4, 1, 0.5, uneven=True),), ())
    )
    one, other = (model.collective_seconds("all_to_all", Group(4, 1), 1000) for model in (comm, plain))
    assert one == other < 0.1


@pytest.mark.parametrize(("devices_per_node", "holds"), [(0, True), (4, True), (2, False), (8, True)])
def test_points_hold_for_groups_inside_a_node_here_and_where_they_were_measured(
    devices_per_node: int, holds: bool
) -> None:
    points = (
        point("all_reduce", 4, 1, 0.5),
        point("send_recv", 2, 1, 0.5),
        point("all_reduce", 2, 3, 0.5),
        point("fsdp_all_gather", 4, 1, 0.5),
        point("fsdp_all_gather", 4, 1, 1.0, bytes=2000),
    )
    comm = measured(small_cluster(8, 2), *points, devices_per_node=devices_per_node)
    group = Group(4, 1)
    assert (comm.collective_seconds("all_reduce", group, 1000) == 0.5) == holds
    assert comm.hop_seconds(group, 1000) == (0.5,) * 4  # neighbours lie in one node of any of these widths
    assert (comm.pair_sum_seconds(group, 1000) == 0.5) == holds
    assert comm.fsdp_seconds("fsdp_all_gather", group, 1000) == (0.5 if holds else None)


def test_a_measured_send_holds_for_the_hops_within_its_tier() -> None:
    """3 nodes of 4; inside 1 GB/s and 10 us, across 0.1 GB/s and 100 us."""
    points = (point("send_recv", 2, 1, 0.25), point("send_recv", 2, 2, 0.5), point("send_recv", 2, 4, 0.75))
    comm = measured(small_cluster(12, 3), *points)
    assert comm.hop_seconds(Group(4, 1), 1000) == (0.25,) * 4  # all in one node
    assert comm.hop_seconds(Group(2, 2), 2000) == (1.0, 1.0)
    assert comm.hop_seconds(Group(3, 4), 1000) == (0.75,) * 3  # every pair in two nodes
    # Stages 3 and 4 lie in different nodes, which the point of neighbours in a node knows nothing of.
    network = 1e-4 + 1000 / 1e8
    over_12 = (*(0.25,) * 3, network) * 3
    assert comm.hop_seconds(Group(12, 1), 1000) == pytest.approx(over_12, rel=1e-12)
    assert comm.hop_seconds(Group(6, 2), 1000) == pytest.approx((0.5, network) * 3, rel=1e-12)
    # Of three devices a stage the second lies in two nodes, and with it both its hops.
    assert comm.hop_seconds(Group(4, 3), 1000) == pytest.approx((network,) * 4, rel=1e-12)
    assert measured(small_cluster(12, 3)).hop_seconds(Group(3, 4), 1000) == pytest.approx((network,) * 3, rel=1e-12)


def test_points_of_groups_across_nodes_hold_only_for_nodes_as_wide() -> None:
    across = (point("all_reduce", 2, 4, 0.5), point("all_reduce", 8, 1, 0.25))
    for devices_per_node, expected in ((4, [0.5, 0.25]), (8, None), (2, None)):
        comm = measured(small_cluster(8, 2), *across, devices_per_node=devices_per_node)
        found = [comm.collective_seconds("all_reduce", group, 1000) for group in (Group(2, 4), Group(8, 1))]
        assert (found == expected) if expected else max(found) < 0.1


def test_a_measured_pair_sums_the_ends() -> None:
    comm = measured(small_cluster(8), point("all_reduce", 2, 6, 0.5), point("all_reduce", 2, 1, 9.0))
    assert comm.pair_sum_seconds(Group(4, 2), 1000) == 0.5  # ranks 0 and 6
    assert comm.pair_sum_seconds(Group(8, 1), 1000) == pytest.approx(2e-5 + 1000 / 1e9)


def test_a_message_alone_on_a_shared_wire_has_all_of_it() -> None:
    own = small_cluster(8, 2, across=(1e8, 1e-4))
    wire = replace(own, links=(own.links[0], replace(own.links[1], shared=True)))
    for group, share in ((Group(8, 1), 4), (Group(4, 2), 2), (Group(2, 4), 1)):
        assert max(measured(own).hop_seconds(group, 1e8)) == pytest.approx(1 + 1e-4)
        assert max(measured(wire).hop_seconds(group, 1e8)) == pytest.approx(1 / share + 1e-4)


def test_what_fsdp_does_is_measured() -> None:
    points = [point("fsdp_reduce_scatter", 2, 2, 0.5), point("fsdp_reduce_scatter", 2, 2, 1.5, bytes=3000)]
    comm = measured(small_cluster(4), *points, point("reduce_scatter", 4, 1, 0.25))
    assert comm.fsdp_seconds("fsdp_reduce_scatter", Group(2, 2), 4000) == 2.0
    assert comm.fsdp_seconds("fsdp_reduce_scatter", Group(4, 1), 4000) is None
    assert comm.fsdp_seconds("fsdp_all_gather", Group(2, 2), 4000) is None


def test_where_fsdp_was_measured_at_one_size_its_excess_comes_on_top_of_the_collective() -> None:
    ring = [point("reduce_scatter", 2, 2, 0.25), point("reduce_scatter", 2, 2, 2.0, bytes=9000)]
    comm = measured(small_cluster(4), point("fsdp_reduce_scatter", 2, 2, 0.5), *ring)
    for size, expected in ((1000, 0.5), (9000, 2.25)):
        assert comm.fsdp_seconds("fsdp_reduce_scatter", Group(2, 2), size) == pytest.approx(expected)
    comm = measured(small_cluster(4), point("fsdp_reduce_scatter", 2, 2, 0.125), *ring)  # noise: not below the ring
    assert comm.fsdp_seconds("fsdp_reduce_scatter", Group(2, 2), 9000) == pytest.approx(2.0)


# ---- found wrong once ----------------------------------------------------------------------------------------


def three_tiers() -> ClusterSpec:
    tiers = (("pair", 2, 100e9), ("node", 8, 50e9), ("network", 32, 5e9))
    links = tuple(
        LinkTier(tier=tier, span=span, bandwidth_bytes_per_second=bandwidth, latency_seconds=0.0)
        for tier, span, bandwidth in tiers
    )
    return replace(small_cluster(8), nodes=4, devices_per_node=8, links=links)


def test_with_three_tiers_a_ring_across_nodes_has_the_shares_of_the_whole_node() -> None:
    comm = CommModel(three_tiers(), small_hardware())
    # 8 network shares of 5 GB/s are 40 GB/s, less than what the tiers below carry.
    assert comm.collective_seconds("all_gather", Group(32, 1), 32e9) == pytest.approx(31e9 / 40e9)


def test_of_a_pipeline_over_two_nodes_one_hop_is_the_network() -> None:
    """pp=16 on 2 nodes of 8, stride 1: stages 7 and 8 lie in different nodes."""
    from planner.layout import Layout
    from planner.step_cost import CostModel
    from tests.oracles.small_world import small_question
    from tests.plans import tiny_llama

    cluster = small_cluster(16, 2, inside=(1e9, 0.0), across=(1e6, 0.0))
    question = small_question(tiny_llama(layers=16), cluster=cluster, global_batch=16)
    costs = CostModel(question.model, cluster, question.hardware, question.job).price(Layout(pp=16))
    inside, across = 16 * 32 * 4 / 1e9, 16 * 32 * 4 / 1e6
    assert costs.hop_seconds == pytest.approx((*(inside,) * 7, across, *(inside,) * 7))


def test_a_ring_s_step_is_an_exchange_and_a_message_where_none_was_measured() -> None:
    one_way, both = point("send_recv", 2, 1, 0.25), point("exchange", 2, 1, 0.5)
    assert measured(small_cluster(4), one_way).neighbour_seconds(Group(2, 1), 1000) == 0.25
    assert measured(small_cluster(4), one_way, both).neighbour_seconds(Group(2, 1), 1000) == 0.5
    four = measured(small_cluster(4), one_way, point("exchange", 4, 1, 0.75)).neighbour_seconds(Group(4, 1), 1000)
    assert four == 0.75


def test_a_ring_that_was_not_measured_goes_by_what_the_links_know() -> None:
    known = [
        LinkOperation(operation=operation, bandwidth_bytes_per_second=rate, latency_seconds=0.0)
        for operation, rate in (("send_recv", 1e9), ("exchange", 5e8))
    ]
    for operations, rate in ((known[:1], 1e9), (known, 5e8)):
        comm = nodes_of_8(1, inside={"operations": tuple(operations)})
        assert comm.neighbour_seconds(Group(4, 1), 1e6) == pytest.approx(1e6 / rate, rel=1e-12)
