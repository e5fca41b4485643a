"""The planned timeline: every action once, in the schedule's order, as long as the simulation; and beside a run's."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from planner.plan import Plan
from planner.planning import make
from planner.question import ask
from planner.schedule import action_lists
from planner.timeline import Span, planned_spans, write_timeline
from planner.trace_names import MEASURED, UPDATE, action_event, track_names


def spans_with(*pins: str) -> tuple[Plan, list[Span]]:
    plan = make(ask("llama3-8b", "dgx-h100:1", 16, 1024, pins=("tp=1", "micro_batch=1", *pins))).plan
    assert plan is not None
    return plan, planned_spans(plan)


@pytest.mark.parametrize(
    "pins",
    [
        ("pp=1",),
        ("pp=2", "schedule=1f1b"),
        ("pp=4", "schedule=gpipe"),
        ("pp=2", "schedule=interleaved-1f1b", "virtual_stages=2"),
        ("pp=2", "schedule=zbv"),
        ("pp=2", "schedule=dualpipev"),
    ],
    ids=str,
)
def test_every_action_is_planned_once_and_they_end_with_the_step(pins: tuple[str, ...]) -> None:
    plan, spans = spans_with(*pins)
    layout, microbatches = plan.layout, plan.microbatches
    for rank, actions in enumerate(action_lists(layout.pipeline(microbatches))):
        own = [span for span in spans if span[0] == rank]
        order = [str(part) for action in actions for part in action.parts or (action,)]
        assert [name for _, name, _, _ in own if name[-1] != "R" and name != UPDATE] == order
        assert sum(name.endswith("R") for _, name, _, _ in own) == layout.virtual_stages
        assert own[-1][1] == UPDATE
        for (_, _, begin, end), (_, _, after, _) in pairwise(own):
            assert begin <= end <= after + 1e-12
    assert max(end for *_, end in spans) == pytest.approx(plan.prediction.step_seconds)


def test_planned_lies_beside_measured(tmp_path: Path) -> None:
    plan, spans = spans_with("pp=2", "schedule=1f1b", "dp=4")
    layout = plan.layout
    measured = [
        *track_names(layout),
        action_event(5, MEASURED, "1F0", 0.5, 0.75) | {"args": {"step": 7}},
        action_event(0, MEASURED, "0F0", 0.25, 0.5) | {"args": {"step": 7}},
        action_event(0, MEASURED, "0F0", 4.0, 4.5) | {"args": {"step": 8}},
    ]
    (tmp_path / "measured.json").write_text(json.dumps({"traceEvents": measured}))
    path = write_timeline(plan, tmp_path / "measured.json")
    events = json.loads(path.read_text())["traceEvents"]
    assert events[: len(measured)] == measured
    planned = events[len(measured) :]
    assert len(planned) == 2 * 4 * len(spans)  # two steps, four ranks a stage
    assert {event["tid"] for event in planned} == {0}
    titles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert titles[5] == "rank 5, pipeline rank 1"
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 5] == [
        "planned",
        "measured",
    ]
    first = [event for event in planned if event["name"] == "0F0"]
    assert [(event["pid"], event["ts"]) for event in first] == [
        *((rank, pytest.approx(0.25e6)) for rank in range(4)),
        *((rank, pytest.approx(4.0e6)) for rank in range(4)),
    ]
