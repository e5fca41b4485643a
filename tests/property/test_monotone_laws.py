"""More of anything never makes the best plan slower: memory, bandwidth, a faster device, more nodes that may idle."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.pareto import plan_with_idle
from planner.question import Question
from planner.search import best_plan
from profiles.hardware import HardwareProfile
from tests.oracles.small_world import small_cluster
from tests.property.worlds import questions
from tests.thinned import examples

# What the solver may be off by, in either of two searches; see stage_ilp.RELATIVE_TOLERANCE.
TOLERANCE = 2e-6
TARGETS = ("meshwright", "megatron", "torchtitan")
NO_LIMIT = 1e15
gains = st.sampled_from((1.001, 1.3, 4.0, 100.0))

laws = examples(12, 20)


@st.composite
def limited(draw: st.DrawFn) -> Question:
    """A question of any target, modelled throughout (no measured points), with memory that is often scarce."""
    question = draw(questions(draw(st.sampled_from(TARGETS))))
    hardware = replace(question.hardware, collectives=(), waits=(), contention_points=())
    question = replace(question, hardware=hardware)
    if (free := best_plan(question)) is None:
        return question
    share = draw(st.sampled_from((0.2, 0.5, 0.8, 0.95, 1.0, 2.0)))
    return with_memory(question, share * free.prediction.peak_memory_bytes)


def with_memory(question: Question, limit_bytes: float) -> Question:
    return replace(question, job=replace(question.job, memory_limit_bytes=limit_bytes))


def seconds(question: Question) -> float:
    """Of the best plan; infinite where nothing fits."""
    plan = best_plan(question)
    return float("inf") if plan is None else plan.prediction.step_seconds


def never_worse(less: Question, more: Question) -> None:
    assert seconds(more) <= seconds(less) * (1 + TOLERANCE)


@laws
@given(question=limited(), gain=gains)
def test_more_memory(question: Question, gain: float) -> None:
    limit = question.job.memory_limit_bytes or NO_LIMIT
    never_worse(question, with_memory(question, gain * limit))


@laws
@given(question=limited(), gain=gains, data=st.data())
def test_more_bandwidth(question: Question, gain: float, data: st.DataObject) -> None:
    links = list(question.cluster.links)
    tier = data.draw(st.integers(0, len(links) - 1))
    links[tier] = replace(links[tier], bandwidth_bytes_per_second=gain * links[tier].bandwidth_bytes_per_second)
    never_worse(question, replace(question, cluster=replace(question.cluster, links=tuple(links))))


def faster(hardware: HardwareProfile, gain: float) -> HardwareProfile:
    """Every product and every byte of a device's own memory in a `gain`-th of the time; nothing else changed."""
    return replace(
        hardware,
        memory_bandwidth_bytes_per_second=gain * hardware.memory_bandwidth_bytes_per_second,
        gemm_models=tuple(
            replace(model, achievable_flops_per_second=gain * model.achievable_flops_per_second)
            for model in hardware.gemm_models
        ),
        attention_models=tuple(
            replace(
                model,
                forward_flops_per_second=gain * model.forward_flops_per_second,
                backward_flops_per_second=gain * model.backward_flops_per_second,
            )
            for model in hardware.attention_models
        ),
    )


@laws
@given(question=limited(), gain=gains)
def test_a_faster_device(question: Question, gain: float) -> None:
    never_worse(question, replace(question, hardware=faster(question.hardware, gain)))


@laws
@given(question=limited(), data=st.data())
def test_more_nodes_that_may_idle(question: Question, data: st.DataObject) -> None:
    fewer, more = sorted(data.draw(st.sets(st.sampled_from((1, 2, 3, 4, 6)), min_size=2, max_size=2)))
    per_node = data.draw(st.sampled_from((1, 2))) if more < 4 else 1
    links = [(link.bandwidth_bytes_per_second, link.latency_seconds) for link in question.cluster.links]

    def on_nodes(nodes: int) -> Question:
        cluster = small_cluster(
            nodes * per_node, nodes, inside=links[0], across=links[-1], memory_bytes=question.cluster.memory_bytes
        )
        return replace(question, cluster=cluster)

    before = seconds(on_nodes(fewer))
    if before == float("inf"):
        return
    after = plan_with_idle(on_nodes(more), 1, float("inf"))
    assert after.prediction.step_seconds <= before * (1 + TOLERANCE)


def test_a_law_can_be_broken() -> None:
    """The laws are of searches: fewer devices are not among more of them unless they may idle."""
    from tests.oracles.small_world import small_question

    crowded = small_question(devices=8, cluster=small_cluster(8, inside=(1e3, 1.0)), global_batch=8)
    alone = replace(crowded, cluster=small_cluster(1, inside=(1e3, 1.0)))
    with pytest.raises(AssertionError):
        never_worse(alone, crowded)
