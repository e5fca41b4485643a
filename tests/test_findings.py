"""What the profiler makes of its measurements: a profile and a cluster, at one pace, and gone on with later."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from profiles.hardware import HardwareProfile, load_hardware, save_hardware
from profiles.input_error import InputError
from profiles.points import AttentionPoint, CollectivePoint, GemmPoint
from profiles.probes.cases import DEFAULT, FULL, PHASES, QUICK, Case, all_cases
from profiles.probes.collectives import PlacedGroup, placements
from profiles.probes.findings import Findings
from profiles.probes.profiler import ProfileOptions
from profiles.probes.timing import Rank, trimmed_mean
from profiles.probes.worker import in_turn

FACTS: dict[str, Any] = {
    "runs": [2],
    "device": "made up",
    "context_bytes": 1e6,
    "memory_bytes": 1e9,
    "cuda": False,
    "multiprocessors": 0,
    "topology": "no GPU",
    "driver": None,
    "nccl": None,
    "conditions_before": {},
}


def gemm(operation: str, seconds: float) -> GemmPoint:
    return GemmPoint(dtype="fp32", operation=operation, m=64, n=64, k=64, seconds=seconds)


def attention(direction: str) -> AttentionPoint:
    return AttentionPoint(dtype="fp32", direction=direction, batch=1, heads=2, sequence=64, head_dim=32, seconds=1e-3)


def findings(**facts: Any) -> Findings:
    """Just enough to plan with, every case at the same pace."""
    found = Findings("cli.py profile", 2, facts=FACTS | facts)
    found.add_case("forward", {"gemm": [gemm("forward", 1e-3)]}, "", 0.1)
    found.add_case("input", {"gemm": [gemm("input_grad", 1e-3)]}, "", 0.1)
    assert not found.usable
    found.add_case("weight", {"gemm": [gemm("weight_grad", 1e-3)]}, "", 0.1)
    found.add_case("attention", {"attention": [attention("forward"), attention("backward")]}, "", 0.1)
    return found


def test_it_is_usable_once_one_dtype_has_all_its_products_and_attention() -> None:
    found = findings()
    assert found.usable
    hardware = found.hardware()
    assert hardware.supports("fp32")
    assert hardware.peak_flops_per_second == {"fp32": pytest.approx(2 * 64**3 / 1e-3)}
    assert hardware.provenance["complete"] is False
    found.ended = {}
    assert found.hardware().provenance["complete"] is True


def test_what_was_measured_in_a_slow_spell_is_scaled_to_the_median_pace() -> None:
    found = findings()
    for number in range(9):
        found.add_case(f"slow {number}", {"gemm": [gemm("forward", 2e-3)]}, "", 0.2)
    for number in range(20):
        found.add_case(f"later {number}", {"launch_seconds": 3e-6}, "", 0.1)
    points = found.hardware().gemm
    assert points[0].seconds == pytest.approx(1e-3)
    assert points[3 + 4].seconds == pytest.approx(1e-3)  # in the middle of the spell: half of what it took then
    assert found.points["gemm"][7].seconds == 2e-3
    assert found.hardware().launch_seconds == pytest.approx(3e-6)
    pace = found.hardware().provenance["pace"]
    assert pace == {"median_seconds": 0.1, "fastest_seconds": 0.1, "slowest_seconds": 0.2}


def test_an_unfinished_profile_is_gone_on_with(tmp_path: Path) -> None:
    found = findings()
    found.add_case("overhead", {"parameter_overhead_seconds": 2e-5}, "", 0.1)
    found.add_case("too large", {}, "out of memory", 0.1)
    save_hardware(found.hardware(), tmp_path / "h.yaml")
    earlier = load_hardware(tmp_path / "h.yaml")
    assert earlier.provenance["cases"]["skipped"] == {"too large": "out of memory"}
    again = Findings.of_profile(earlier, "cli.py profile --resume", 2)
    again.facts = FACTS
    assert again.done == found.done
    assert again.skipped == {"too large": "out of memory"}
    assert len(again.done) == 6
    again.add_case("more", {"gemm": [gemm("forward", 4e-3)]}, "", 0.3)
    hardware = again.hardware()
    assert hardware.parameter_overhead_seconds == 2e-5
    assert [p.seconds for p in hardware.gemm] == pytest.approx([1e-3, 1e-3, 1e-3, 4e-3])


def test_what_time_did_not_hold_is_kept_by_phase_until_it_is_measured(tmp_path: Path) -> None:
    found = findings()
    found.facts = FACTS | {"quick_cases": [("overheads", "messages"), ("overheads", "chain"), ("links", "bandwidths")]}
    found.add_case("chain", {"operation_overhead_seconds": 1e-6}, "", 0.1)
    save_hardware(found.hardware(), tmp_path / "h.yaml")
    earlier = load_hardware(tmp_path / "h.yaml")
    assert earlier.left_out == {"overheads": ("messages",), "links": ("bandwidths",)}
    again = Findings.of_profile(earlier, "cli.py profile --resume", 2)
    again.facts = found.facts
    for name in ("messages", "bandwidths"):
        again.add_case(name, {}, "", 0.1)
    assert again.hardware().left_out == {}
    assert "left_out" not in again.hardware().provenance["cases"]


def test_a_tier_for_each_kind_of_link_and_always_one_for_the_node() -> None:
    def cluster(matrix: list[list[float]] | None, runs: list[int]) -> list[tuple[str, int]]:
        found = findings(runs=runs)
        found.ranks = sum(runs)
        if matrix is not None:
            found.figures["bandwidths"] = matrix
        return [(link.tier, link.span) for link in found.cluster("local").links]

    slow = [[0.0 if i == j else 10.0 if i // 2 == j // 2 else 1.0 for j in range(4)] for i in range(4)]
    same = [[0.0 if i == j else 10.0 for j in range(4)] for i in range(4)]
    assert cluster(slow, [2, 2]) == [("node", 2), ("network", 4)]
    assert cluster(same, [2, 2]) == [("node", 2), ("network", 4)]  # as fast, but nodes all the same
    assert cluster(slow, [4]) == [("link of 2", 2), ("node", 4)]
    assert cluster(None, [4]) == [("node", 4)]


@pytest.mark.parametrize(("alone", "shared"), [(2.0, True), (1.0, False)])
def test_a_wire_is_shared_where_one_pair_alone_is_faster_than_all_at_once(alone: float, shared: bool) -> None:
    found = findings(runs=[2, 2])
    found.ranks = 4
    matrix = [[0.0 if i == j else 10.0 if i // 2 == j // 2 else 1.0 for j in range(4)] for i in range(4)]
    matrix[1][2] = matrix[2][1] = alone
    found.figures["bandwidths"] = matrix
    assert [link.shared for link in found.cluster("local").links] == [False, shared]


def test_ranks_spread_unevenly_are_refused() -> None:
    with pytest.raises(InputError, match="not spread evenly") as caught:
        findings(runs=[2, 1]).cluster("local")
    assert ("got", "on each node in turn 2, 1") in caught.value.lines()


def test_measured_links_reach_the_cluster() -> None:
    found = findings()
    for size, seconds in ((1000, 1e-3), (10**6, 2e-3), (10**8, 1e-1)):
        point = CollectivePoint(operation="all_reduce", ranks=2, bytes=size, seconds=seconds)
        found.add_case(f"{size}", {"collectives": [point]}, "", 0.1)
    (link,) = found.cluster("local").links
    assert link.bandwidth_bytes_per_second == pytest.approx(1e9, rel=0.05)
    assert found.hardware().collective_seconds("all_reduce", 2, 10**6) == pytest.approx(2e-3)


# ---- cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_case_has_a_name_of_its_own_and_the_needed_ones_come_first(world_size: int, cuda: bool) -> None:
    rank = Rank(0, world_size, torch.device("cuda" if cuda else "cpu"))
    group: Any = None
    groups = {p: PlacedGroup(group, [p[1] * i for i in range(p[0])], p[1]) for p in placements(world_size)}
    cases = all_cases(rank, groups, ("fp32", "bf16", "fp8") if cuda else ("fp32", "bf16"))
    assert [name for name, number in Counter(case.name for case in cases).items() if number > 1] == []
    levels = [case.level for case in cases]
    assert levels == sorted(levels)
    assert set(levels) == {QUICK, DEFAULT, FULL}
    phases = {case.phase for case in cases if case.level == QUICK}
    assert phases == set(PHASES) - ({"links"} if world_size == 1 else set())
    # A budget that ends halfway through the default level has seen half of each phase.
    default = [case for case in cases if case.level == DEFAULT]
    for phase in {case.phase for case in default}:
        half = sum(case.phase == phase for case in default[: len(default) // 2])
        assert half == pytest.approx(sum(case.phase == phase for case in default) / 2, abs=1, rel=0.01)


def test_time_that_is_up_too_early_has_gone_to_the_phases_by_their_shares() -> None:
    seconds = {"links": 3.0, "overheads": 1.0, "memory": 0.5, "gemm": 0.1}  # of a case; there is no attention
    number = {"links": 30, "overheads": 90, "memory": 2, "gemm": 900}
    cases = [Case(f"{phase} {i}", phase, QUICK, id) for phase in seconds for i in range(number[phase])]
    cases.append(Case("later", "links", DEFAULT, id))
    spent, order = dict.fromkeys(PHASES, 0.0), list[Case]()
    for case in in_turn(cases, spent):
        order.append(case)
        spent[case.phase] += seconds[case.phase]
        if sum(spent.values()) > 81.0:
            break
    assert spent["memory"] == 1.0  # all of it; the others share what it leaves over
    ongoing = ("links", "overheads", "gemm")
    for phase in ongoing:
        share = PHASES[phase] / sum(PHASES[one] for one in ongoing)
        assert spent[phase] == pytest.approx(80.0 * share, abs=seconds["links"])
    of_links = [case.name for case in order if case.phase == "links"]
    assert of_links == [f"links {i}" for i in range(len(of_links))]
    everything = list(in_turn(cases, spent))
    assert (len(everything), everything[-1].name) == (len(cases), "later")


def test_the_budget_counts_from_when_the_profile_was_asked_for() -> None:
    began = time.time() - 4.0
    late, now = (ProfileOptions(ranks=2, thoroughness="quick", began=at).request().deadline for at in (began, None))
    assert late == pytest.approx(began + 26.0)
    assert now == pytest.approx(time.time() + 26.0, abs=1.0)


def test_placements_are_the_axes_that_divide_the_world() -> None:
    assert placements(1) == []
    assert placements(4) == [(2, 1), (2, 2), (4, 1)]
    assert placements(6) == [(2, 1), (3, 1), (2, 3), (3, 2), (6, 1)]
    assert all(world % (size * stride) == 0 for world in range(1, 33) for size, stride in placements(world))


def test_the_trimmed_mean_leaves_out_a_tenth_at_either_end() -> None:
    assert trimmed_mean([1.0] * 8 + [100.0, 0.0]) == 1.0
    assert trimmed_mean([1.0, 3.0]) == 2.0


def test_a_profile_of_nothing_is_not_written() -> None:
    empty = Findings("cli.py profile", 2)
    assert not empty.usable
    assert not isinstance(empty.facts.get("device"), HardwareProfile)
