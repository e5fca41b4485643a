"""The planner's answer is the one that trying everything finds: objective, feasibility, certificate and bounds.

`make test` tries a share of the questions; `make test-full` FULL_SHARE times as many.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.bounds import fits, lower_bound
from planner.errors import InfeasibleError
from planner.group_bounds import GroupBounds, one_state_each
from planner.layout import RECOMPUTE_MODES
from planner.question import Question
from planner.search import search
from planner.solve_stages import solve_stages
from planner.space import enumerate_layouts, layout_groups
from planner.step_cost import CostModel
from tests.oracles.brute_force import Candidate, candidates, fastest, modes_of
from tests.oracles.small_world import small_cluster, small_question
from tests.plans import tiny_llama
from tests.property.worlds import questions
from tests.thinned import examples

# What the solver may be off by; see stage_ilp.RELATIVE_TOLERANCE.
TOLERANCE = 1e-6
# 201 whole searches in the normal run, 1,206 in the full one, which also shrinks what fails.
FULL_SHARE = 6
TARGETS = ("meshwright", "megatron", "torchtitan")
# Actions that brute force simulates for a question of the others: they have more layouts, of fewer actions each.
ACTIONS = {"meshwright": 5_000, "megatron": 3_000, "torchtitan": 3_000}


@st.composite
def memory_limits(draw: st.DrawFn, priced: list[Candidate]) -> float:
    """Bytes from too few for anything to enough for everything, often just above or below what one candidate needs."""
    peaks = sorted({candidate.peak_bytes for candidate in priced})
    roomy = min(priced, key=lambda candidate: candidate.step_seconds).peak_bytes
    useful = [peak for peak in peaks if peak <= roomy]
    peak = draw(st.sampled_from([peaks[0], *useful, *useful[:3], roomy, peaks[-1]]))
    return peak * draw(st.sampled_from((0.5, 1 - 1e-5, 1 - 3e-8, 1.0, 1 + 1e-5, 1.01, 1.2)))


def with_limit(question: Question, limit_bytes: float) -> Question:
    return replace(question, job=replace(question.job, memory_limit_bytes=limit_bytes))


@pytest.mark.parametrize("target", TARGETS)
@examples(67, FULL_SHARE, shrink=False)
@given(data=st.data())
def test_the_plan_is_the_best_that_trying_everything_finds(target: str, data: st.DataObject) -> None:
    question = data.draw(questions(target, ACTIONS[target]))
    tried = candidates(question)
    priced = [candidate for of_layout in tried.values() for candidate in of_layout]
    if not priced:
        with pytest.raises(InfeasibleError, match=r"^no legal layout of random on "):
            search(question)
        return
    limit = data.draw(memory_limits(priced))
    question = with_limit(question, limit)
    best = fastest(priced, limit)
    if best is None:
        with pytest.raises(InfeasibleError, match=r"^nothing fits: random on "):
            search(question)
        return
    plan = search(question)
    certificate, prediction = plan.certificate, plan.prediction
    assert certificate.objective_seconds == pytest.approx(best.step_seconds, rel=TOLERANCE)
    assert prediction.step_seconds == certificate.objective_seconds
    assert certificate.gap == 0.0
    assert certificate.bound_seconds == certificate.objective_seconds
    # What was emitted is one of the candidates, with the bytes and seconds that brute force gave it.
    held = [tuple(getattr(stage, f"recompute_{mode}") for mode in RECOMPUTE_MODES) for stage in plan.stages]
    same = [
        (candidate.step_seconds, candidate.peak_bytes)
        for candidate in tried[plan.layout]
        if [tuple(sum(blocks.of(mode) for blocks in stage) for mode in RECOMPUTE_MODES) for stage in candidate.counts]
        == held
    ]
    assert (prediction.step_seconds, prediction.peak_memory_bytes) in same
    assert prediction.peak_memory_bytes <= limit * (1 + 1e-9)
    assert max(sum(items.values()) for items in prediction.memory_bytes) == pytest.approx(prediction.peak_memory_bytes)
    assert sum(prediction.breakdown_seconds.values()) == pytest.approx(prediction.step_seconds, rel=1e-12)
    assert min(prediction.breakdown_seconds.values()) >= 0
    # Every legal layout is accounted for: ruled out by memory, by its bound, or solved (the best one, at least).
    impossible = sum(fastest(of_layout, limit) is None for of_layout in tried.values())
    assert certificate.layouts_legal == len(tried)
    assert certificate.layouts_pruned_memory <= impossible, (certificate, impossible, limit)
    solved = certificate.layouts_legal - certificate.layouts_pruned_memory - certificate.layouts_pruned_bound
    assert 1 <= solved <= len(tried) - certificate.layouts_pruned_memory


def test_the_best_pipeline_with_one_slow_hop_is_found() -> None:
    """Of three hops over two nodes of two only the middle one crosses the network, and takes longer than a stage."""
    cluster = small_cluster(4, 2, across=(1e7, 1e-4))
    question = small_question(tiny_llama(layers=5), cluster=cluster, pins={"pp": 4}, global_batch=4)
    tried = candidates(question)
    best = fastest([candidate for of_layout in tried.values() for candidate in of_layout], 1e15)
    plan = search(question)
    prices = CostModel(question.model, cluster, question.hardware, question.job)
    near, network, other, *_ = prices.price_seconds(plan.layout).hop_seconds
    assert near == other < network
    assert best is not None
    assert plan.certificate.objective_seconds == pytest.approx(best.step_seconds, rel=TOLERANCE)


@pytest.mark.parametrize("target", TARGETS)
@examples(10, 15, shrink=False)
@given(data=st.data())
def test_every_layouts_bound_and_solution(target: str, data: st.DataObject) -> None:
    """Each layout alone, without a start: its bound is below its best, "does not fit" is true, the ILP is exact."""
    question = data.draw(questions(target, ACTIONS[target]))
    tried = candidates(question)
    assert list(tried) != [] or list(enumerate_layouts(question.rules)) == []
    if not tried:
        return
    limit = data.draw(memory_limits([candidate for of_layout in tried.values() for candidate in of_layout]))
    question = with_limit(question, limit)
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    bounds_of_groups = GroupBounds(prices, question)
    for group in layout_groups(question.rules):
        fastest_of_group = min(candidate.step_seconds for layout in group for candidate in tried[layout])
        assert prices.least_work(group) <= fastest_of_group * (1 + 1e-12), group
        for of_state in [group] if len(group.states) == 1 else group.by_state():
            alike = bounds_of_groups.alike(of_state)
            for layout in of_state:
                of_layout = fastest(tried[layout], limit)
                if of_layout is not None:  # then some group that is left has it
                    (own,) = (one for one in alike if layout in list(one.group))
                    bound = bounds_of_groups.least_of(own)
                    alone = bounds_of_groups.least_of_layout(layout)
                    assert bound is not None, layout
                    assert alone is not None, layout
                    assert alone <= of_layout.step_seconds * (1 + 1e-12), layout
                    assert own.least_seconds <= bound <= of_layout.step_seconds * (1 + 1e-12), layout
        for one in one_state_each(group):
            fastest_of_one = fastest([candidate for layout in one for candidate in tried[layout]], limit)
            bound = bounds_of_groups.least_of_one_state(one)
            if bound is None:
                assert fastest_of_one is None, one
            elif fastest_of_one is not None:
                assert bound <= fastest_of_one.step_seconds * (1 + 1e-12), one
            # With room for no more than its smallest assignment, the group is not said to be too large.
            least = min(candidate.peak_bytes for layout in one for candidate in tried[layout])
            with_least = GroupBounds(prices, with_limit(question, least))
            assert not with_least.states_too_large(one), one
            assert [with_least.least_of(each) is not None for each in with_least.alike(one)] == [True], one
            assert with_least.least_of_one_state(one) is not None, one
    bounds = {}
    for layout, of_layout in tried.items():
        costs, best = prices.price(layout), fastest(of_layout, limit)
        bound = lower_bound(costs, limit, modes_of(layout, question))
        if bound is None:
            assert best is None, layout
        elif best is not None:
            assert bound <= best.step_seconds * (1 + 1e-9), layout
        if bound is not None and layout.pp > 1:
            bounds[layout] = (costs, bound, best)
    for layout in (
        data.draw(st.lists(st.sampled_from(list(bounds)), min_size=1, max_size=4, unique=True)) if bounds else ()
    ):
        costs, bound, best = bounds[layout]
        solution = solve_stages(costs, limit, bound_seconds=bound, modes=modes_of(layout, question))
        if best is None:
            assert (solution.counts, solution.bound_seconds) == (None, float("inf"))
            continue
        assert solution.counts is not None, layout
        assert fits(solution.costs, solution.counts, limit)
        assert solution.step_seconds == solution.costs.step(solution.counts)
        assert solution.step_seconds == pytest.approx(best.step_seconds, rel=TOLERANCE)
        assert best.step_seconds * (1 - 2 * TOLERANCE) <= solution.bound_seconds <= solution.step_seconds


@examples(15, FULL_SHARE, shrink=False)
@given(data=st.data())
def test_pins_and_bans_are_kept_and_never_make_it_better(data: st.DataObject) -> None:
    free = data.draw(questions())
    job = free.job
    if not (tried := candidates(free)):
        return
    limit = data.draw(memory_limits([candidate for of_layout in tried.values() for candidate in of_layout]))
    layout = data.draw(st.sampled_from(list(tried)))
    values = vars(layout) | {"recompute": job.pins.get("recompute", data.draw(st.sampled_from(("none", "full"))))}
    keys = ("tp", "pp", "dp", "sequence_parallel", "zero", "micro_batch", "schedule", "recompute")
    more = {key: values[key] for key in data.draw(st.lists(st.sampled_from(keys), unique=True, max_size=3))}
    pins = job.pins | more
    bans = tuple(data.draw(st.lists(st.sampled_from(("tp", "pp", "dp", "zero", "recompute")), unique=True, max_size=1)))
    pinned = with_limit(replace(free, job=replace(job, pins=pins, bans=bans)), limit)
    if "recompute" in bans and pins.get("recompute", "none") != "none":
        return
    best = fastest([c for of_layout in candidates(pinned).values() for c in of_layout], limit)
    if best is None:
        with pytest.raises(InfeasibleError):
            search(pinned)
        return
    plan = search(pinned)
    assert plan.prediction.step_seconds == pytest.approx(best.step_seconds, rel=TOLERANCE)
    assert plan.prediction.step_seconds >= search(with_limit(free, limit)).prediction.step_seconds * (1 - TOLERANCE)
    for key, value in pins.items():
        if key == "recompute":
            assert all(getattr(stage, f"recompute_{value}") == stage.end - stage.first for stage in plan.stages)
        else:
            assert getattr(plan.layout, key) == value
    for key in bans:
        if key == "recompute":
            assert all(stage.recompute_full == 0 for stage in plan.stages)
        else:
            assert getattr(plan.layout, key) == (key != "zero")
