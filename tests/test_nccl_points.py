"""Runs of nccl-tests as points of a profile: which groups they stand for, what they replace, what is refused."""

from __future__ import annotations

import datetime
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.hardware import HardwareProfile, load_hardware, save_hardware
from profiles.input_error import InputError
from profiles.nccl_points import with_nccl_tests
from profiles.nccl_reports import NcclTestRun
from profiles.nccl_tests import read_nccl_tests
from profiles.points import CollectivePoint
from tests.oracles.small_world import small_hardware

SAMPLES = Path(__file__).parent / "data" / "nccl_tests"


def a_run(**changes: Any) -> NcclTestRun:
    """An all-reduce over one node of 8."""
    values: dict[str, Any] = {
        "operation": "all_reduce",
        "ranks": 8,
        "ranks_per_node": 8,
        "groups": 1,
        "device": "NVIDIA H100 80GB HBM3",
        "version": "nccl-tests version 2.17.6",
        "points": ((1024, 2e-5), (1 << 20, 4e-5)),
        "source": Path("no-such-folder/all_reduce.txt"),
    }
    return NcclTestRun(**(values | changes))


def h100(**changes: Any) -> HardwareProfile:
    return small_hardware(device="NVIDIA H100-SXM5-80GB", **changes)


def stride(devices_per_node: int, **changes: Any) -> int:
    merged = with_nccl_tests(h100(devices_per_node=devices_per_node), [a_run(**changes)])
    (found,) = {p.stride for p in merged.collectives}
    return found


def refused(hardware: HardwareProfile, *runs: NcclTestRun) -> InputError:
    with pytest.raises(InputError) as caught:
        with_nccl_tests(hardware, runs)
    return caught.value


# ---- points ----------------------------------------------------------------------------------------------


def test_the_points_price_just_that_group() -> None:
    merged = with_nccl_tests(h100(), [a_run()])
    assert merged.collectives == (
        CollectivePoint(operation="all_reduce", ranks=8, bytes=1024, seconds=2e-5),
        CollectivePoint(operation="all_reduce", ranks=8, bytes=1 << 20, seconds=4e-5),
    )
    assert merged.collective_seconds("all_reduce", 8, 1 << 20) == pytest.approx(4e-5)
    assert merged.collective_seconds("all_reduce", 4, 1 << 20) is None


def test_only_points_of_the_same_operation_ranks_and_stride_make_way() -> None:
    def point(**changes: Any) -> CollectivePoint:
        return replace(CollectivePoint(operation="all_reduce", ranks=8, bytes=4096, seconds=1.0, spread=0.1), **changes)

    stays = (point(ranks=4), point(stride=2), point(operation="broadcast"), point(operation="all_to_all", uneven=True))
    before = h100(collectives=(point(), *stays), devices_per_node=8)
    runs = [a_run(), a_run(operation="all_to_all", points=((64, 1e-5),))]
    merged = with_nccl_tests(before, runs)
    assert merged.collectives[:4] == stays
    assert [(p.operation, p.bytes, p.spread) for p in merged.collectives[4:]] == [
        ("all_reduce", 1024, 0.0),
        ("all_reduce", 1 << 20, 0.0),
        ("all_to_all", 64, 0.0),
    ]
    assert before.collectives[0] == point()  # the profile given is as it was


def test_a_size_that_two_runs_measured_counts_by_its_median() -> None:
    runs = [a_run(points=((1024, seconds),)) for seconds in (1e-5, 2e-5, 9e-5)]
    (point,) = with_nccl_tests(h100(), runs).collectives
    assert point.seconds == pytest.approx(2e-5)


def test_bytes_are_the_whole_tensor_and_the_file_goes_round(tmp_path: Path) -> None:
    hardware = small_hardware(device="NVIDIA GeForce RTX 3090")
    merged = with_nccl_tests(hardware, read_nccl_tests(SAMPLES / "all_gather_old.txt"))
    assert merged.collectives[-1].bytes == 4194304 * 4 * 8  # 4194304 floats of each of 8 ranks
    save_hardware(merged, tmp_path / "h.yaml")
    assert load_hardware(tmp_path / "h.yaml") == merged


# ---- provenance ------------------------------------------------------------------------------------------


def test_provenance_says_where_the_points_are_from(tmp_path: Path) -> None:
    source = tmp_path / "night.txt"
    source.touch()
    noon = datetime.datetime(2026, 3, 4, 12, tzinfo=datetime.UTC).timestamp()
    os.utime(source, (noon, noon))
    run = a_run(source=source, notes=("line 3: gather_perf was left out, no layout uses it",))
    merged = with_nccl_tests(h100(provenance={"kind": "published"}), [run])
    assert merged.provenance == {
        "kind": "published",
        "nccl_tests": [
            {
                "file": "night.txt",
                "date": "2026-03-04",
                "device": "NVIDIA H100 80GB HBM3",
                "version": "nccl-tests version 2.17.6",
                "operation": "all_reduce",
                "ranks": 8,
                "stride": 1,
                "groups": 1,
                "points": 2,
                "notes": ["line 3: gather_perf was left out, no layout uses it"],
            }
        ],
    }


def test_a_later_file_takes_the_place_of_an_earlier_one_in_provenance_too() -> None:
    once = with_nccl_tests(h100(), [a_run(version="old"), a_run(operation="broadcast", version="old")])
    twice = with_nccl_tests(once, [a_run(version="new")])
    found = [(r["operation"], r["version"]) for r in twice.provenance["nccl_tests"]]
    assert found == [("broadcast", "old"), ("all_reduce", "new")]
    assert "date" not in twice.provenance["nccl_tests"][0]  # there is no such file


