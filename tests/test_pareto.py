"""Fronts against searches of their own, devices left idle, remedies; the text at a fixed width."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from planner.errors import InfeasibleError
from planner.pareto import front, on_devices, plan_with_idle
from planner.pareto_report import front_report
from planner.search import best_plan, search
from tests.oracles.brute_force import all_layouts
from tests.oracles.small_world import small_cluster, small_question
from tests.plans import tiny_llama
from tests.test_answers import TWO_NODES, text

# Three nodes behind a link so slow that one of them alone is faster than all.
SLOW = small_question(cluster=small_cluster(6, 3, across=(1e5, 1e-2)), global_batch=12)


# ---- fronts -------------------------------------------------------------------------------------------------


def test_points_of_the_front_by_devices_are_the_best_plans() -> None:
    found = front(TWO_NODES, "devices", 60.0)
    assert [point.devices for point in found.points] == [4, 2]
    assert found.ended == 1
    for point in found.points:
        plan = search(on_devices(TWO_NODES, point.devices))
        assert (point.layout, point.step_seconds) == (plan.layout, plan.prediction.step_seconds)
        assert point.tokens_per_second == pytest.approx(128 / point.step_seconds)
        hours = point.devices * point.step_seconds / 3600 * 1e9 / 128
        assert point.gpu_hours_per_billion_tokens == pytest.approx(hours)


def test_the_front_by_memory_ends_where_nothing_fits() -> None:
    found = front(TWO_NODES, "memory", 60.0)
    limits = [point.limit_bytes for point in found.points]
    steps = [point.step_seconds for point in found.points]
    assert limits[0] == 5.2e5
    assert all(lower <= 0.9 * higher + 1e-6 for higher, lower in pairwise(limits))
    assert steps == sorted(steps)
    assert all(point.peak_memory_bytes <= point.limit_bytes * (1 + 1e-9) for point in found.points)
    assert found.ended is not None
    job = replace(TWO_NODES.job, memory_limit_bytes=found.ended)
    assert best_plan(replace(TWO_NODES, job=job)) is None


def test_what_is_beaten_is_off_the_front() -> None:
    points = front(SLOW, "devices", 60.0).points
    assert {point.devices: point.on_front for point in points} == {6: False, 2: True, 1: True}
    shown = text(front_report(front(SLOW, "devices", 60.0)))
    assert shown.count("(beaten)") == 1
    assert "a the front, b beaten" in shown


def test_a_front_of_nothing_is_refused() -> None:
    nothing = replace(TWO_NODES, job=replace(TWO_NODES.job, memory_limit_bytes=1e4))
    for kind in ("devices", "memory"):
        with pytest.raises(InfeasibleError):
            front(nothing, kind, 60.0)


GOLDEN_FRONT = """
step against devices
devices     step  tokens/s  GPU-hours per billion tokens  peak memory  layout
4        7.17 ms    17,859                         62.22      0.5 MiB  pp2 dp2 zero1 mb4 interleaved-1f1b
2        14.6 ms     8,747                         63.51      0.5 MiB  pp2 mb2 1f1b
no plan on 1 devices

a the front
       ┌───────────────────────────────────────────────────────────────────────────────────────────┐
 0.0146┤a·····                                                                                     │
       │      ············                                                                         │
       │                  ············                                                             │
       │                              ············                                                 │
  0.011┤                                          ···········                                      │
       │                                                     ············                          │
       │                                                                 ············              │
       │                                                                             ············  │
0.00732┤                                                                                         ·a│
       │                                                                                           │
       │                                                                                           │
0.00366┤                                                                                           │
       │                                                                                           │
       │                                                                                           │
       │                                                                                           │
      0┤                                                                                           │
       └┬─────────────────────────────────────────────────────────────────────────────────────────┬┘
        2                                                                                         4
