"""Action lists, in-flight counts, the event simulation against torch's own loops, and the paths that bound it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedule import (
    StageSeconds,
    action_lists,
    blocked_sends,
    in_flight,
    known_paths,
    late_forwards,
    simulate,
)
from tests.oracles.torch_loops import torch_seconds

SCHEDULES = ("gpipe", "1f1b")
PIPELINES = [(p, m) for p in range(1, 7) for m in range(1, 10)]


def text(schedule: str, stages: int, microbatches: int) -> list[str]:
    return [" ".join(map(str, actions)) for actions in action_lists(schedule, stages, microbatches)]


# ---- lists -----------------------------------------------------------------------------------------------


def test_gpipe_as_text() -> None:
    assert text("gpipe", 2, 3) == ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]


def test_1f1b_as_text() -> None:
    assert text("1f1b", 3, 4) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    assert text("1f1b", 1, 3) == ["0F0 0B0 0F1 0B1 0F2 0B2"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), PIPELINES)
def test_every_action_is_there_once_and_forward_comes_first(schedule: str, stages: int, microbatches: int) -> None:
    lists = action_lists(schedule, stages, microbatches)
    assert len(lists) == stages
    for stage, actions in enumerate(lists):
        words = [(action.stage, action.kind, action.microbatch) for action in actions]
        assert sorted(words) == sorted((stage, kind, i) for kind in "FB" for i in range(microbatches))
        assert len(words) == 2 * microbatches
        for i in range(microbatches):
            assert words.index((stage, "F", i)) < words.index((stage, "B", i))
        for kind in "FB":  # microbatches in order, which torch's point-to-point relies on
            assert [i for _, k, i in words if k == kind] == list(range(microbatches))


@pytest.mark.parametrize(("stages", "microbatches"), PIPELINES)
def test_in_flight_closed_forms(stages: int, microbatches: int) -> None:
    assert in_flight("gpipe", stages, microbatches) == [microbatches] * stages
    assert in_flight("1f1b", stages, microbatches) == [min(microbatches, stages - s) for s in range(stages)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(p, m) for p, m in PIPELINES if m >= p > 1])
def test_the_lists_are_torchs(schedule: str, stages: int, microbatches: int) -> None:
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    name = {"gpipe": "GPipe", "1f1b": "1F1B"}[schedule]
    theirs = [
        " ".join(str(action) for action in actions if action is not None and "REDUCE" not in str(action))
        for actions in get_schedule_ops(name, stages, microbatches)
    ]
    ours = text(schedule, stages, microbatches)
    if schedule == "1f1b":
        # torch 2.13 numbers the last stage's forwards from 1: its validator refuses its own list.
        assert theirs.pop() != ours.pop()
    assert theirs == ours


# ---- simulation ------------------------------------------------------------------------------------------

durations = st.floats(0.0, 10.0, allow_nan=False).map(lambda seconds: round(seconds, 3))
stage_seconds = st.builds(
    StageSeconds, forward=durations, backward=durations, gather=st.just(0.0) | durations, reduce=durations
)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[str, list[StageSeconds], int, float]:
    """(schedule, durations per stage, microbatches, seconds of a send); 1F1B with M >= p as torch wants."""
    schedule = draw(st.sampled_from(SCHEDULES))
    stages = draw(st.integers(1, 6))
    microbatches = draw(st.integers(stages if schedule == "1f1b" else 1, 10))
    return (
        schedule,
        draw(st.lists(stage_seconds, min_size=stages, max_size=stages)),
        microbatches,
        draw(st.just(0.0) | durations),
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 7])
def test_without_a_pipeline_the_seconds_add_up(schedule: str, microbatches: int) -> None:
    stage = StageSeconds(forward=2.0, backward=3.0, gather=0.5, reduce=0.25)
    simulation = simulate(schedule, [stage], microbatches, send_seconds=9.0)
    assert simulation.seconds == pytest.approx(0.5 + microbatches * 5.0 + 0.25)
    path = simulation.critical_path
    assert (path.forward, path.backward, path.gather, path.reduce, path.sends) == (
        (microbatches,),
        (microbatches,),
        (1,),
        (1,),
        0,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(p, m) for p, m in PIPELINES if m >= p])
def test_equal_stages_and_free_sends_have_the_textbook_makespan(schedule: str, stages: int, microbatches: int) -> None:
    """(M + p - 1)(f + b), arXiv 2104.04473 section 2.2, for both."""
    simulation = simulate(schedule, [StageSeconds(2.0, 3.0)] * stages, microbatches, send_seconds=0.0)
    assert simulation.seconds == pytest.approx((microbatches + stages - 1) * 5.0)


def test_two_stages_by_hand() -> None:
    """f = b = 1, a send 0.5, 2 microbatches; a transfer starts when both sides have posted it.

    1F1B  0: F0 0-1, F1 1-2, waits for the exchange, B0 4-5, B1 6.5-7.5
          1: F0 1.5-2.5, B0 2.5-3.5, exchange 3.5-4, F1 4-5, B1 5-6
    GPipe 0: F0 0-1, F1 1-2, B0 5.5-6.5, asks for the second gradient only then, B1 7-8
          1: F0 1.5-2.5, asks for the second input only then, F1 3-4, B0 4-5, B1 5-6
    """
    two = [StageSeconds(1.0, 1.0)] * 2
    assert simulate("1f1b", two, 2, 0.5).seconds == pytest.approx(7.5)
    assert simulate("gpipe", two, 2, 0.5).seconds == pytest.approx(8.0)


def test_a_rank_waits_for_its_last_gradient_but_one_too() -> None:
    """In 1F1B's cool-down; it shows where a stage below has much to reduce and cannot send before."""
    stages = [(5.0, 9.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.1, 50.0), (1.0, 1.0, 0.0)]
    durations = [StageSeconds(forward, backward, 0.0, reduce) for forward, backward, reduce in stages]
    expected = torch_seconds("1f1b", durations, 5, 0.0)
    assert simulate("1f1b", durations, 5, 0.0).seconds == pytest.approx(expected)
    assert expected == pytest.approx(93.0)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pipelines())
