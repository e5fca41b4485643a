"""Seconds of communication: rings over the tier they span, sends, and what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.comm_cost import CommModel, Group
from profiles.catalogue import resolve_cluster, resolve_hardware_path
from profiles.cluster import ClusterSpec, LinkTier
from profiles.hardware import CollectivePoint, load_hardware
from tests.oracles.small_world import small_cluster, small_hardware

A100 = load_hardware(resolve_hardware_path("a100-sxm-80gb"))
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
GIB = 2.0**30


def a100(nodes: int = 1) -> CommModel:
    return CommModel(resolve_cluster(f"dgx-a100:{nodes}"), A100)


def test_an_all_reduce_inside_an_a100_node_reproduces_the_bus_bandwidth_of_its_source() -> None:
    """nccl-tests: bus bandwidth = 2(n-1)/n · bytes / seconds; 229 GB/s over 8 GPUs for 1 GiB."""
    for operation, factor in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
        seconds = a100().collective_seconds(operation, Group(8, 1), GIB)
        assert factor * 7 / 8 * GIB / seconds == pytest.approx(229e9, rel=0.05)


def test_small_messages_are_latency() -> None:
    # 2 (8 - 1) steps of 5.6 us; the source's 79 us.
    assert a100().collective_seconds("all_reduce", Group(8, 1), 4.0) == pytest.approx(79e-6, rel=0.01)
    assert a100().collective_seconds("all_gather", Group(8, 1), 4.0) == pytest.approx(79e-6 / 2, rel=0.01)


def test_across_nodes_a_ring_has_the_network_shares_of_its_ranks_in_a_node() -> None:
    comm, size = a100(4), 100 * GIB  # latency does not matter
    ring = 31 / 32 * size

    def bandwidth(group: Group) -> float:
        return (group.size - 1) / group.size * size / comm.collective_seconds("all_gather", group, size)

    assert ring / comm.collective_seconds("all_gather", Group(32, 1), size) == pytest.approx(8 * 22.5e9, rel=0.01)
    assert bandwidth(Group(16, 2)) == pytest.approx(4 * 22.5e9, rel=0.01)
    assert bandwidth(Group(8, 4)) == pytest.approx(2 * 22.5e9, rel=0.01)
    assert bandwidth(Group(4, 8)) == pytest.approx(22.5e9, rel=0.01)
    assert bandwidth(Group(2, 16)) == pytest.approx(22.5e9, rel=0.01)
    # Inside a node a group has the node's links whatever its stride.
    assert bandwidth(Group(4, 2)) == pytest.approx(229e9, rel=0.01)


def test_a_network_faster_than_the_node_does_not_make_a_ring_faster_than_its_node() -> None:
    comm = CommModel(small_cluster(16, 2, inside=(1e9, 0.0), across=(9e8, 0.0)), small_hardware())
    assert comm.collective_seconds("all_gather", Group(16, 1), 16e9) == pytest.approx(15.0)


@given(
    st.sampled_from(OPERATIONS),
    st.sampled_from([2, 4, 8, 16, 32]),
    st.sampled_from([1, 2, 4]),
    st.floats(1, 1e12),
    st.floats(0, 1e12),
)
def test_more_bytes_are_never_cheaper(operation: str, size: int, stride: int, less: float, more: float) -> None:
    comm, group = a100(16), Group(size, stride)
    cheaper = comm.collective_seconds(operation, group, less)
    assert 0 < cheaper <= comm.collective_seconds(operation, group, less + more)
    assert comm.send_seconds(group, less) <= comm.send_seconds(group, less + more)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_larger_group_is_never_cheaper(operation: str) -> None:
    seconds = [a100(16).collective_seconds(operation, Group(size, 1), 1e8) for size in (1, 2, 4, 8, 16, 64, 128)]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0.0 < seconds[1]


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    for group in (Group(4, 1), Group(16, 2)):
        both = sum(a100(4).collective_seconds(op, group, 1e9) for op in ("reduce_scatter", "all_gather"))
        assert a100(4).collective_seconds("all_reduce", group, 1e9) == pytest.approx(both)


def test_nothing_is_sent_for_nothing() -> None:
    assert a100().collective_seconds("all_reduce", Group(8, 1), 0.0) == 0.0
    assert a100().collective_seconds("all_reduce", Group(1, 8), 1e9) == 0.0


def test_a_send_to_a_neighbour_goes_over_the_tier_that_joins_both() -> None:
    comm = a100(2)
    assert comm.send_seconds(Group(2, 4), 229e6) == pytest.approx(5.6e-6 + 1e-3)
    assert comm.send_seconds(Group(2, 8), 22.5e6) == pytest.approx(14e-6 + 1e-3)


def test_what_was_measured_outranks_the_links() -> None:
    points = (
        CollectivePoint(operation="all_reduce", ranks=4, bytes=1000, seconds=0.5),
        CollectivePoint(operation="send_recv", ranks=2, bytes=1000, seconds=0.25),
    )
    comm = CommModel(small_cluster(4), small_hardware(collectives=points))
    assert comm.collective_seconds("all_reduce", Group(4, 1), 1000) == 0.5
    assert comm.send_seconds(Group(2, 2), 2000) == 0.5
    plain = CommModel(small_cluster(4), small_hardware())
    assert comm.collective_seconds("all_gather", Group(4, 1), 1e6) == plain.collective_seconds(
        "all_gather", Group(4, 1), 1e6
    )


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


def test_the_slowest_hop_of_a_pipeline_over_two_nodes_is_the_network() -> None:
    """pp=16 on 2 nodes of 8, stride 1: stages 7 and 8 lie in different nodes."""
    from planner.layout import Layout
    from planner.step_cost import CostModel
    from tests.oracles.small_world import small_question
    from tests.plans import tiny_llama

    cluster = small_cluster(16, 2, inside=(1e9, 0.0), across=(1e6, 0.0))
    question = small_question(tiny_llama(layers=16), cluster=cluster, global_batch=16)
    costs = CostModel(question.model, cluster, question.hardware, question.job).price(Layout(pp=16))
    assert costs.send_seconds == pytest.approx(16 * 32 * 4 / 1e6)