def test_the_ring_of_sendrecv_is_told() -> None:
    merged = with_nccl_tests(h100(), read_nccl_tests(SAMPLES / "sendrecv.json"))
    (record,) = merged.provenance["nccl_tests"]
    assert (record["operation"], record["ranks"], record["stride"]) == ("send_recv", 8, 1)
    assert record["notes"][0].startswith("sendrecv_perf is a ring: every rank sends to the next and receives")


# ---- where the ranks lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices_per_node", "ranks", "ranks_per_node", "groups", "expected"),
    [
        (0, 8, 8, 1, 1),  # one node
        (8, 4, 4, 2, 1),  # halves of a node at once
        (0, 16, None, 1, 1),  # hosts not named
        (8, 16, 8, 1, 1),  # two whole nodes
        (0, 16, 8, 1, 1),
        (8, 2, 1, 1, 8),  # one rank of each node
        (1, 4, 1, 1, 1),  # nodes of one device
        (8, 2, 1, 8, 8),  # the rails of two nodes, MOD 8
        (0, 2, 1, 8, 8),
        (8, 2, 1, 16, 16),  # of four nodes, MOD 16
        (8, 16, 8, 2, 1),  # pairs of nodes, DIV 16
        (8, 8, 4, 2, 2),  # every other device of two nodes, MOD 2
    ],
)
def test_stride(devices_per_node: int, ranks: int, ranks_per_node: int | None, groups: int, expected: int) -> None:
    assert stride(devices_per_node, ranks=ranks, ranks_per_node=ranks_per_node, groups=groups) == expected


@pytest.mark.parametrize(
    ("devices_per_node", "ranks", "ranks_per_node", "groups", "expected", "got"),
    [
        (0, 2, 1, 1, "a profile that says how many devices a node has", "devices_per_node: 0"),
        (0, 8, 4, 2, "a profile that says how many devices a node has", "devices_per_node: 0"),
        (8, 8, 4, 1, "8 ranks on each node, all of its devices, or 1", "4 ranks a node, 1 at once"),
        (4, 8, 8, 1, "at most 4 ranks a node, as the profile's devices_per_node", "8 ranks a node"),
        (8, 2, 1, 4, "a multiple of 8 groups at once, or one", "4 groups"),
        (8, 2, None, 4, "as many ranks of the group on each node", "hosts not named, or uneven"),
    ],
)
def test_what_is_no_axis_of_a_mesh_is_refused(
    devices_per_node: int, ranks: int, ranks_per_node: int | None, groups: int, expected: str, got: str
) -> None:
    run = a_run(ranks=ranks, ranks_per_node=ranks_per_node, groups=groups)
    error = refused(h100(devices_per_node=devices_per_node), run)
    assert (error.where, error.expected, error.got) == (str(run.source), expected, got)


def test_runs_over_whole_nodes_tell_their_width_to_the_profile_and_to_the_other_runs() -> None:
    across, pairs = a_run(ranks=16), a_run(operation="all_gather", ranks=2, ranks_per_node=1)
    merged = with_nccl_tests(h100(), [pairs, across])
    assert merged.devices_per_node == 8
    assert {(p.operation, p.stride) for p in merged.collectives} == {("all_gather", 8), ("all_reduce", 1)}
    assert with_nccl_tests(h100(), [a_run()]).devices_per_node == 0  # one node may have more than the 8 in use
    error = refused(h100(), across, a_run(ranks=8, ranks_per_node=4))
    assert (error.expected, error.got) == ("8 ranks a node, as in the other runs over several nodes", "4 ranks a node")


def test_one_group_alone_and_hosts_not_named_are_told() -> None:
    def notes(**changes: Any) -> list[str]:
        merged = with_nccl_tests(h100(devices_per_node=8), [a_run(**changes)])
        return merged.provenance["nccl_tests"][0].get("notes", [])

    assert notes() == []
    assert notes(ranks=2, ranks_per_node=1) == [
        "one group alone, where a layout runs one for each device of a node at once"
    ]
    assert notes(ranks_per_node=None) == ["the file does not name the hosts: the ranks are taken for neighbours"]


# ---- the device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profiled", "ran"),
    [
        ("NVIDIA H100-SXM5-80GB", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA GB200 (one of its GPUs)", "NVIDIA GB200"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        ("NVIDIA Tesla V100-SXM2-16GB", "Tesla V100-SXM2-16GB"),
        ("AMD Instinct MI300X", "AMD Instinct MI300X"),
        ("made up", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H100-SXM5-80GB", None),
        ("NVIDIA H100-SXM5-80GB", "Graphics Device 80GB HBM3"),
    ],
)
def test_devices_that_may_be_the_same(profiled: str, ran: str | None) -> None:
    assert with_nccl_tests(small_hardware(device=profiled), [a_run(device=ran)]).collectives


@pytest.mark.parametrize("ran", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "AMD Instinct MI300X", "NVIDIA GH200 480GB"])
def test_another_device_is_refused(ran: str) -> None:
    error = refused(h100(), a_run(), a_run(device=ran))
    assert (error.expected, error.got) == ("NVIDIA H100-SXM5-80GB", ran)
    assert error.where.endswith("all_reduce.txt: all_reduce")


def test_a_profile_of_processors_takes_no_times_of_gpus() -> None:
    error = refused(small_hardware(device="AMD EPYC, one core a rank", backend="gloo"), a_run())
    assert (error.expected, error.got) == (
        "collectives of gloo on AMD EPYC, one core a rank",
        "NVIDIA H100 80GB HBM3",
    )
