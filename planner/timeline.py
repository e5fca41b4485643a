"""The planned timeline of a step: when each action of the schedule runs on each rank, as Chrome-trace events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from profiles.store import load_json, write_atomically

from .assignment import counts_of
from .event_graph import ACTION_KINDS, COSTS, NOTHING, SEND, build_graph
from .layout_costs import LayoutCosts, StageCount
from .plan import Plan
from .question import question_of
from .schedule import action_lists
from .simulation import event_times
from .step_cost import CostModel
from .trace_names import PLANNED, UPDATE, action_event

TIMELINE_FILE = "timeline.json"

# (pipeline rank, action, begin and end in seconds from the start of the step)
Span = tuple[int, str, float, float]


def planned_spans(plan: Plan) -> list[Span]:
    """Every action of one step of the plan as the simulation plays it, and the update that follows."""
    question = question_of(plan)
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    costs = prices.price(plan.layout, [stage.reshard for stage in plan.stages])
    return spans_of(costs, counts_of(plan.model, plan.stages))


def spans_of(costs: LayoutCosts, counts: Sequence[StageCount]) -> list[Span]:
    """As `planned_spans`, of an assignment to a priced layout."""
    pipeline = costs.pipeline
    graph = build_graph(pipeline)
    durations, times = event_times(graph, costs.durations(counts), costs.hop_seconds)
    # A stage's events come in the order of its rank's list, so the n-th of a kind is the list's n-th of that kind.
    order: dict[tuple[int, str], list[str]] = {}
    for actions in action_lists(pipeline):
        for action in (part for whole in actions for part in whole.parts or (whole,)):
            order.setdefault((action.stage, action.kind), []).append(str(action))
    names = {key: iter(actions) for key, actions in order.items()}
    spans: list[Span] = []
    for event, cost in enumerate(graph.costs, start=1):
        stage, kind = divmod(cost - 1, COSTS)
        if cost == NOTHING or kind == SEND - 1:
            continue
        letter = ACTION_KINDS[kind]
        name = f"{stage}R" if letter == "R" else next(names[stage, letter])
        end = times[event]
        spans.append((pipeline.rank_of(stage), name, end - durations[cost], end))
    # Clipping makes every rank wait for every other before it updates.
    last, update = max(times), costs.optimizer_seconds(counts) + costs.step_seconds
    return spans + [(rank, UPDATE, last, last + update) for rank in range(pipeline.ranks)]


def planned_events(plan: Plan, spans: Sequence[Span], starts_seconds: Sequence[float]) -> list[dict[str, Any]]:
    """The spans on every rank's planned track, once from each of `starts_seconds` on."""
    each = plan.layout.world_size // plan.layout.pp
    return [
        action_event(rank * each + other, PLANNED, action, start + begin, start + end)
        for start in starts_seconds
        for rank, action, begin, end in spans
        for other in range(each)
    ]


def write_timeline(plan: Plan, measured_path: Path) -> Path:
    """Lay the planned actions beside the measured ones of a run, in one file of the same folder for Perfetto.

    Each measured step has the planned one beside it, from where its first action began.
    """
    measured = load_json(measured_path, "trace")["traceEvents"]
    begins: dict[int, float] = {}
    for event in measured:
        if event["ph"] == "X":
            step = event["args"]["step"]
            begins[step] = min(begins.get(step, event["ts"]), event["ts"])
    starts = [microseconds / 1e6 for microseconds in begins.values()]
    planned = planned_events(plan, planned_spans(plan), starts)
    path = measured_path.with_name(TIMELINE_FILE)
    write_atomically(path, json.dumps({"traceEvents": [*measured, *planned]}))
    return path
