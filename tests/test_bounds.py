"""Closed-form bounds: never above any assignment, and tight where the textbook is."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations_with_replacement, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bounds import fits, lower_bound, recompute_of_ranks
from planner.first_assignment import first_assignment, missing_bytes, roomiest_assignment
from planner.group_bounds import GroupBounds, one_state_each
from planner.in_flight import InFlight
from planner.layout import Layout
from planner.layout_costs import Blocks, LayoutCosts, SegmentCosts
from planner.memory_bytes import MemoryBytes, PartMemory
from planner.part_seconds import PartSeconds, Seconds
from planner.rank_limits import Moment, RankLimits, certain_chunks
from planner.remedies import what_forbids
from planner.rules import recompute_modes
from planner.search import best_plan
from planner.space import layout_groups
from planner.step_cost import CostModel
from tests.oracles.brute_force import candidates, fastest, priced
from tests.oracles.small_world import counts, small_hardware, small_question
from tests.plans import tiny_llama
from tests.property.worlds import any_layout_costs, layout_costs
from tests.thinned import examples

FREE, KEPT, RECOMPUTED = ("none", "full"), ("none",), ("full",)


def check_the_bound(costs: LayoutCosts, modes: tuple[str, ...], data: st.DataObject) -> None:
    every = list(priced(costs, modes))
    peaks = sorted(candidate.peak_bytes for candidate in every)
    limit = max(1.0, data.draw(st.sampled_from(peaks)) * data.draw(st.sampled_from((0.9, 1 + 1e-6, 1.1))))
    bound = lower_bound(costs, limit, modes)
    best = fastest(every, limit)
    if bound is None:
        assert best is None
        return
    # What the search starts from is an assignment of the right shape.
    assert first_assignment(costs, limit, modes) in [candidate.counts for candidate in every]
    goal = data.draw(st.sampled_from(every)).step_seconds
    segment, least = recompute_of_ranks(costs, limit, modes, goal)
    recompute = costs.segments[segment].seconds.recompute
    for candidate in every:
        if candidate.step_seconds <= goal and candidate.peak_bytes <= limit:
            for rank, of_rank in enumerate(least):
                held = [candidate.counts[stage][segment] for stage in costs.layout.stages_of(rank)]
                layers = sum(blocks.total for blocks in held)
                assert layers < len(of_rank), (candidate.counts, rank)
                spent = sum(blocks.of(mode) * recompute(mode).total for blocks in held for mode in modes)
                assert spent >= of_rank[layers] * (1 - 1e-12), (candidate.counts, rank)
    if best is not None:
        assert bound <= best.step_seconds * (1 + 1e-12), best.counts
        assert fits(costs, best.counts, limit)
        assert best.step_seconds == pytest.approx(costs.step(best.counts), rel=1e-12)


@examples(100, 3)
@given(layout_costs(), st.sampled_from((FREE, KEPT, RECOMPUTED)), st.data())
def test_no_assignment_is_faster_than_the_bound(
    costs: LayoutCosts, modes: tuple[str, ...], data: st.DataObject
) -> None:
    check_the_bound(costs, modes, data)


@examples(100, 3)
@given(any_layout_costs(), st.data())
def test_no_assignment_of_any_schedule_is_faster_than_the_bound(
    costs_and_modes: tuple[LayoutCosts, tuple[str, ...]], data: st.DataObject
) -> None:
    check_the_bound(*costs_and_modes, data)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout_costs(), st.sampled_from((FREE, KEPT, RECOMPUTED)))
def test_more_memory_never_raises_the_bound(costs: LayoutCosts, modes: tuple[str, ...]) -> None:
    bounds = [lower_bound(costs, limit, modes) for limit in (50.0, 200.0, 500.0, 1e4, 1e6)]
    reached = [math.inf if bound is None else bound for bound in bounds]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < math.inf


def test_the_bound_is_the_step_without_a_pipeline() -> None:
    question = small_question(devices=1)
    costs = CostModel(question.model, question.cluster, question.hardware, question.job).price(Layout())
    bound = lower_bound(costs, 1e12, FREE)
    assert bound is not None
    assert first_assignment(costs, 1e12, FREE) == counts((4, 0))
    assert bound == pytest.approx(costs.step(counts((4, 0))), rel=1e-12)


def test_the_bound_is_the_textbook_makespan_for_equal_stages() -> None:
    """4 stages of one block each, f = 1 and b = 2, free sends: (M + p - 1)(f + b) = 11 · 3."""
    nothing, none = PartSeconds(), PartMemory(MemoryBytes(), MemoryBytes(), MemoryBytes(), 0.0, 0.0)
    layer = PartSeconds(forward=Seconds(1.0), backward_input=Seconds(2.0), recompute_full=Seconds(1.0))
    costs = LayoutCosts(
        layout=Layout(pp=4),
        microbatches=8,
        segments=(SegmentCosts("dense", 4, layer, replace(none, held=MemoryBytes(activations=10.0))),),
        embedding=nothing,
        head=nothing,
        microbatch=nothing,
        hop_seconds=(0.0,) * 3,
        step_seconds=0.5,
        embedding_memory=none,
        head_memory=none,
        fixed_memory=(MemoryBytes(),) * 4,
        in_flight=tuple((InFlight((n,), (0,)),) for n in (4, 3, 2, 1)),
        allocator_slack=0.0,
    )
    assert lower_bound(costs, 40.0, FREE) == 33.5
    assert first_assignment(costs, 40.0, FREE) == counts(*[(1, 0)] * 4)
    # One byte less and the first stage recomputes. Its round trip: 12 for microbatch 0, then 7 backwards, the
    # 4 forwards left after its first backward, and 8 more forwards.
    assert lower_bound(costs, 39.0, FREE) == 12 + 7 * 2 + 4 + 8 + 0.5
    assert first_assignment(costs, 39.0, FREE)[0] == (Blocks(full=1),)
    # Without recomputation the first stage holds no block, and the last, with one in flight, takes two.
    moved, bound = fastest(list(priced(costs, KEPT)), 39.0), lower_bound(costs, 39.0, KEPT)
    assert moved is not None
    assert bound is not None
    assert moved.counts == counts((0, 0), (1, 0), (1, 0), (2, 0))
    assert bound <= moved.step_seconds
    assert lower_bound(costs, 29.0, KEPT) is None  # the second stage needs a block, and 30 bytes for it


def one_block_stage(state: float, held: float, recomputed: float) -> LayoutCosts:
    """One stage, one microbatch, a second to recompute; bytes of a block as given."""
    nothing, none = PartSeconds(), PartMemory(MemoryBytes(), MemoryBytes(), MemoryBytes(), 0.0, 0.0)
    return LayoutCosts(
        layout=Layout(),
        microbatches=1,
        segments=(
            SegmentCosts(
                "dense",
                1,
                PartSeconds(recompute_full=Seconds(1.0)),
                PartMemory(
                    MemoryBytes(weights=state),
                    MemoryBytes(activations=held),
                    MemoryBytes(activations=recomputed),
                    0.0,
                    0.0,
                ),
            ),
        ),
        embedding=nothing,
        head=nothing,
        microbatch=nothing,
        hop_seconds=(0.0,) * 3,
        step_seconds=1.0,
        embedding_memory=none,
        head_memory=none,
        fixed_memory=(MemoryBytes(),),
        in_flight=((InFlight((1,), (0,)),),),
        allocator_slack=0.0,
    )


def test_a_limit_met_exactly_is_met_with_recomputation_pinned() -> None:
    costs = one_block_stage(3.0, 1.9, 0.0)
    assert fits(costs, counts((0, 1)), 3.0)
    assert lower_bound(costs, 3.0, FREE) is not None
    assert lower_bound(costs, 3.0, RECOMPUTED) is not None


@pytest.mark.parametrize(
    ("limit", "modes", "least"),
    [
        (1000.0, FREE, [0, 0, 0, 0]),
        (100.0, FREE, [0, 0, 0, 2]),  # a block holds 40 bytes and gives 30 back: 4 are 60 too many
        (99.0, FREE, [0, 0, 0, 3]),
        (40.0, FREE, [0, 0, 2, 4]),
        (39.0, FREE, [0, 1, 2, None]),
        (40.0, KEPT, [0, 0, None, None]),
        (40.0, RECOMPUTED, [0, 1, 2, 4]),
        (39.0, RECOMPUTED, [0, 1, 2, None]),
        (-1.0, FREE, [None, None, None, None]),
    ],
)
def test_the_fewest_recomputed_blocks_that_fit(limit: float, modes: tuple[str, ...], least: list[int | None]) -> None:
    costs = one_block_stage(5.0, 35.0, 5.0)
    limits = RankLimits(costs, costs.segments[0], [Moment(0.0, 1)], limit, modes)
    assert [limits.least_recompute(blocks) for blocks in (0, 1, 2, 4)] == least


def test_the_ends_of_a_rank_and_its_layers_are_most_at_different_moments() -> None:
    """ZB1P, 2 ranks of 3 chunks: rank 0 peaks for its embedding at (4, 2, 0) in flight, where chunk 2 holds nothing."""
    costs = one_block_stage(0.0, 1.0, 1.0)
    limits = RankLimits(costs, costs.segments[0], [Moment(4.0, 0), Moment(2.0, 2)], 6.0, KEPT)
    assert limits.least_recompute(2) == 0.0  # 4 and 2 + 2·2
    assert limits.least_recompute(3) is None  # 2 + 3·2


def test_what_fits_allows_the_rounding_of_a_sum_and_no_more() -> None:
    question = small_question(devices=1)
    costs = CostModel(question.model, question.cluster, question.hardware, question.job).price(Layout())
    chosen = counts((4, 0))
    need = costs.memory(chosen)[0].total
    assert fits(costs, chosen, need)
    assert fits(costs, chosen, need * (1 - 1e-12))
    assert not fits(costs, chosen, need * (1 - 1e-8))


@pytest.mark.parametrize("layers", [2, 4])
def test_what_is_missing_is_missing_in_the_best_case(layers: int) -> None:
    """Said to the user as "misses X" and "what would make it fit": X more must be needed, and enough."""
    # With more chunks it is no more than that of an even assignment.
    question = small_question(tiny_llama(layers=layers), devices=layers, pins={"virtual_stages": 1})
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    for layout, tried in candidates(question).items():
        modes = recompute_modes(layout, question.rules)
        _, missing = missing_bytes(*roomiest_assignment(prices.price(layout), 1000.0, modes), 1000.0)
        assert missing == pytest.approx(min(candidate.peak_bytes for candidate in tried) - 1000.0), layout


@pytest.mark.parametrize("pin", ["none", "full"])
def test_what_is_missing_with_recomputation_pinned(pin: str) -> None:
    question = small_question(devices=4, pins={"recompute": pin, "virtual_stages": 1})
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    for layout, tried in candidates(question).items():
        stage, missing = missing_bytes(*roomiest_assignment(prices.price(layout), 1000.0, (pin,)), 1000.0)
        assert 0 <= stage < layout.pp
        assert missing == pytest.approx(min(candidate.peak_bytes for candidate in tried) - 1000.0), layout


@pytest.mark.parametrize(
    "pins", [{"virtual_stages": 1}, {"virtual_stages": 1, "recompute": "none"}], ids=["free", "kept"]
)
def test_the_closest_layout_misses_least_and_is_where_a_remedy_starts(pins: dict[str, object]) -> None:
    """Of all layouts: what it misses more of memory is enough, and a search that starts there is no worse."""
    question = small_question(devices=4, pins=pins, memory_limit_bytes=1000.0)
    least = min(one.peak_bytes for tried in candidates(question).values() for one in tried)
    why = what_forbids(question)
    assert why.missing_bytes == pytest.approx(least - 1000.0)
    assert why.closest is not None
    enough = replace(question, job=replace(question.job, memory_limit_bytes=least * (1 + 1e-9)))
    assert fits(why.closest.costs, why.closest.counts, enough.limit_bytes)
    fastest_then, from_there = best_plan(enough), best_plan(enough, 1, 0.0, why.closest)
    assert fastest_then is not None
    assert from_there is not None
    assert from_there.prediction.step_seconds <= why.closest.step_seconds * (1 + 1e-9)
    assert fastest_then.prediction.step_seconds <= from_there.prediction.step_seconds * (1 + 1e-9)
    assert from_there.certificate.bound_seconds <= fastest_then.prediction.step_seconds * (1 + 1e-9)


def test_without_time_the_search_answers_with_what_is_known_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    question = small_question(devices=4, memory_limit_bytes=1000.0)
    why = what_forbids(question)
    assert why.missing_bytes is not None
    assert why.closest is not None
    monkeypatch.setattr("planner.guesses.Guesses.plain", lambda *_: None)
    question = replace(question, job=replace(question.job, memory_limit_bytes=2 * (1000.0 + why.missing_bytes)))
    best, plan = best_plan(question), best_plan(question, 1, 0.0, why.closest)
    assert best is not None
    assert plan is not None
    assert best.prediction.step_seconds < plan.prediction.step_seconds
    assert (plan.layout, plan.certificate.ilps_solved) == (why.closest.costs.layout, 0)
    assert plan.certificate.bound_seconds < plan.prediction.step_seconds


MODES_OF_LAYER = {"none": (0.0, 40.0), "selective": (1.0, 28.0), "full": (3.0, 5.0)}  # seconds, bytes in flight


def layers_of_a_rank() -> LayoutCosts:
    """One stage whose layer has 10 bytes of state and `MODES_OF_LAYER`."""
    one = one_block_stage(10.0, 40.0, 5.0)
    segment = one.segments[0]
    seconds = replace(segment.seconds, recompute_selective=Seconds(1.0), recompute_full=Seconds(3.0))
    memory = replace(segment.memory, held_selective=MemoryBytes(activations=28.0))
    return replace(one, segments=(replace(segment, seconds=seconds, memory=memory),))


def least_by_trying(vectors: list[tuple[int, ...]], certain: list[int], layers: int, limit: float) -> float:
    """Seconds of recomputation of the layers of a rank with these chunks' microbatches in flight at each moment."""
    chunks, least = range(len(vectors[0])), math.inf
    for places in combinations_with_replacement(product(chunks, MODES_OF_LAYER), layers):
        if set(certain) <= {chunk for chunk, _ in places}:
            moments = [sum(10.0 + vector[c] * MODES_OF_LAYER[mode][1] for c, mode in places) for vector in vectors]
            if max(moments) <= limit:
                least = min(least, sum(MODES_OF_LAYER[mode][0] for _, mode in places))
    return least