def test_the_simulation_is_torchs_loops(pipeline: tuple[str, list[StageSeconds], int, float]) -> None:
    schedule, stages, microbatches, send = pipeline
    assert simulate(schedule, stages, microbatches, send).seconds == pytest.approx(
        torch_seconds(schedule, stages, microbatches, send)
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pipelines())
def test_the_critical_path_is_as_long_as_the_makespan_and_no_known_path_is_longer(
    pipeline: tuple[str, list[StageSeconds], int, float],
) -> None:
    schedule, stages, microbatches, send = pipeline
    simulation = simulate(schedule, stages, microbatches, send)
    assert simulation.critical_path.seconds(stages, send) == pytest.approx(simulation.seconds)
    for path in known_paths(schedule, len(stages), microbatches):
        assert path.seconds(stages, send) <= simulation.seconds * (1 + 1e-12), path


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pipelines(), st.lists(stage_seconds, min_size=6, max_size=6), durations)
def test_a_critical_path_bounds_every_other_assignment(
    pipeline: tuple[str, list[StageSeconds], int, float], others: list[StageSeconds], other_send: float
) -> None:
    """What makes it a cut: it is a path whatever the durations are (with gathers, which make an event only if > 0)."""
    schedule, stages, microbatches, send = pipeline
    path = simulate(schedule, stages, microbatches, send).critical_path
    others = others[: len(stages)]
    seconds = simulate(schedule, others, microbatches, other_send).seconds
    assert path.seconds(others, other_send) <= seconds * (1 + 1e-12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    pipelines(),
    st.integers(0, 5),
    st.sampled_from(("forward", "backward", "gather", "reduce", "send")),
    st.floats(0.001, 5),
)
def test_longer_anywhere_is_never_shorter_in_all(
    pipeline: tuple[str, list[StageSeconds], int, float], where: int, what: str, more: float
) -> None:
    schedule, stages, microbatches, send = pipeline
    before = simulate(schedule, stages, microbatches, send).seconds
    if what == "send":
        send += more
    else:
        where %= len(stages)
        stages = list(stages)
        stages[where] = replace(stages[where], **{what: getattr(stages[where], what) + more})
    assert simulate(schedule, stages, microbatches, send).seconds >= before * (1 - 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8, 16])
def test_nothing_deadlocks(schedule: str, stages: int) -> None:
    unequal = [StageSeconds(1.0 + s % 3, 2.0 - s % 2) for s in range(stages)]
    for microbatches in (stages, stages + 1, 2 * stages + 3):
        assert simulate(schedule, unequal, microbatches, 0.1).seconds > 0


@pytest.mark.parametrize(("stages", "microbatches"), [(p, m) for p, m in PIPELINES if m >= p])
def test_what_the_bound_counts_is_in_the_lists(stages: int, microbatches: int) -> None:
    for stage, actions in enumerate(action_lists("1f1b", stages, microbatches)):
        kinds = [action.kind for action in actions]
        after_first_backward = kinds[kinds.index("B") :].count("F")
        assert late_forwards("1f1b", stage, stages, microbatches) == after_first_backward
        neighbours = (stage > 0) + (stage < stages - 1)
        assert blocked_sends("1f1b", stage, stages, microbatches) == after_first_backward * neighbours
        assert blocked_sends("gpipe", stage, stages, microbatches) == 0
        assert late_forwards("gpipe", stage, stages, microbatches) == microbatches - 1


def test_known_paths_are_tight_where_they_should_be() -> None:
    """Equal stages: the path through the first stage is the makespan, so the program starts with no gap."""
    equal = [StageSeconds(1.0, 2.0)] * 4
    for schedule in SCHEDULES:
        longest = max(path.seconds(equal, 0.0) for path in known_paths(schedule, 4, 8))
        assert longest == simulate(schedule, equal, 8, 0.0).seconds == 33.0
