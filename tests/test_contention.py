"""How long how many stages work, and what ranks that share cores gain by it."""

from __future__ import annotations

import pytest

from planner.contention import beside_others, stages_at_work
from planner.layout import Layout
from planner.schedule import Pipeline
from profiles.points import ContentionPoint
from tests.oracles.small_world import small_hardware

TWO_CORES = tuple(ContentionPoint(active=n, slowdown=max(1.0, n / 2)) for n in (1, 2, 4))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (3, 5), (4, 4), (4, 9)])
def test_whole_backwards_of_one_chunk_work_as_in_the_figure(schedule: str, ranks: int, microbatches: int) -> None:
    """Of M + p - 1 slots, slot t has min(t + 1, p, M, M + p - 1 - t) stages at work (arXiv 2104.04473, figure 3)."""
    slots = microbatches + ranks - 1
    each = [min(t + 1, ranks, microbatches, slots - t) for t in range(slots)]
    expected = [each.count(stages) / slots for stages in range(ranks + 1)]
    assert stages_at_work(Pipeline(schedule, ranks, 1, microbatches)) == pytest.approx(expected)


def test_chunks_and_split_backwards_leave_less_idle() -> None:
    """Two ranks, two microbatches: 2/3 of a step of one chunk has an idle rank, 2/5 of one of two chunks."""
    idle = [
        stages_at_work(Pipeline(schedule, 2, chunks, 2))[1]
        for schedule, chunks in (("gpipe", 1), ("interleaved-1f1b", 2), ("zb1p", 2))
    ]
    assert idle == pytest.approx([2 / 3, 2 / 5, 2 / 13])


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline("1f1b", 4, 1, 80),
        Pipeline("interleaved-1f1b", 2, 3, 48),
        Pipeline("zb1p", 4, 2, 64),
        Pipeline("zbv", 4, 2, 50),
        Pipeline("dualpipev", 2, 2, 40),
    ],
    ids=str,
)
def test_many_microbatches_are_not_played_one_by_one(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    few = stages_at_work(pipeline)
    monkeypatch.setattr("planner.contention._ROUNDS", 1000)
    assert few == pytest.approx(stages_at_work(pipeline), abs=1e-12)
    assert sum(few) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("layout", "microbatches", "expected"),
    [
        (Layout(dp=4), 8, 1.0),  # nobody waits for a stage
        (Layout(pp=4, schedule="gpipe"), 1, 0.5),  # one rank at a time, as fast as two would be
        (Layout(pp=2, tp=2, schedule="gpipe"), 1, 0.5),
        (Layout(pp=2, dp=2), 2, (0.5 + 1.0 + 0.5) / 3),
        (Layout(pp=4), 4, (0.5 + 0.5 + 0.75 + 1.0 + 0.75 + 0.5 + 0.5) / 7),
    ],
)
def test_a_stage_in_its_bubble_leaves_its_cores(layout: Layout, microbatches: int, expected: float) -> None:
    hardware = small_hardware(contention_points=TWO_CORES)
    assert beside_others(hardware, layout, microbatches) == pytest.approx(expected)
    assert beside_others(small_hardware(), layout, microbatches) == 1.0
