"""The event simulation against torch's own loops and lists, closed forms, its laws, and the paths that bound it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.event_graph import GraphCache
from planner.schedule import Pipeline, action_lists, why_illegal
from planner.simulation import Path, StageSeconds, blocked_sends, known_paths, late_forwards, simulate
from tests.oracles.torch_lists import LISTED, torch_listed_seconds
from tests.oracles.torch_loops import torch_seconds
from tests.test_schedule import LEGAL, pipelines
from tests.thinned import examples

seconds = st.floats(0.0, 10.0, allow_nan=False).map(lambda value: round(value, 3))
stage_seconds = st.builds(StageSeconds, seconds, seconds, seconds, gather=st.just(0.0) | seconds, reduce=seconds)
UP = 1 + 1e-12


def hops_of(pipeline: Pipeline) -> st.SearchStrategy[list[float]]:
    hops = pipeline.stages - 1
    return (st.just(0.0) | seconds).map(lambda one: [one] * hops) | st.lists(seconds, min_size=hops, max_size=hops)


def free(pipeline: Pipeline) -> list[float]:
    return [0.0] * (pipeline.stages - 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pipeline, list[StageSeconds], list[float]]:
    """(pipeline, durations per stage, seconds of each hop: none, alike or of any kind)."""
    pipeline = replace(draw(pipelines(most_microbatches=13)), receives_early=draw(st.booleans()))
    durations = draw(st.lists(stage_seconds, min_size=pipeline.stages, max_size=pipeline.stages))
    return pipeline, durations, draw(hops_of(pipeline))


def equal(pipeline: Pipeline, forward: float, backward_input: float, backward_weight: float) -> float:
    """Seconds with all stages alike and free sends."""
    durations = [StageSeconds(forward, backward_input, backward_weight)] * pipeline.stages
    return simulate(pipeline, durations, free(pipeline)).seconds


# ---- torch -----------------------------------------------------------------------------------------------


@examples(250, 2)
@given(cases())
def test_the_simulation_is_torchs_loops_and_lists(case: tuple[Pipeline, list[StageSeconds], list[float]]) -> None:
    pipeline, durations, hops = case
    if pipeline.schedule in LISTED:
        expected = torch_listed_seconds(pipeline, durations, hops)
    else:
        early = pipeline.receives_early
        expected = torch_seconds(pipeline.schedule, durations, pipeline.microbatches, hops, early=early)
    assert simulate(pipeline, durations, hops).seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline("interleaved-1f1b", 8, 5, 16),
        Pipeline("zb1p", 8, 4, 16),
        Pipeline("zbv", 8, 2, 20),
        Pipeline("dualpipev", 8, 2, 20),
        Pipeline("looped-bfs", 4, 5, 8),
    ],
)
def test_eight_ranks_and_more_chunks_than_torch_gathers_ahead(pipeline: Pipeline) -> None:
    """With more than three stages a rank torch gathers and frees weights on the way, and receives stand elsewhere."""
    durations = [StageSeconds(1.0 + s % 3, 1.5, 1.0 + s % 2, 0.25, 0.5 * (s % 4)) for s in range(pipeline.stages)]
    for send, slower in ((0.0, 0.0), (0.7, 0.7), (0.7, 5.0)):
        hops = [slower if hop % 3 == 1 else send for hop in range(pipeline.stages - 1)]
        expected = torch_listed_seconds(pipeline, durations, hops)
        assert simulate(pipeline, durations, hops).seconds == pytest.approx(expected)


# ---- by hand and closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [pipeline for pipeline in LEGAL if pipeline.ranks == 1])
def test_without_a_pipeline_the_seconds_add_up(pipeline: Pipeline) -> None:
    chunks, count = pipeline.chunks, pipeline.microbatches
    simulation = simulate(pipeline, [StageSeconds(2.0, 2.0, 1.0, 0.5, 0.25)] * chunks, [9.0] * (chunks - 1))
    assert simulation.seconds == pytest.approx(chunks * (0.5 + count * 5.0 + 0.25))
    once, each = (1,) * chunks, (count,) * chunks
    assert simulation.critical_path == Path(each, each, each, once, once, (0,) * (chunks - 1))
    assert simulation.busy_seconds == pytest.approx((simulation.seconds,))


def test_two_stages_by_hand() -> None:
    """f = b = 1, a send 0.5, 2 microbatches; a transfer starts when both sides have posted it.

    1F1B  0: F0 0-1, F1 1-2, waits for the exchange, B0 4-5, B1 6.5-7.5
          1: F0 1.5-2.5, B0 2.5-3.5, exchange 3.5-4, F1 4-5, B1 5-6
    GPipe 0: F0 0-1, F1 1-2, B0 5.5-6.5, asks for the second gradient only then, B1 7-8
          1: F0 1.5-2.5, asks for the second input only then, F1 3-4, B0 4-5, B1 5-6
    """
    two = [StageSeconds(1.0, 1.0, 0.0)] * 2
    assert simulate(Pipeline("1f1b", 2, 1, 2), two, [0.5]).seconds == pytest.approx(7.5)
    assert simulate(Pipeline("gpipe", 2, 1, 2), two, [0.5]).seconds == pytest.approx(8.0)


def test_three_stages_with_a_slow_hop_by_hand() -> None:
    """f = b = 1, 2 microbatches, 0.5 between stages 0 and 1 and 3 between 1 and 2; receives are posted early.

    GPipe 1: F0 1.5-2.5, F1 2.5-3.5;  2: F0 5.5-6.5, F1 after the message that waited for the first 8.5-9.5
          2: B0 9.5-10.5, B1 10.5-11.5;  1: B0 13.5-14.5, B1 16.5-17.5;  0: B0 15-16, B1 18-19
    """
    three = [StageSeconds(1.0, 1.0, 0.0)] * 3
    simulation = simulate(Pipeline("gpipe", 3, 1, 2, receives_early=True), three, [0.5, 3.0])
    assert simulation.seconds == pytest.approx(19.0)
    path = simulation.critical_path
    assert path.sends == (2, 4)
    assert path.sent_seconds([0.5, 3.0]) == pytest.approx(13.0)


def test_a_pipeline_s_messages_are_those_of_its_hops() -> None:
    """One microbatch passes each hop once each way; round two ranks, or down and back up in a V."""
    each = [StageSeconds(1.0, 1.0, 0.0)] * 4
    for pipeline, hops, sent in (
        (Pipeline("gpipe", 4, 1, 1), [1.0, 10.0, 100.0], 222.0),
        (Pipeline("looped-bfs", 2, 2, 1), [1.0, 10.0, 100.0], 222.0),
        (Pipeline("zbv", 2, 2, 1), [1.0, 10.0, 100.0], 202.0),  # stages 1 and 2 are of one rank
    ):
        assert simulate(pipeline, each, hops).critical_path.sent_seconds(hops) == pytest.approx(sent), pipeline


@pytest.mark.parametrize("slow", [0.2, 1.5, 7.0])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_equal_stages_with_unequal_hops_have_closed_forms(ranks: int, slow: float) -> None:
    """GPipe is a line of queues twice over: stages and hops each serve one microbatch at a time.

    1F1B of two stages: each action but the first waits for the message of the one before.
    """
    count, hops = 6, [0.1 + 0.1 * hop for hop in range(ranks - 1)]
    hops[ranks // 2 - 1] = slow
    durations = [StageSeconds(1.0, 1.5, 0.5)] * ranks
    queues = sum(ranks * each + sum(hops) + (count - 1) * max(each, *hops) for each in (1.0, 2.0))
    early = Pipeline("gpipe", ranks, 1, count, receives_early=True)
    assert simulate(early, durations, hops).seconds == pytest.approx(queues)
    two = simulate(Pipeline("1f1b", 2, 1, count), durations[:2], [slow])
    assert two.seconds == pytest.approx((count + 1) * (3.0 + slow))


def test_a_rank_waits_for_its_last_gradient_but_one_too() -> None:
    """In 1F1B's cool-down; it shows where a stage below has much to reduce and cannot send before."""
    stages = [(5.0, 9.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.1, 50.0), (1.0, 1.0, 0.0)]
    durations = [StageSeconds(forward, backward, 0.0, 0.0, reduce) for forward, backward, reduce in stages]
    assert simulate(Pipeline("1f1b", 4, 1, 5), durations, [0.0] * 3).seconds == pytest.approx(93.0)


