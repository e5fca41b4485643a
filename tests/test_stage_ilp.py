"""The program of one layout: exact against every assignment, its cut-offs, its start, its deadline, its fallback."""

from __future__ import annotations

import math
import time

import pulp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.bounds import fits, lower_bound
from planner.layout import Layout
from planner.layout_costs import LayoutCosts, StageCount
from planner.question import Question
from planner.solve_stages import Begun, SharedCuts, Solution, solve_stages
from planner.stage_ilp import RELATIVE_TOLERANCE
from tests.oracles import small_world
from tests.oracles.brute_force import assignments, fastest, priced
from tests.oracles.small_world import counts, small_cluster, small_hardware, small_question
from tests.plans import tiny_gpt2, tiny_llama
from tests.property.worlds import any_layout_costs, layout_costs
from tests.thinned import examples

FREE = ("none", "full")


def price(layout: Layout, question: Question | None = None) -> LayoutCosts:
    return small_world.price(layout, question or small_question(tiny_llama(layers=6), devices=layout.world_size))


def solve(costs: LayoutCosts, limit: float, modes: tuple[str, ...] = FREE, **changes: object) -> Solution:
    bound = lower_bound(costs, limit, modes)
    assert bound is not None
    return solve_stages(costs, limit, bound_seconds=bound, modes=modes, **changes)  # type: ignore[arg-type]


def every_of(costs: LayoutCosts, modes: tuple[str, ...] = FREE) -> list[tuple[StageCount, ...]]:
    return list(assignments([segment.layers for segment in costs.segments], costs.layout.stages, modes))


def best_of(costs: LayoutCosts, limit: float, modes: tuple[str, ...] = FREE) -> float:
    best = fastest(list(priced(costs, modes)), limit)
    return best.step_seconds if best is not None else math.inf


def needs(costs: LayoutCosts, modes: tuple[str, ...] = FREE) -> list[float]:
    """Bytes of the fullest rank of every assignment, ascending."""
    return sorted({candidate.peak_bytes for candidate in priced(costs, modes)})


# ---- exact -----------------------------------------------------------------------------------------------


def check_any_figures(costs: LayoutCosts, modes: tuple[str, ...], data: st.DataObject) -> None:
    of_all = needs(costs, FREE if modes == FREE else (*modes, "none"))
    limit = max(1.0, data.draw(st.sampled_from(of_all)) * data.draw(st.sampled_from((1 + 1e-6, 1.1, 3.0))))
    bound, best = lower_bound(costs, limit, modes), best_of(costs, limit, modes)
    if bound is None:
        assert best == math.inf
        return
    if bound == 0.0:
        return  # nothing costs anything
    solution = solve_stages(costs, limit, bound_seconds=bound, modes=modes)
    if best == math.inf:
        assert (solution.counts, solution.bound_seconds) == (None, math.inf)
        return
    assert solution.counts is not None
    assert fits(costs, solution.counts, limit)
    assert solution.step_seconds == costs.step(solution.counts) == pytest.approx(best, rel=1e-6)
    assert best * (1 - 2e-6) <= solution.bound_seconds <= solution.step_seconds


@examples(50, 3)
@given(layout_costs(), st.sampled_from((FREE, ("none",), ("full",))), st.data())
def test_any_figures_at_all(costs: LayoutCosts, modes: tuple[str, ...], data: st.DataObject) -> None:
    """Costs that no model gives rise to: free blocks, endless sends, a head of a hundred blocks."""
    check_any_figures(costs, modes, data)


