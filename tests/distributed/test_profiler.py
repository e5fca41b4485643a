"""The profiler on real ranks: sane figures, a rank without memory that stops nobody, Ctrl-C that loses nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from profiles.cluster import load_cluster_file
from profiles.hardware import HardwareProfile, load_hardware
from profiles.points import CollectivePoint
from profiles.probes import compute, concurrency, overheads
from profiles.probes.cases import DEFAULT, QUICK, Case, all_cases
from profiles.probes.collectives import (
    PlacedGroup,
    make_groups,
    measure_bandwidths,
    measure_collective,
    measure_scalars,
    placements,
)
from profiles.probes.findings import Request
from profiles.probes.timing import CaseFailed, Rank
from profiles.probes.worker import _measure
from tests.command_line import ctrl_c_in_each_that_it_starts, start
from tests.distributed.harness import run_ranks

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "exchange", "all_to_all", "broadcast")


def this_rank() -> Rank:
    control: Any = dist.new_group(backend="gloo")
    return Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), control, effort_seconds=0.002)


def probe_links() -> tuple[list[CollectivePoint], list[list[float]]]:
    rank = this_rank()
    groups = make_groups(rank)
    assert list(groups) == placements(4)
    points = [
        measure_collective(rank, placed, operation, 4096)
        for placed in groups.values()
        for operation in (*OPERATIONS, *(("send_recv",) if placed.size == 2 else ()))
    ]
    points.append(measure_collective(rank, groups[4, 1], "all_to_all", 4096, uneven=True))
    points.append(measure_scalars(rank, groups[4, 1]))
    return points, measure_bandwidths(rank, 65536)


def test_collectives_of_every_placement() -> None:
    points, matrix = run_ranks(probe_links, 4)[0]
    assert all(0 < point.seconds < 5 for point in points)
    scalars = points.pop()
    assert (scalars.operation, scalars.ranks, scalars.stride, scalars.bytes) == ("scalar_all_reduce", 4, 1, 16)
    assert len(points) == 3 * 6 + 2 + 1
    assert {(p.ranks, p.stride) for p in points} == {(2, 1), (2, 2), (4, 1)}
    assert {p.bytes for p in points} == {4096}
    assert [p.uneven for p in points].count(True) == 1
    assert [[value > 0 for value in row] for row in matrix] == [[i != j for j in range(4)] for i in range(4)]


def probe_the_rest() -> dict[str, Any]:
    rank = this_rank()
    groups = make_groups(rank)
    found = {
        **overheads.measure_microbatch(rank),
        **overheads.measure_parameter(rank),
        **overheads.measure_sharded_block(rank, groups[2, 1]),
        **compute.measure_launch(rank),
        **concurrency.measure_stragglers(rank, groups[2, 1]),
    }
    found["shared"] = concurrency.measure_stragglers(replace(rank, ranks_per_core=2.0), groups[2, 1])
    found["fsdp"] = overheads.measure_data_parallel(rank, groups[2, 1], 2**18)
    found["contention"] = concurrency.measure_contention(rank)
    found["memory contention"] = concurrency.measure_memory_contention(rank, 2**16)
    found["overlap"] = concurrency.measure_overlap(rank, groups[2, 1], "all_reduce", 2**16)
    found["gemm"] = [
        compute.measure_gemm(rank, "fp32", operation, 64, 32, 16) for operation in ("forward", "weight_grad")
    ]
    found["many"] = [compute.measure_many_gemm(rank, kind, "fp32", 4, 16, 32, 16) for kind in ("batched", "grouped")]
    found["attention"] = compute.measure_attention(rank, "fp32", 1, 4, 32, 16, kv_heads=2, backend="math")
    return found


def test_the_other_probes() -> None:
    found = run_ranks(probe_the_rest, 2)[0]
    assert 0 < found["launch_seconds"] < found["microbatch_overhead_seconds"] < 0.1
    assert found["straggler_slowdown"] >= 1
    stretches = [point.compute_seconds for point in found["shared"]["waits"]]
    assert found["shared"]["straggler_slowdown"] >= 1
    assert stretches == sorted(stretches)
    assert [p.operation for p in found["fsdp"]] == ["fsdp_all_gather", "fsdp_reduce_scatter", "replicate_all_reduce"]
    # 7 matrices of 16 columns: what a quarter of a MiB holds of them.
    assert {p.bytes for p in found["fsdp"]} == {4 * 7 * 16 * (2**18 // 4 // 7 // 16)}
    assert [p.active for p in found["contention"]] == [1, 2]
    assert found["contention"][0].slowdown == 1.0 <= found["contention"][1].slowdown
    assert [(p.active, p.memory_bytes) for p in found["memory contention"]] == [(1, 2**16), (2, 2**16)]
    assert min(found["overlap"].compute_slowdown, found["overlap"].communication_slowdown) >= 1
    assert all(p.seconds > 0 for p in (*found["gemm"], *found["many"], *found["attention"]))
    assert [p.direction for p in found["attention"]] == ["forward", "backward"]


def one_rank_out_of_memory() -> list[tuple[str, str]]:
    rank = this_rank()
    told: list[tuple[str, str]] = []

    def fails_on_rank_1(r: Rank) -> dict[str, float]:
        if r.rank == 1:
            raise MemoryError("no memory for this shape")
        r.barrier()
        return {"never_seconds": 1.0}

    def works(r: Rank) -> dict[str, float]:
        return {"fine_seconds": r.mean(float(r.rank))}

    cases = [
        Case("too large", "gemm", QUICK, fails_on_rank_1),
        Case("at the end", "gemm", QUICK, lambda r: _after_the_last_agreement(r)),
        Case("lacks a kernel", "gemm", QUICK, _without_kernel, optional=True),
        Case("larger than the host", "gemm", QUICK, lambda r: {"x": torch.empty(1 << 50)}),
        Case("fits", "gemm", QUICK, works),
    ]

    def tell(kind: str, content: Any) -> None:
        if kind == "case":
            told.append((content["name"], content["skipped"] or str(content["found"])))

    _measure(rank, cases, Request(QUICK, time.time() + 60, ("fp32",)), tell)
    return told


def _after_the_last_agreement(rank: Rank) -> dict[str, float]:
    """Rank 0 fails where the others think that they are done."""
    if rank.rank == 0:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return {}


def _without_kernel(rank: Rank) -> dict[str, float]:
    raise RuntimeError("no kernel here")


def test_a_rank_that_cannot_measure_a_shape_stops_nobody() -> None:
    told = run_ranks(one_rank_out_of_memory, 3, timeout_seconds=30)
    larger = dict(told[0]).pop("larger than the host")
    assert "can't allocate memory: you tried to allocate 4503599627370496 bytes" in larger
    assert [pair for pair in told[0] if pair[1] != larger] == [
        ("too large", "another rank gave up"),
        ("at the end", "CUDA out of memory"),
        ("lacks a kernel", "no kernel here"),
        ("fits", "{'fine_seconds': 1.0}"),
    ]


def bug() -> list[str]:
    """Of each: a mistake of ours, one that torch words like a limit of the device, and one that hides a name."""
    rank = this_rank()
    raised = []
    for mistake in (
        lambda r: 1 / 0,
        lambda r: torch.empty(2).view(3),
        lambda r: _raise(RuntimeError("only Tensors of floating point dtype can require memory")),
        lambda r: r.no_such_thing,
    ):
        try:
            _measure(rank, [Case("bug", "gemm", QUICK, mistake)], Request(QUICK, time.time() + 9, ()), print)
            raised.append("nothing")
        except (ZeroDivisionError, RuntimeError, AttributeError, CaseFailed) as error:
            raised.append(type(error).__name__)
    return raised


def _raise(error: Exception) -> Any:
    raise error


def test_a_bug_in_a_probe_is_not_taken_for_a_shape_that_does_not_fit() -> None:
    assert run_ranks(bug, 2) == [["ZeroDivisionError", "RuntimeError", "RuntimeError", "AttributeError"]] * 2


def test_what_a_phase_had_no_time_for_comes_before_what_only_refines() -> None:
    def spend(seconds: float) -> Callable[[Rank], dict[str, float]]:
        return lambda rank: {"spent_seconds": time.sleep(seconds) or seconds}

    cases = [
        Case("links, slow", "links", QUICK, spend(1.0)),
        Case("links, put off", "links", QUICK, spend(0.01)),
        Case("gemm", "gemm", QUICK, spend(0.01)),
        Case("gemm, more", "gemm", DEFAULT, spend(0.01)),
    ]
    measured: list[str] = []

    def tell(kind: str, content: Any) -> None:
        if kind == "case":
            measured.append(content["name"])

    rank = Rank(0, 1, torch.device("cpu"), effort_seconds=1e-3)
    _measure(rank, cases, Request(DEFAULT, time.time() + 3.0, ()), tell)
    assert measured == ["links, slow", "gemm", "links, put off", "gemm, more"]


def test_operands_are_cold_and_a_residual_sum_costs_the_same_both_ways() -> None:
    rank = Rank(0, 1, torch.device("cpu"), effort_seconds=1e-3)
    forward, backward = compute.measure_memory(rank, "fp32", "residual", 2**14)
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert forward.seconds == backward.seconds > 0
    used: list[int] = []

    def operand(number: int) -> compute.Differentiable:
        x = torch.ones(4, requires_grad=True)
        return lambda: (used.append(number), x * 2.0)[1], (x,)

    compute._forward_backward(rank, [operand(number) for number in range(3)])
    assert used[:6] == [0, 1, 2, 0, 1, 2]
    assert [compute._copies(size) for size in (2**10, 4 * 10**6, 10**9)] == [16, 8, 1]


def test_small_messages_of_every_operation_come_before_large_ones() -> None:
    rank = Rank(0, 2, torch.device("cpu"))
    placed: Any = PlacedGroup(None, [0, 1], 1)  # type: ignore[arg-type]
    quick = [c for c in all_cases(rank, {(2, 1): placed}, ("fp32",)) if c.level == QUICK and c.phase == "links"]
    assert [c.name for c in quick[:4]] == [
        "bandwidths",
        "sum of loss and norm",
        "send_recv 2 ranks 1 apart 1024 bytes",
        "all_reduce 2 ranks 1 apart 1024 bytes",
    ]
    sizes = [c.size for c in quick[1:]]
    assert sizes == sorted(sizes)
    assert len(sizes) == 19


# ---- the whole of it, as a person runs it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A profile whose session got Ctrl-C as soon as its file was there: file, exit code, what it said.

    Its ranks got one before, as they started, which is for the command alone.
    """
    path = tmp_path_factory.mktemp("profile") / "hardware.yaml"
    with pytest.MonkeyPatch.context() as patch:
        sent = ctrl_c_in_each_that_it_starts(path.parent / "sent", "profiles.probes.profiler", patch)
        running = start("profile", "--nproc", "2", "--precision", "fp32", "-o", str(path))
    until = time.monotonic() + 150
    while not path.exists() and time.monotonic() < until and running.poll() is None:
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert len(list(sent.glob("*.sent"))) == 2
    return path, running.returncode, said


