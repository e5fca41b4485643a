"""Of layouts that take as long the plan names the plainest, and none that is pinned away or takes longer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.guesses import Solved
from planner.plainest import plainest_first
from planner.question import Question
from planner.search import search, solve_layout
from planner.step_cost import CostModel
from tests.test_explain import TWO_NODES


def solved(schedule: str, **degrees: int) -> Solved:
    pins = {"schedule": schedule, **degrees}
    plan = search(replace(TWO_NODES, job=replace(TWO_NODES.job, pins=pins)))
    found, fits = solve_layout(TWO_NODES, plan.layout, None)
    assert fits
    return found


def plainest(first: Solved, *others: Solved, question: Question = TWO_NODES) -> list[str]:
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    found = plainest_first([first, *others], question, prices)
    assert found[0].step_seconds == pytest.approx(first.step_seconds, rel=1e-9)
    return [one.costs.layout.schedule for one in found]


def test_one_chunk_in_rounds_is_interleaved_before_it_is_breadth_first() -> None:
    tied = solved("looped-bfs", pp=2, virtual_stages=1, micro_batch=4)
    assert plainest(tied) == ["interleaved-1f1b"]
    assert plainest(solved("interleaved-1f1b", pp=2, virtual_stages=1, micro_batch=4)) == ["interleaved-1f1b"]


def test_what_pins_leave_out_is_not_named() -> None:
    tied = solved("looped-bfs", pp=2, virtual_stages=1, micro_batch=4)
    pinned = replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"schedule": ("looped-bfs", "zb1p")}))
    assert plainest(tied, question=pinned) == ["looped-bfs"]


def test_a_schedule_that_takes_longer_is_not_plainer() -> None:
    first = solved("zb1p", pp=2, micro_batch=1)
    assert plainest(first) == ["zb1p"]


def test_a_tie_that_was_found_too_changes_places() -> None:
    one, other = (solved(s, pp=2, virtual_stages=1, micro_batch=4) for s in ("looped-bfs", "interleaved-1f1b"))
    assert plainest(one, other) == ["interleaved-1f1b", "looped-bfs"]