@examples(50, 3)
@given(any_layout_costs(), st.data())
def test_any_figures_of_any_schedule(costs_and_modes: tuple[LayoutCosts, tuple[str, ...]], data: st.DataObject) -> None:
    check_any_figures(*costs_and_modes, data)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("position", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_every_memory_limit_from_least_to_roomy(schedule: str, position: float) -> None:
    costs = price(Layout(pp=3, dp=2, schedule=schedule), small_question(tiny_gpt2(layers=6), devices=6))
    peaks = needs(costs)
    limit = peaks[round(position * (len(peaks) - 1))]
    solution = solve(costs, limit)
    assert solution.counts is not None
    assert solution.step_seconds == pytest.approx(best_of(costs, limit), rel=1e-6)
    assert max(memory.total for memory in costs.memory(solution.counts)) <= limit * (1 + 1e-9)


def test_the_expensive_ends_get_fewer_blocks() -> None:
    """A vocabulary whose head costs more than a block."""
    costs = price(Layout(pp=3), small_question(tiny_llama(layers=6, vocab_size=1800), devices=3))
    solution = solve(costs, 1e9)
    assert solution.counts is not None
    blocks = [held.total for (held,) in solution.counts]
    assert blocks[2] < min(blocks[:2])
    assert all(held.full == 0 for (held,) in solution.counts)


def test_recomputation_comes_where_most_is_in_flight() -> None:
    costs = price(Layout(pp=3, micro_batch=1))
    even = counts(*[(2, 0)] * 3)
    limit = costs.memory(even)[0].total - 1
    solution = solve(costs, limit)
    assert solution.counts is not None
    assert solution.counts[0][0].full > 0 or solution.counts[0][0].total < 2
    assert not fits(costs, even, limit)
    assert fits(costs, solution.counts, limit)


def test_a_pinned_mode_holds_for_every_block() -> None:
    costs = price(Layout(pp=2))
    for pin in ("none", "full"):
        solution = solve(costs, 1e9, (pin,))
        assert solution.counts is not None
        assert sum(held.of(pin) for (held,) in solution.counts) == 6
        assert solution.step_seconds == pytest.approx(best_of(costs, 1e9, (pin,)), rel=1e-6)


# ---- cut-off, start, deadline ----------------------------------------------------------------------------


def tight() -> tuple[LayoutCosts, float]:
    """A layout and a limit at which the first guess does not fit and the program must work."""
    costs = price(Layout(pp=3, dp=2), small_question(tiny_gpt2(layers=6), devices=6))
    return costs, needs(costs)[20]


def test_an_answer_misses_the_limit_by_no_hair() -> None:
    """By less than the solver sees at first: of what does not fit it answers with some."""
    costs, _ = tight()
    for bytes_ in needs(costs):
        limit = bytes_ * (1 - 5e-8)
        solution = solve(costs, limit)
        assert solution.counts is None or fits(solution.costs, solution.counts, limit)
        assert solution.step_seconds == pytest.approx(best_of(costs, limit), rel=RELATIVE_TOLERANCE)


def test_a_cut_off_that_cannot_be_beaten_is_proven_so() -> None:
    costs, limit = tight()
    best = best_of(costs, limit)
    for cutoff in (best, best * (1 - 1e-4), best * 0.99):
        solution = solve(costs, limit, cutoff_seconds=cutoff)
        assert solution.counts is None
        assert solution.step_seconds == math.inf
        assert solution.bound_seconds >= cutoff * (1 - RELATIVE_TOLERANCE)
    above = solve(costs, limit, cutoff_seconds=best * 1.0001)
    assert above.counts is not None
    assert above.step_seconds == pytest.approx(best, rel=1e-6)


def test_the_best_as_a_start_stays_and_a_bad_start_is_improved() -> None:
    costs, limit = tight()
    every = [chosen for chosen in every_of(costs) if fits(costs, chosen, limit)]
    best, worst = min(every, key=costs.step), max(every, key=costs.step)
    for start in (best, worst):
        solution = solve(costs, limit, begun=Begun(start))
        assert solution.step_seconds == pytest.approx(costs.step(best), rel=1e-6)
    assert solve(costs, limit, begun=Begun(best)).counts == best


def test_what_is_put_aside_goes_on_to_the_same_answer() -> None:
    """Each time the bound rises above the aside line, with what was found so far in hand."""
    costs = price(Layout(pp=2, schedule="zb1p", virtual_stages=2))
    limit = needs(costs)[60]
    bound = lower_bound(costs, limit, FREE)
    assert bound is not None
    solution, looks = solve(costs, limit, aside_seconds=bound), 1
    while solution.aside is not None:
        more = solve_stages(
            costs,
            limit,
            bound_seconds=solution.bound_seconds,
            aside_seconds=solution.bound_seconds,
            begun=solution.aside,
            modes=FREE,
        )
        assert more.bound_seconds >= solution.bound_seconds
        assert more.step_seconds <= solution.step_seconds
        solution, looks = more, looks + 1
        assert looks < 50
    assert looks > 1
    assert solution.step_seconds == pytest.approx(best_of(costs, limit), rel=1e-6)


def test_cuts_of_another_layout_with_the_same_pipeline_change_no_answer() -> None:
    """Sequence parallelism changes durations and no path."""
    world, shared = small_question(tiny_llama(layers=6), devices=4), SharedCuts()
    for parallel in (False, True, False):
        costs = price(
            Layout(tp=2, pp=2, schedule="zb1p", virtual_stages=2, micro_batch=2, sequence_parallel=parallel), world
        )
        limit, before = needs(costs)[60], shared.of(costs.pipeline)
        solution = solve(costs, limit, shared=shared)
        assert solution.step_seconds == pytest.approx(best_of(costs, limit), rel=1e-6)
        assert solution.bound_seconds <= best_of(costs, limit) * (1 + 1e-9)
        durations = costs.durations(solution.counts or ())
        # A path is no longer than the step, whichever layout it came from.
        longest = costs.simulate(solution.counts or ()).seconds * (1 + 1e-9)
        assert all(path.seconds(durations, costs.hop_seconds) <= longest for path in before)
        assert len(shared.of(costs.pipeline)) > 0


def test_past_its_deadline_it_returns_the_start_and_what_is_proven() -> None:
    costs, limit = tight()
    bound = lower_bound(costs, limit, FREE)
    assert bound is not None
    start = max((chosen for chosen in every_of(costs) if fits(costs, chosen, limit)), key=costs.step)
    solution = solve(costs, limit, begun=Begun(start), deadline=time.monotonic() - 1)
    assert (solution.counts, solution.step_seconds, solution.ilps_solved) == (start, costs.step(start), 0)
    assert solution.bound_seconds == bound < best_of(costs, limit)
    empty = solve(costs, limit, deadline=time.monotonic() - 1)
    assert (empty.counts, empty.step_seconds, empty.bound_seconds) == (None, math.inf, bound)


def test_a_start_that_meets_the_bound_needs_no_program() -> None:
    costs = price(Layout())
    solution = solve(costs, 1e9, begun=Begun(counts((6, 0))))
    assert (solution.ilps_solved, solution.counts) == (0, counts((6, 0)))


def test_without_highs_cbc_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    costs, limit = tight()
    assert solve(costs, limit).step_seconds == pytest.approx(best_of(costs, limit), rel=1e-6)


# ---- size ------------------------------------------------------------------------------------------------


def test_eighty_layers_over_eight_stages_take_seconds() -> None:
    question = small_question(
        tiny_llama(layers=80, vocab_size=500),
        cluster=small_cluster(8, inside=(1e8, 1e-5)),
        hardware=small_hardware(),
        global_batch=64,
    )
    costs = price(Layout(pp=8), question)
    even = counts(*[(10, 0)] * 8)
    limit = 0.8 * max(memory.total for memory in costs.memory(even))
    started = time.monotonic()
    solution = solve(costs, limit)
    assert time.monotonic() - started < 30
    assert solution.counts is not None
    assert solution.bound_seconds >= solution.step_seconds * (1 - RELATIVE_TOLERANCE)
    assert sum(held.total for (held,) in solution.counts) == 80
    assert any(held.full for (held,) in solution.counts)