@pytest.mark.parametrize("pipeline", [p for p in LEGAL if p.schedule in ("gpipe", "1f1b")])
def test_equal_stages_and_free_sends_have_the_textbook_makespan(pipeline: Pipeline) -> None:
    """(M + p - 1)(f + b), arXiv 2104.04473 section 2.2, for both."""
    assert equal(pipeline, 2.0, 2.0, 1.0) == pytest.approx((pipeline.microbatches + pipeline.ranks - 1) * 5.0)


@pytest.mark.parametrize(("ranks", "chunks", "rounds"), [(2, 2, 1), (4, 2, 3), (4, 4, 2), (8, 3, 4)])
@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "looped-bfs"])
def test_chunks_divide_the_bubble(schedule: str, ranks: int, chunks: int, rounds: int) -> None:
    """Bubble over work (p-1)/(v·M), arXiv 2104.04473 section 2.2."""
    pipeline = Pipeline(schedule, ranks, chunks, ranks * rounds)
    simulation = simulate(pipeline, [StageSeconds(1.0, 1.0, 1.0)] * pipeline.stages, free(pipeline))
    work = 3.0 * chunks * pipeline.microbatches
    assert simulation.seconds / work - 1 == pytest.approx((ranks - 1) / (chunks * pipeline.microbatches))
    share = 1 - work / simulation.seconds
    assert simulation.bubble == pytest.approx((share,) * ranks)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16), (8, 24)])
