"""Closed-form bounds: never above any assignment, and tight where the textbook is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bounds import StageLimits, fits, least_missing_bytes, lower_bound
from planner.layout import Layout
from planner.memory_cost import MemoryBytes, PartMemory
from planner.part_seconds import PartSeconds, Seconds
from planner.step_cost import CostModel, LayoutCosts, StageCount
from tests.oracles.brute_force import assignments, candidates
from tests.oracles.small_world import small_question
from tests.plans import tiny_llama
from tests.property.worlds import layout_costs


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layout_costs(), st.sampled_from((None, "none", "full")), st.data())
def test_no_assignment_is_faster_than_the_bound(costs: LayoutCosts, pin: str | None, data: st.DataObject) -> None:
    every = list(assignments(costs.layers, costs.layout.pp, pin))
    peaks = sorted(max(memory.total for memory in costs.memory(counts)) for counts in every)
    limit = max(1.0, data.draw(st.sampled_from(peaks)) * data.draw(st.sampled_from((0.9, 1 + 1e-6, 1.1))))
    bound = lower_bound(costs, limit, pin)
    fitting = [counts for counts in every if fits(costs, counts, limit)]
    if bound is None:
        assert fitting == []
        return
    # What it starts from is an assignment of the right shape.
    assert sum(count.blocks for count in bound.counts) == costs.layers
    assert all(count.blocks >= 1 for count in bound.counts[1:-1])
    assert tuple(bound.counts) in every
    for counts in fitting:
        assert bound.seconds <= costs.step(counts) * (1 + 1e-12), counts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout_costs(), st.sampled_from((None, "none", "full")))
def test_more_memory_never_raises_the_bound(costs: LayoutCosts, pin: str | None) -> None:
    bounds = [lower_bound(costs, limit, pin) for limit in (50.0, 200.0, 500.0, 1e4, 1e6)]
    reached = [bound.seconds if bound else math.inf for bound in bounds]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < math.inf


def test_the_bound_is_the_step_without_a_pipeline() -> None:
    question = small_question(devices=1)
    costs = CostModel(question.model, question.cluster, question.hardware, question.job).price(Layout())
    bound = lower_bound(costs, 1e12, None)
    assert bound is not None
    assert bound.counts == (StageCount(4, 0),)
    assert bound.seconds == pytest.approx(costs.step(bound.counts), rel=1e-12)


def test_the_bound_is_the_textbook_makespan_for_equal_stages() -> None:
    """4 stages of one block each, f = 1 and b = 2, free sends: (M + p - 1)(f + b) = 11 · 3."""
    nothing, none = PartSeconds(), PartMemory(MemoryBytes(), MemoryBytes(), MemoryBytes(), 0.0, 0.0)
    costs = LayoutCosts(
        layout=Layout(pp=4),
        microbatches=8,
        layers=4,
        block=PartSeconds(forward=Seconds(1.0), backward=Seconds(2.0), recompute=Seconds(1.0)),
        embedding=nothing,
        head=nothing,
        microbatch=nothing,
        send_seconds=0.0,
        step_seconds=0.5,
        block_memory=replace(none, held=MemoryBytes(activations=10.0)),
        embedding_memory=none,
        head_memory=none,
        fixed_memory=(MemoryBytes(),) * 4,
        in_flight=(4, 3, 2, 1),
        allocator_slack=0.0,
    )
    bound = lower_bound(costs, 40.0, None)
    assert bound is not None
    assert (bound.seconds, bound.counts) == (33.5, (StageCount(1, 0),) * 4)
    # One byte less and the first stage recomputes. Its round trip: 12 for microbatch 0, then 7 backwards, the
    # 4 forwards left after its first backward, and 8 more forwards.
    tight = lower_bound(costs, 39.0, None)
    assert tight is not None
    assert (tight.seconds, tight.counts[0]) == (12 + 7 * 2 + 4 + 8 + 0.5, StageCount(0, 1))
    # Without recomputation the first stage holds no block, and the last, with one in flight, takes two.
    moved = lower_bound(costs, 39.0, "none")
    assert moved is not None
    assert [count.none for count in moved.counts] == [0, 1, 1, 2]
    assert lower_bound(costs, 29.0, "none") is None  # the second stage needs a block, and 30 bytes for it


def one_block_stage(state: float, held: float, recomputed: float) -> LayoutCosts:
    """One stage, one microbatch, no seconds; bytes of a block as given."""
    nothing, none = PartSeconds(), PartMemory(MemoryBytes(), MemoryBytes(), MemoryBytes(), 0.0, 0.0)
    return LayoutCosts(
        layout=Layout(),
        microbatches=1,
        layers=1,
        block=nothing,
        embedding=nothing,
        head=nothing,
        microbatch=nothing,
        send_seconds=0.0,
        step_seconds=1.0,
        block_memory=PartMemory(
            MemoryBytes(weights=state), MemoryBytes(activations=held), MemoryBytes(activations=recomputed), 0.0, 0.0
        ),
        embedding_memory=none,
        head_memory=none,
        fixed_memory=(MemoryBytes(),),
        in_flight=(1,),
        allocator_slack=0.0,
    )


def test_a_limit_met_exactly_is_met_with_recomputation_pinned() -> None:
    costs = one_block_stage(3.0, 1.9, 0.0)
    assert fits(costs, (StageCount(0, 1),), 3.0)
    assert lower_bound(costs, 3.0, None) is not None
    assert lower_bound(costs, 3.0, "full") is not None


@pytest.mark.parametrize(
    ("limit", "pin", "least"),
    [
        (1000.0, None, [0, 0, 0, 0]),
        (100.0, None, [0, 0, 0, 2]),  # a block holds 40 bytes and gives 30 back: 4 are 60 too many
        (99.0, None, [0, 0, 0, 3]),
        (40.0, None, [0, 0, 2, 4]),
        (39.0, None, [0, 1, 2, None]),
        (40.0, "none", [0, 0, None, None]),
        (40.0, "full", [0, 1, 2, 4]),
        (39.0, "full", [0, 1, 2, None]),
        (-1.0, None, [None, None, None, None]),
    ],
)
def test_the_fewest_recomputed_blocks_that_fit(limit: float, pin: str | None, least: list[int | None]) -> None:
    costs = one_block_stage(5.0, 35.0, 5.0)
    limits = StageLimits(costs, 0, 0.0, limit, pin)
    assert [limits.least_recomputed(blocks) for blocks in (0, 1, 2, 4)] == least


def test_what_fits_allows_the_rounding_of_a_sum_and_no_more() -> None:
    question = small_question(devices=1)
    costs = CostModel(question.model, question.cluster, question.hardware, question.job).price(Layout())
    counts = (StageCount(4, 0),)
    need = costs.memory(counts)[0].total
    assert fits(costs, counts, need)
    assert fits(costs, counts, need * (1 - 1e-12))
    assert not fits(costs, counts, need * (1 - 1e-8))


@pytest.mark.parametrize("layers", [2, 4])
def test_what_is_missing_is_missing_in_the_best_case(layers: int) -> None:
    """Said to the user as "misses X" and "what would make it fit": X more must be needed, and enough."""
    question = small_question(tiny_llama(layers=layers), devices=layers)
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    for layout, tried in candidates(question).items():
        _, missing = least_missing_bytes(prices.price(layout), 1000.0, None)
        assert missing == pytest.approx(min(candidate.peak_bytes for candidate in tried) - 1000.0), layout


@pytest.mark.parametrize("pin", ["none", "full"])
def test_what_is_missing_with_recomputation_pinned(pin: str) -> None:
    question = small_question(devices=4, pins={"recompute": pin})
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    for layout, tried in candidates(question).items():
        stage, missing = least_missing_bytes(prices.price(layout), 1000.0, pin)
        assert 0 <= stage < layout.pp
        assert missing == pytest.approx(min(candidate.peak_bytes for candidate in tried) - 1000.0), layout
