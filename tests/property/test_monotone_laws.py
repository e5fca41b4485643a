"""What more can only help: memory, bandwidth, faster devices, idle nodes; and what less freedom cannot.

Each law holds whatever the costs are, so it needs no brute force: two searches of questions that differ in one thing.
`make test` tries a share of the questions; `make test-full` FULL_SHARE times as many.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.pareto import on_devices, plan_with_idle
from planner.question import Question
from planner.search import best_plan
from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile
from tests.property.test_brute_force import ACTIONS, TARGETS, TOLERANCE, exhaustive, with_limit
from tests.property.worlds import questions

INFEASIBLE = float("inf")


def best_seconds(question: Question) -> float:
    """The proven best step; infinite where nothing fits or nothing is legal."""
    plan = best_plan(question)
    if plan is None:
        return INFEASIBLE
    assert plan.certificate.gap == 0.0
    return plan.prediction.step_seconds


def not_slower(better: float, worse: float) -> bool:
    return better <= worse * (1 + TOLERANCE)


@st.composite
def tight_questions(draw: st.DrawFn) -> Question:
    """A random question of any target, its memory limit somewhat above or below what its best plan would take."""
    target = draw(st.sampled_from(TARGETS))
    question = draw(questions(target, ACTIONS[target]))
    plan = best_plan(question)
    if plan is None:
        return question
    return with_limit(question, plan.prediction.peak_memory_bytes * draw(st.sampled_from((0.5, 0.8, 0.95, 1.1))))


def with_bandwidth(cluster: ClusterSpec, tiers: list[int], factor: float) -> ClusterSpec:
    """The links of these tiers `factor` times as wide, their latencies as they were."""
    links = list(cluster.links)
    for tier in tiers:
        links[tier] = replace(links[tier], bandwidth_bytes_per_second=factor * links[tier].bandwidth_bytes_per_second)
    return replace(cluster, links=tuple(links))


def faster(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """Kernels `factor` times as fast, whatever bounds them."""
    return replace(
        hardware,
        memory_bandwidth_bytes_per_second=factor * hardware.memory_bandwidth_bytes_per_second,
        gemm_models=tuple(
            replace(model, achievable_flops_per_second=factor * model.achievable_flops_per_second)
            for model in hardware.gemm_models
        ),
        attention_models=tuple(
            replace(
                model,
                forward_flops_per_second=factor * model.forward_flops_per_second,
                backward_flops_per_second=factor * model.backward_flops_per_second,
            )
            for model in hardware.attention_models
        ),
    )


@exhaustive(25)
@given(question=tight_questions(), factor=st.sampled_from((1.01, 1.3, 4.0)))
def test_more_memory_never_makes_it_slower(question: Question, factor: float) -> None:
    assert not_slower(best_seconds(with_limit(question, factor * question.limit_bytes)), best_seconds(question))


@exhaustive(25)
@given(question=tight_questions(), factor=st.sampled_from((1.1, 2.0, 100.0)), data=st.data())
def test_more_bandwidth_never_makes_it_slower(question: Question, factor: float, data: st.DataObject) -> None:
    tiers = range(len(question.cluster.links))
    chosen = data.draw(st.lists(st.sampled_from(tiers), min_size=1, unique=True))
    wider = replace(question, cluster=with_bandwidth(question.cluster, chosen, factor))
    assert not_slower(best_seconds(wider), best_seconds(question))


@exhaustive(25)
@given(question=tight_questions(), factor=st.sampled_from((1.1, 2.0, 100.0)))
def test_a_faster_device_never_makes_it_slower(question: Question, factor: float) -> None:
    """Without `waits`: how long ranks wait for each other after more compute is measured, and rises or falls."""
    question = replace(question, hardware=replace(question.hardware, waits=()))
    assert not_slower(
        best_seconds(replace(question, hardware=faster(question.hardware, factor))), best_seconds(question)
    )


@exhaustive(12)
@given(question=tight_questions(), data=st.data())
def test_more_nodes_never_make_it_slower_where_some_may_be_idle(question: Question, data: st.DataObject) -> None:
    nodes = question.cluster.nodes
    fewer = on_devices(question, question.cluster.devices_per_node * data.draw(st.integers(1, nodes)))
    best = best_seconds(fewer)
    if best == INFEASIBLE:
        return
    assert not_slower(plan_with_idle(question, 1, INFEASIBLE).prediction.step_seconds, best)


@exhaustive(25)
@given(question=tight_questions(), data=st.data())
def test_a_pin_or_a_ban_never_makes_it_faster(question: Question, data: st.DataObject) -> None:
    """Of whatever key; what the best plan has may be pinned for nothing."""
    plan = best_plan(question)
    if plan is None:
        return
    free, layout = plan.prediction.step_seconds, plan.layout.to_dict()
    key = data.draw(st.sampled_from(sorted(layout)))
    value = layout[key] if data.draw(st.booleans()) else data.draw(st.sampled_from(_values(layout[key])))
    pinned = replace(question, job=replace(question.job, pins={**question.job.pins, key: value}))
    if question.job.allows(key, value):
        assert not_slower(free, best_seconds(pinned))
    if value == layout[key]:
        assert best_seconds(pinned) == pytest.approx(free, rel=TOLERANCE)
    ban = data.draw(st.sampled_from(("tp", "pp", "dp", "zero", "virtual_stages", "recompute")))
    assert not_slower(free, best_seconds(replace(question, job=replace(question.job, bans=(*question.job.bans, ban)))))


def _values(like: object) -> tuple[object, ...]:
    if isinstance(like, bool):
        return (False, True)
    return (0, 1, 2, 3, 4) if isinstance(like, int) else ("none", "gpipe", "1f1b", "zb1p", "interleaved-1f1b", "ring")
