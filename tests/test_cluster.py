"""ClusterSpec, its graph of links, and the clusters of the catalogue."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import pytest

from profiles.alpha_beta import AlphaBeta
from profiles.catalogue import (
    list_catalogue,
    local_cluster_path,
    local_hardware_path,
    resolve_cluster,
    resolve_hardware_path,
)
from profiles.cluster import SCHEMA, ClusterSpec, LinkOperation, LinkTier
from profiles.input_error import InputError
from profiles.store import Reader, dump_yaml

OPERATIONS = "one of all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send_recv, exchange"


def link(tier: str, span: int, bandwidth: float, latency: float = 1e-6) -> LinkTier:
    return LinkTier(tier=tier, span=span, bandwidth_bytes_per_second=bandwidth, latency_seconds=latency)


def three_tiers(nodes: int = 4) -> ClusterSpec:
    """Pairs of devices on a bridge, 4 devices a node, a network."""
    return ClusterSpec(
        name="three",
        hardware="h",
        nodes=nodes,
        devices_per_node=4,
        memory_bytes=1e9,
        links=(link("pair", 2, 100.0), link("node", 4, 20.0), link("network", 16, 3.0)),
    )


def narrowest_tier(graph: networkx.Graph, one: int, other: int) -> str:
    path = networkx.shortest_path(graph, one, other)
    edges = [graph.edges[edge] for edge in itertools.pairwise(path)]
    return min(edges, key=lambda edge: edge["bytes_per_second"])["tier"]


# ---- the graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cluster",
    [three_tiers(), three_tiers(nodes=2), resolve_cluster("dgx-a100:3"), resolve_cluster("dgx-h100:2")],
    ids=["three tiers, 4 nodes", "three tiers, 2 nodes", "dgx-a100:3", "dgx-h100:2"],
)
def test_the_narrowest_edge_between_two_devices_is_the_tier_link_within_says(cluster: ClusterSpec) -> None:
    graph = cluster.graph()
    for one in range(cluster.devices):
        for other in range(one + 1, cluster.devices):
            # The smallest group of neighbours, starting where a group of that tier starts, that holds both.
            spans = [tier.span for tier in cluster.links if one // tier.span == other // tier.span]
            assert narrowest_tier(graph, one, other) == cluster.link_within(spans[0]).tier, (one, other)


def test_the_graph_is_a_tree_over_the_devices() -> None:
    graph = three_tiers().graph()
    assert networkx.is_tree(graph)
    # 16 devices, 8 bridges, 4 nodes, 1 network
    assert graph.number_of_nodes() == 16 + 8 + 4 + 1
    assert sorted(node for node in graph if isinstance(node, int)) == list(range(16))


def test_an_edge_carries_the_bandwidth_of_one_device() -> None:
    edges = three_tiers().graph().edges
    assert edges[0, ("pair", 0)] == {"tier": "pair", "bytes_per_second": 100.0}
    assert edges[("pair", 7), ("node", 3)] == {"tier": "node", "bytes_per_second": 20.0}
    assert edges[("node", 3), ("network", 0)] == {"tier": "network", "bytes_per_second": 3.0}


@pytest.mark.parametrize(
    ("span", "tier"), [(1, "pair"), (2, "pair"), (3, "node"), (4, "node"), (5, "network"), (16, "network")]
)
def test_link_within_is_the_narrowest_tier_that_joins_the_span(span: int, tier: str) -> None:
    assert three_tiers().link_within(span).tier == tier


def test_a_collective_takes_its_own_figures_before_the_tier_s() -> None:
    every = LinkOperation(operation="all_reduce", bandwidth_bytes_per_second=7.0, latency_seconds=2.0)
    eight = replace(every, ranks=8, bandwidth_bytes_per_second=9.0, fixed_latency_seconds=3.0, ramp_bytes=4.0)
    tier = replace(link("node", 16, 5.0, 1.0), fixed_latency_seconds=6.0, operations=(every, eight))
    assert tier.operation("all_reduce", 8) is eight
    assert tier.operation("all_reduce", 4) is every
    assert tier.operation("all_reduce", 0) is every
    assert eight.figures == AlphaBeta(
        fixed_seconds=3.0, step_seconds=2.0, bandwidth_bytes_per_second=9.0, ramp_bytes=4.0
    )
    # What has no figures of its own has the tier's, and those have no ramp.
    assert tier.operation("all_gather", 8).figures == AlphaBeta(
        fixed_seconds=6.0, step_seconds=1.0, bandwidth_bytes_per_second=5.0
    )
    assert replace(tier, operations=(eight,)).operation("all_reduce", 4).bandwidth_bytes_per_second == 5.0


# ---- a part of a cluster ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "nodes", "per_node", "tiers"),
    [
        (1, 1, 1, ["pair"]),
        (2, 1, 2, ["pair"]),
        (3, 1, 3, ["node"]),  # pairs do not divide three
        (4, 1, 4, ["pair", "node"]),
        (8, 2, 4, ["pair", "node", "network"]),
        (16, 4, 4, ["pair", "node", "network"]),
    ],
)
def test_a_cut_keeps_the_links_that_still_join_something(
    devices: int, nodes: int, per_node: int, tiers: list[str]
) -> None:
    cut = three_tiers().with_devices(devices)
    assert (cut.devices, cut.nodes, cut.devices_per_node) == (devices, nodes, per_node)
    assert [tier.tier for tier in cut.links] == tiers
    assert replace(cut, nodes=4, devices_per_node=4, links=three_tiers().links) == three_tiers()


@pytest.mark.parametrize("devices", [-4, 0, 5, 6, 7, 10, 15, 17, 20])
def test_a_cluster_cannot_be_cut_to_more_than_it_has_or_to_a_part_of_several_nodes(devices: int) -> None:
    with pytest.raises(InputError) as caught:
        three_tiers().with_devices(devices)
    assert caught.value.lines() == [
        ("error", f"three cannot be cut to {devices} devices"),
        ("where", "--devices"),
        ("expected", "1 to 4, or a multiple of 4 up to 16"),
        ("got", str(devices)),
    ]


@pytest.mark.parametrize(
    ("cluster", "devices"),
    [
        *((three_tiers(), devices) for devices in (1, 2, 4, 8, 12, 16)),
        *((resolve_cluster("dgx-a100:2"), devices) for devices in (1, 2, 4, 8, 16)),
        *(
            (cluster, devices)
            for cluster, devices in (
                (three_tiers(), 3),
                (resolve_cluster("dgx-a100"), 3),
                (resolve_cluster("dgx-a100"), 5),
                (resolve_cluster("dgx-a100"), 6),
                (resolve_cluster("dgx-a100"), 7),
            )
        ),
    ],
)
def test_a_cut_cluster_is_a_cluster_that_can_be_read_back(cluster: ClusterSpec, devices: int) -> None:
    cut = cluster.with_devices(devices)
    assert ClusterSpec.from_dict(Reader(cut.to_dict(), source="c.yaml")) == cut


# ---- files -----------------------------------------------------------------------------------------------


def read(**changes: Any) -> ClusterSpec:
    return ClusterSpec.from_dict(Reader(three_tiers().to_dict() | changes, source="c.yaml"))


@pytest.mark.parametrize(
    ("changes", "key", "expected", "got"),
    [
        ({"links": []}, "links", "at least one tier of links", "[]"),
        ({"nodes": 5}, "links[2].span", "a widest tier that joins all 20 devices", "16"),
        ({"nodes": 0}, "nodes", "a whole number >= 1", "0"),
        ({"devices_per_node": 1.5}, "devices_per_node", "a whole number >= 1", "1.5"),
        ({"memory_bytes": -1}, "memory_bytes", "a finite number > 0", "-1"),
    ],
)
def test_what_a_cluster_cannot_be(changes: dict[str, Any], key: str, expected: str, got: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**changes)
    assert (caught.value.where, caught.value.expected, caught.value.got) == (f"c.yaml: {key}", expected, got)


@pytest.mark.parametrize(
    ("index", "changes", "key", "expected", "got"),
    [
        (1, {"span": 3}, "links[1].span", "a divisor or a multiple of 4 devices a node", "3"),
        (2, {"span": 18}, "links[2].span", "a divisor or a multiple of 4 devices a node", "18"),
        (1, {"span": 1}, "links[1].span", "a multiple of the tier below, 2", "1"),
        (1, {"span": 2}, "links[1].span", "a multiple of the tier below, 2", "2"),
        (2, {"span": "all"}, "links[2].span", "a whole number >= 1", "'all'"),
        (
            1,
            {"bandwidth_bytes_per_second": -3},
            "links[1].bandwidth_bytes_per_second",
            "a finite number > 0",
            "-3",
        ),
        (0, {"latency_seconds": float("inf")}, "links[0].latency_seconds", "a finite number >= 0", "inf"),
        (2, {"fixed_latency_seconds": -1}, "links[2].fixed_latency_seconds", "a finite number >= 0", "-1"),
        (2, {"operations": {}}, "links[2].operations", "a list of mappings", "{}"),
    ],
)
def test_what_a_link_cannot_be(index: int, changes: dict[str, Any], key: str, expected: str, got: str) -> None:
    links = three_tiers().to_dict()["links"]
    links[index] |= changes
    with pytest.raises(InputError) as caught:
        read(links=links)
    assert (caught.value.where, caught.value.expected, caught.value.got) == (f"c.yaml: {key}", expected, got)


@pytest.mark.parametrize(
    ("changes", "key", "expected", "got"),
    [
        ({"operation": "gossip"}, "operation", OPERATIONS, "'gossip'"),
        ({"ranks": -1}, "ranks", "a whole number >= 0", "-1"),
        ({"bandwidth_bytes_per_second": 0}, "bandwidth_bytes_per_second", "a finite number > 0", "0"),
        ({"latency_seconds": -1e-6}, "latency_seconds", "a finite number >= 0", "-1e-06"),
        ({"fixed_latency_seconds": "much"}, "fixed_latency_seconds", "a finite number >= 0", "'much'"),
        ({"ramp_bytes": -1}, "ramp_bytes", "a finite number >= 0", "-1"),
        ({"source": 3}, "source", "text", "3"),
    ],
)
def test_what_a_collective_of_a_link_cannot_be(changes: dict[str, Any], key: str, expected: str, got: str) -> None:
    links = three_tiers().to_dict()["links"]
    links[1]["operations"] = [
        {"operation": "all_gather", "bandwidth_bytes_per_second": 1e9, "latency_seconds": 0.0} | changes
    ]
    with pytest.raises(InputError) as caught:
        read(links=links)
    place = f"c.yaml: links[1].operations[0].{key}"
    assert (caught.value.where, caught.value.expected, caught.value.got) == (place, expected, got)


@pytest.mark.parametrize("key", ["operation", "bandwidth_bytes_per_second", "latency_seconds"])
def test_a_collective_of_a_link_needs(key: str) -> None:
    links = three_tiers().to_dict()["links"]
    whole = {"operation": "all_gather", "bandwidth_bytes_per_second": 1e9, "latency_seconds": 1e-6}
    links[2]["operations"] = [whole]
    assert read(links=links).links[2].operations == (LinkOperation(**whole),)
    del whole[key]
    with pytest.raises(InputError) as caught:
        read(links=links)
    assert caught.value.what == f"the key links[2].operations[0].{key} is missing"


# ---- the catalogue ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hardware", "devices_per_node", "tiers"),
    [
        ("aws-p5", "h100-sxm-80gb", 8, ["node", "network"]),
        ("cloud-a100-400g", "a100-sxm-80gb", 8, ["node", "network"]),
        ("dgx-2", "v100-sxm-32gb", 16, ["node", "network"]),
        ("dgx-a100", "a100-sxm-80gb", 8, ["node", "network"]),
        ("dgx-b200", "b200-sxm", 8, ["node", "network"]),
        ("dgx-h100", "h100-sxm-80gb", 8, ["node", "network"]),
        ("dgx-h200", "h200-sxm", 8, ["node", "network"]),
        ("ethernet-25g", "l40s", 8, ["socket", "node", "network"]),
        ("gb200-nvl72", "gb200", 72, ["node", "network"]),
        ("pcie-a100", "a100-pcie-80gb", 8, ["socket", "node"]),
    ],
)
def test_catalogue_clusters(name: str, hardware: str, devices_per_node: int, tiers: list[str]) -> None:
    """Their figures are in test_catalogue_hardware.py."""
    cluster = resolve_cluster(name)
    assert (cluster.name, cluster.hardware) == (name, hardware)
    assert (cluster.nodes, cluster.devices_per_node) == (1, devices_per_node)
    assert [tier.tier for tier in cluster.links] == tiers


def test_the_catalogue_is_these_clusters() -> None:
    clusters = "aws-p5 cloud-a100-400g dgx-2 dgx-a100 dgx-b200 dgx-h100 dgx-h200 ethernet-25g gb200-nvl72 pcie-a100"
    assert list_catalogue("clusters") == clusters.split()


def test_a_name_with_a_size_has_that_many_nodes() -> None:
    assert resolve_cluster("dgx-h100:64") == replace(resolve_cluster("dgx-h100"), nodes=64)
    assert resolve_cluster("dgx-h100:16384").devices == 131072


@pytest.mark.parametrize(
    "nodes",
    [
        "0",
        "x",
        "-1",
        "",
        "1.5",
        "1e3",
        "16385",
        pytest.param("9" * 5000, id="5000 digits"),
        "2:2",
        " 2",
        "\u00b2",
        "\u0662",
    ],
)
def test_a_size_that_is_none(nodes: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_cluster(f"dgx-a100:{nodes}")
    assert caught.value.lines() == [
        ("error", f"dgx-a100:{nodes} does not say how many nodes"),
        ("where", "--cluster"),
        ("expected", "dgx-a100:NODES with NODES a whole number from 1 to 16384"),
        ("got", repr(nodes)),
        ("try", "dgx-a100:16384 is the largest, 131072 devices"),
    ]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("dgx-h10:8", "is dgx-h100 meant?"),
        ("DGX-A100", "is dgx-a100 meant?"),
        ("local:2", "cli.py profile --list shows the catalogue"),
    ],
)
def test_an_unknown_cluster_gives_the_list_and_the_near_match(text: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_cluster(text)
    assert caught.value.what == f"{text!r} is neither in the catalogue nor a file that can be read"
    names = ", ".join(list_catalogue("clusters"))
    assert (caught.value.where, caught.value.hint) == ("--cluster", hint)
    assert caught.value.expected == f"one of {names}; or local (without a size), or a .yaml file"


def test_local_is_what_profile_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_cluster_path() == tmp_path / "meshwright" / "local-cluster.yaml"
    assert local_hardware_path() == tmp_path / "meshwright" / "local-hardware.yaml"
    for resolve, path in ((resolve_cluster, local_cluster_path()), (resolve_hardware_path, local_hardware_path())):
        with pytest.raises(InputError) as caught:
            resolve("local")
        assert caught.value.lines() == [
            ("error", "this machine has not been measured yet"),
            ("where", str(path)),
            ("expected", "the file that `cli.py profile` writes"),
            ("got", "no such file"),
            ("try", "run `cli.py profile` first, or name a cluster: " + ", ".join(list_catalogue("clusters"))),
        ]
    local_cluster_path().parent.mkdir()
    local_cluster_path().write_text(dump_yaml({"schema": SCHEMA, **three_tiers().to_dict()}), encoding="utf-8")
    local_hardware_path().touch()
    assert resolve_cluster("local") == three_tiers()
    assert resolve_hardware_path("local") == local_hardware_path()


def test_an_empty_cache_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_cluster_path() == Path("/home/someone/.cache/meshwright/local-cluster.yaml")


def test_a_hardware_profile_may_be_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    with pytest.raises(InputError, match="is neither in the catalogue nor a file"):
        resolve_hardware_path(str(file))
    file.touch()
    assert resolve_hardware_path(str(file)) == file


def test_an_unknown_hardware_profile_gives_the_near_match() -> None:
    with pytest.raises(InputError) as caught:
        resolve_hardware_path("a100-sxm")
    assert caught.value.hint == "is a100-sxm-80gb meant?"