seconds a step                                 devices
"""


def test_the_report_of_a_front() -> None:
    assert text(front_report(front(TWO_NODES, "devices", 60.0))) == GOLDEN_FRONT.strip("\n")


# ---- devices left idle ----------------------------------------------------------------------------------------


def test_nodes_stay_idle_where_that_is_faster() -> None:
    plan = plan_with_idle(SLOW, 1, 60.0)
    each = [search(on_devices(SLOW, devices)).prediction.step_seconds for devices in (6, 4, 2)]
    assert plan.prediction.step_seconds == pytest.approx(min(each))
    assert plan.cluster.devices == 2
    assert search(SLOW).prediction.step_seconds > plan.prediction.step_seconds
    fast = small_question(cluster=small_cluster(4, 2, across=(1e9, 1e-5)), global_batch=16)
    assert plan_with_idle(fast, 1, 60.0).layout == search(fast).layout
    nothing = replace(SLOW, job=replace(SLOW.job, memory_limit_bytes=1e4))
    with pytest.raises(InfeasibleError):
        plan_with_idle(nothing, 1, 60.0)


# ---- what would make it fit ------------------------------------------------------------------------------------


def test_every_remedy_is_the_best_plan_of_the_changed_question() -> None:
    pins = {"micro_batch": 4, "zero": (0, 1)}
    question = replace(TWO_NODES, job=replace(TWO_NODES.job, memory_limit_bytes=2.6e5, pins=pins))
    with pytest.raises(InfeasibleError) as caught:
        search(question)
    changes = {remedy["change"]: remedy for remedy in caught.value.remedies}
    freed = {
        "without --memory-limit": replace(question.job, memory_limit_bytes=None),
        "without --pin micro_batch=4": replace(question.job, pins={"zero": (0, 1)}),
    }
    assert set(freed) < set(changes)
    for change, job in freed.items():
        plan = search(replace(question, job=job))
        assert changes[change]["step_seconds"] == pytest.approx(plan.prediction.step_seconds, rel=1e-6)
        assert changes[change]["seconds_per_token"] == pytest.approx(plan.prediction.step_seconds / 128, rel=1e-6)
    (memory,) = [change for change in changes if change.endswith("of memory per device")]
    assert changes[memory]["peak_memory_bytes"] > 2.6e5
    assert all(any(change in line for line in caught.value.lines) for change in changes)


def test_shorter_sequences_are_a_remedy_and_keep_the_tokens_of_a_step() -> None:
    long = small_question(devices=2, sequence=1024, global_batch=2)
    recomputing = replace(long, job=replace(long.job, pins={"recompute": "full"}))
    need = min(search(each).prediction.peak_memory_bytes for each in (long, recomputing))
    for share in (0.9, 0.7, 0.5, 0.3, 0.2):
        question = replace(long, job=replace(long.job, memory_limit_bytes=share * need))
        if best_plan(question) is not None:
            continue
        with pytest.raises(InfeasibleError) as caught:
            search(question)
        shorter = [remedy for remedy in caught.value.remedies if remedy["change"].startswith("sequences of ")]
        if shorter:
            words = shorter[0]["change"].split()
            assert int(words[2]) * int(words[4]) == 2048
            return
    pytest.fail("no limit at which shorter sequences alone help")


@pytest.mark.full
def test_more_devices_are_the_fewest_that_help() -> None:
    cluster = small_cluster(4, 2)
    wide = replace(cluster, links=(cluster.links[0], replace(cluster.links[1], span=64)))
    free = small_question(tiny_llama(layers=10), cluster=wide, global_batch=24)
    least = front(free, "memory", 60.0).ended
    assert least is not None
    question = replace(free, job=replace(free.job, memory_limit_bytes=least))
    with pytest.raises(InfeasibleError) as caught:
        search(question)
    (devices,) = [r["devices"] for r in caught.value.remedies if r["change"].endswith(" devices")]
    tried = {n: best_plan(replace(question, cluster=replace(wide, nodes=n))) for n in (3, 4, 6, 8)}
    assert tried[3] is not None
    assert devices == min(2 * nodes for nodes, plan in tried.items() if plan is not None)


# ---- pins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pins", "bans"),
    [
        ({"tp": range(2, 5)}, ()),
        ({"pp": (2, 4), "zero": (0, 1)}, ()),
        ({"micro_batch": range(2, 9), "schedule": ("gpipe",)}, ()),
        ({"recompute": ("none", "full")}, ("dp",)),
        ({"dp_shard": 2}, ()),
        ({"tp": 1}, ("cp_style", "recompute", "ep", "virtual_stages")),
    ],
)
def test_pins_of_several_values_leave_just_those_layouts(pins: dict, bans: tuple[str, ...]) -> None:
    from planner.space import enumerate_layouts

    question = small_question(devices=4, pins=pins, bans=bans)
    found = list(enumerate_layouts(question.rules))
    assert set(found) == set(all_layouts(question))
    assert len(found) == len(set(found)) > 0
    free = all_layouts(small_question(devices=4))
    assert len(found) < len(free) or "recompute" in pins