@pytest.mark.parametrize("vectors", [[(4, 1)], [(2, 2)], [(3, 0), (1, 2)], [(4, 2, 1)], [(3, 3, 0), (2, 1, 2)]])
@pytest.mark.parametrize("certain", [[], [0], [0, 1]])
def test_layers_of_certain_chunks_have_their_own_in_flight(vectors: list[tuple[int, ...]], certain: list[int]) -> None:
    """Never above what trying everything finds, with the same in flight in all chunks just that, and the more is
    certain the higher."""
    costs, layers, found = layers_of_a_rank(), 3, []
    for limit in range(30, 600, 15):
        moments = [Moment(0.0, min(v), held=tuple(sorted(v[c] for c in certain))) for v in vectors]
        limits = RankLimits(costs, costs.segments[0], moments, float(limit), tuple(MODES_OF_LAYER))
        bound, best = limits.least_recompute(layers), least_by_trying(vectors, certain, layers, limit)
        reached = math.inf if bound is None else bound
        assert reached <= best, (limit, vectors, certain)
        if vectors == [(2, 2)]:
            assert reached == best, limit
        found.append(reached)
    assert found == sorted(found, reverse=True)
    if certain and min(vectors[0]) < max(vectors[0]):
        free = [Moment(0.0, min(v)) for v in vectors]
        uncertain = RankLimits(costs, costs.segments[0], free, 200.0, tuple(MODES_OF_LAYER)).least_recompute(layers)
        assert uncertain is not None
        assert found[(200 - 30) // 15] >= uncertain


def test_which_chunks_are_certain_to_hold_a_layer_of_the_segment() -> None:
    """8 stages and layers 2 + 7: stage 1 may hold a layer of the first two, 2 too, all later inner ones may not."""
    costs = one_block_stage(1.0, 1.0, 1.0)
    first, second = (replace(costs.segments[0], kind=kind, layers=n) for kind, n in (("dense", 2), ("moe", 7)))
    costs = replace(costs, layout=Layout(pp=4, schedule="interleaved-1f1b", virtual_stages=2), microbatches=4)
    mixed = replace(costs, segments=(first, second))
    assert certain_chunks(mixed, second) == [[1], [1], [1], [0]]
    assert certain_chunks(mixed, first) == [[], [], [], []]
    assert certain_chunks(replace(costs, segments=(second,)), second) == [[1], [0, 1], [0, 1], [0]]


def test_a_group_of_one_state_is_bounded_in_that_state() -> None:
    """Zero 3 is a group of its own under a pipeline; what its base says of zero is not its state."""
    hardware = small_hardware(fsdp_backward_overhead_seconds=1e-3)
    question = small_question(devices=4, hardware=hardware, precision="bf16")
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    groups = [group for group in layout_groups(question.rules) if [state[0] for state in group.states] == [3]]
    bounds = GroupBounds(prices, question)
    assert len(groups) == 5
    for group in groups:
        alike = bounds.alike(group)
        fastest_of_group = min(one.least_seconds for one in alike)
        again = bounds.alike(replace(group, base=next(iter(group))))
        assert [(one.group.pipelines, one.least_seconds) for one in again] == [
            (one.group.pipelines, one.least_seconds) for one in alike
        ]
        for layout in group:
            bound = lower_bound(prices.price_seconds(layout), math.inf, recompute_modes(layout, question.rules))
            assert bound is not None
            assert fastest_of_group <= bound * (1 + 1e-12)


def test_a_group_above_what_is_asked_is_above_it_without_being_dealt() -> None:
    """`enough_seconds` decides which groups are opened: by it a group is above or not as by its whole bound."""
    question = small_question(tiny_llama(layers=12), devices=8)
    bounds = GroupBounds(CostModel(question.model, question.cluster, question.hardware, question.job), question)
    above = within = 0
    for whole in layout_groups(question.rules):
        for group in one_state_each(whole):
            bound = bounds.least_of_one_state(group)
            if bound is None:
                continue
            for enough in (0.5 * bound, 0.99 * bound, 1.01 * bound):
                found = bounds.least_of_one_state(group, enough)
                assert found is not None
                assert found == bound if bound < enough else enough < found <= bound
                above, within = above + (bound > enough), within + (bound < enough)
    assert above > 100
    assert within > 50