def test_ctrl_c_leaves_a_profile_that_a_plan_can_be_made_from(interrupted: tuple[Path, int, str]) -> None:
    path, code, said = interrupted
    assert code == 130
    assert f"{path} holds what was measured, and `cli.py profile --resume -o {path}` goes on" in said
    assert "Traceback" not in said
    hardware = load_hardware(path)
    assert hardware.supports("fp32")
    assert hardware.provenance["complete"] is False
    cluster = load_cluster_file(path.with_suffix(".cluster.yaml"))
    assert (cluster.devices, cluster.hardware) == (2, str(path))


def test_resume_measures_only_what_is_missing(interrupted: tuple[Path, int, str]) -> None:
    path = interrupted[0]
    before = load_hardware(path)
    running = start("profile", "--resume", "--quick", "-o", str(path), "--json")
    out, said = running.communicate(timeout=90)
    assert running.returncode == 0, said
    after = load_hardware(path)
    assert after.provenance["complete"] is True
    assert set(_names(before)) <= set(_names(after))
    assert [(p.m, p.n, p.k) for p in after.gemm[: len(before.gemm)]] == [(p.m, p.n, p.k) for p in before.gemm]
    assert len(set(_names(after))) == len(_names(after))
    assert '"provenance"' in out


def _names(hardware: HardwareProfile) -> list[str]:
    return hardware.provenance["cases"]["done"]