def test_zero_bubble_closed_forms(ranks: int, microbatches: int) -> None:
    """With T_F = T_I = T_W = 1 and free sends (arXiv 2401.10241).

    The paper's ZB-H1 has a bubble of (p-1)(T_F + T_I - T_W), a third of 1F1B's, and ZB-V none within the list of a
    rank: what is left is the last rank's wait for its first input.
    """
    work = 3.0 * microbatches
    assert equal(Pipeline("zb1p", ranks, 1, microbatches), 1.0, 1.0, 1.0) == pytest.approx(work + ranks - 1)
    assert equal(Pipeline("zbv", ranks, 2, microbatches), 1.0, 1.0, 1.0) == pytest.approx(2 * work + ranks - 1)


# ---- laws ------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_the_critical_path_is_the_makespan_and_bounds_every_other_assignment(
    case: tuple[Pipeline, list[StageSeconds], list[float]], data: st.DataObject
) -> None:
    """What makes it a cut: it is a path whatever the durations are. No path known beforehand is longer either."""
    pipeline, durations, hops = case
    simulation = simulate(pipeline, durations, hops)
    path = simulation.critical_path
    assert path.seconds(durations, hops) == pytest.approx(simulation.seconds)
    others = data.draw(st.lists(stage_seconds, min_size=pipeline.stages, max_size=pipeline.stages))
    other_hops = data.draw(hops_of(pipeline))
    assert path.seconds(others, other_hops) <= simulate(pipeline, others, other_hops).seconds * UP
    for known in known_paths(pipeline):
        assert known.seconds(durations, hops) <= simulation.seconds * UP, known
    assert max(simulation.busy_seconds) <= simulation.seconds * UP


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 99), st.floats(0.001, 5))
def test_longer_anywhere_is_never_shorter_in_all(
    case: tuple[Pipeline, list[StageSeconds], list[float]], where: int, more: float
) -> None:
    pipeline, durations, hops = case
    before = simulate(pipeline, durations, hops).seconds
    stage = where % pipeline.stages
    slower = [seconds + more * (hop == stage) for hop, seconds in enumerate(hops)]
    assert simulate(pipeline, durations, slower).seconds >= before / UP
    for what in ("forward", "backward_input", "backward_weight", "gather", "reduce"):
        longer = list(durations)
        longer[stage] = replace(longer[stage], **{what: getattr(longer[stage], what) + more})
        assert simulate(pipeline, longer, hops).seconds >= before / UP


def test_a_simulation_does_not_depend_on_those_before() -> None:
    cache = GraphCache(most_events=500)
    first = cache.graph(Pipeline("1f1b", 4, 1, 8))
    assert cache.graph(Pipeline("1f1b", 4, 1, 8)) is first
    large = cache.graph(Pipeline("zbv", 4, 2, 32))
    assert cache.graph(Pipeline("zbv", 4, 2, 32)) is large
    again = cache.graph(Pipeline("1f1b", 4, 1, 8))
    assert again is not first
    assert (again.waits, again.costs, again.ends) == (first.waits, first.costs, first.ends)
    other = cache.graph(Pipeline("gpipe", 4, 1, 8))
    assert cache.graph(Pipeline("1f1b", 4, 1, 8)) is again
    assert cache.graph(Pipeline("gpipe", 4, 1, 8)) is other


# ---- known paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [p for p in LEGAL if p.schedule == "1f1b"])
def test_what_the_bound_counts_is_in_the_lists(pipeline: Pipeline) -> None:
    stages, count = pipeline.stages, pipeline.microbatches
    for stage, actions in enumerate(action_lists(pipeline)):
        kinds = [action.kind for action in actions]
        after_first_backward = kinds[kinds.index("B") :].count("F")
        assert late_forwards("1f1b", stage, stages, count) == after_first_backward
        assert blocked_sends("1f1b", stage, stages, count) == after_first_backward
        assert blocked_sends("gpipe", stage, stages, count) == 0
        assert late_forwards("gpipe", stage, stages, count) == count - 1


@pytest.mark.parametrize(
    ("pipeline", "share"),
    [
        (Pipeline("gpipe", 4, 1, 8), 1.0),
        (Pipeline("1f1b", 4, 1, 8), 1.0),
        (Pipeline("interleaved-1f1b", 4, 2, 8), 1.0),
        (Pipeline("looped-bfs", 4, 2, 8), 1.0),
        (Pipeline("zb1p", 4, 1, 8), 1.0),
        (Pipeline("zbv", 4, 2, 8), 1.0),
        (Pipeline("dualpipev", 4, 2, 8), 0.9),
    ],
)
def test_known_paths_are_tight_where_they_should_be(pipeline: Pipeline, share: float) -> None:
    """Equal stages: one of them is the makespan, so the program starts with no gap, or nearly."""
    assert why_illegal(pipeline) is None
    durations = [StageSeconds(1.0, 1.0, 1.0)] * pipeline.stages
    longest = max(path.seconds(durations, free(pipeline)) for path in known_paths(pipeline))
    assert longest >= share * simulate(pipeline, durations, free(pipeline)).seconds
