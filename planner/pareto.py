"""Fronts: the best step against fewer devices or less memory per device, each point a search; and devices left idle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .errors import InfeasibleError
from .layout import Layout
from .plan import Plan
from .question import Question
from .remedies import why_nothing_fits
from .search import best_plan, check_supported

KINDS = ("devices", "memory")
_STEP_DOWN = 0.9  # of the memory limit, from one point to the next
_MOST_POINTS = 24
# Fewer nodes are tried one by one up to so many, above it by halving.
_EACH_NODE_UP_TO = 16


@dataclass(frozen=True, kw_only=True)
class Point:
    """The best plan on so many devices under this limit; `on_front` where no other point is better in both."""

    devices: int
    limit_bytes: float
    layout: Layout
    step_seconds: float
    peak_memory_bytes: float
    tokens_per_second: float
    gpu_hours_per_billion_tokens: float
    gap: float
    on_front: bool = True

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"layout": self.layout.to_dict()}


@dataclass(frozen=True)
class Front:
    """Points from the most devices (or bytes) down; `ended` is the first number that has no plan."""

    kind: str
    points: tuple[Point, ...]
    ended: float | None

    def to_dict(self) -> dict[str, Any]:
        return {"pareto": self.kind, "points": [point.to_dict() for point in self.points], "ended": self.ended}


def front(question: Question, kind: str, time_limit_seconds: float) -> Front:
    """The front of one kind. The time limit is each search's.

    Raises:
        InfeasibleError: nothing fits the whole cluster and all its memory.
    """
    check_supported(question)
    points, ended = (
        _by_devices(question, time_limit_seconds) if kind == "devices" else _by_memory(question, time_limit_seconds)
    )
    if not points:
        raise InfeasibleError(*why_nothing_fits(question, best_plan))
    return Front(kind, tuple(_marked(points, kind)), ended)


def _by_devices(question: Question, limit: float) -> tuple[list[Point], float | None]:
    """Nodes halved down to one, then the devices of that node; until two sizes in a row have no plan."""
    points: list[Point] = []
    missed, ended = 0, None
    for devices in _halved(question):
        cut = on_devices(question, devices)
        plan = best_plan(cut, 1, limit)
        if plan is None:
            missed += 1
            ended = ended or devices
            if missed == 2:
                break
            continue
        missed = 0
        points.append(_point(cut, plan))
    return points, ended


def _by_memory(question: Question, limit: float) -> tuple[list[Point], float | None]:
    """Each limit is a tenth below the one before, or what the best plan did not need."""
    points: list[Point] = []
    now = question.limit_bytes
    while len(points) < _MOST_POINTS:
        cut = replace(question, job=replace(question.job, memory_limit_bytes=now))
        plan = best_plan(cut, 1, limit)
        if plan is None:
            return points, now
        points.append(_point(cut, plan))
        now = _STEP_DOWN * min(now, plan.prediction.peak_memory_bytes)
    return points, None


def _point(question: Question, plan: Plan) -> Point:
    seconds, tokens, devices = plan.prediction.step_seconds, question.job.tokens, question.cluster.devices
    return Point(
        devices=devices,
        limit_bytes=question.limit_bytes,
        layout=plan.layout,
        step_seconds=seconds,
        peak_memory_bytes=plan.prediction.peak_memory_bytes,
        tokens_per_second=tokens / seconds,
        gpu_hours_per_billion_tokens=devices * seconds / 3600 * 1e9 / tokens,
        gap=plan.certificate.gap,
    )


def _marked(points: list[Point], kind: str) -> Iterator[Point]:
    """A point is off the front if another costs no more devices (or memory) and takes no longer, and less of one."""

    def cost(point: Point) -> tuple[float, float]:
        return (point.devices if kind == "devices" else point.peak_memory_bytes, point.step_seconds)

    for point in points:
        mine = cost(point)
        beaten = any(cost(o)[0] <= mine[0] and cost(o)[1] <= mine[1] and cost(o) != mine for o in points)
        yield replace(point, on_front=not beaten)


# ---- fewer devices -----------------------------------------------------------------------------------------


def on_devices(question: Question, devices: int) -> Question:
    """The question on the first `devices` devices of the cluster."""
    if devices == question.cluster.devices:
        return question
    return replace(question, cluster=question.cluster.with_devices(devices))


def _halved(question: Question) -> Iterator[int]:
    nodes, inside = question.cluster.nodes, question.cluster.devices_per_node
    while nodes:
        yield nodes * inside
        nodes //= 2
    while inside := inside // 2:
        yield inside


def plan_with_idle(question: Question, top: int, time_limit_seconds: float) -> Plan:
    """The fastest plan on all nodes or on fewer whole ones; the time limit is that of all searches together.

    Raises:
        InfeasibleError: no number of nodes has a plan.
    """
    check_supported(question)
    started, inside, nodes = time.monotonic(), question.cluster.devices_per_node, question.cluster.nodes
    sizes = [n * inside for n in range(nodes, 0, -1)] if nodes <= _EACH_NODE_UP_TO else list(_halved(question))
    best: Plan | None = None
    for index, devices in enumerate(size for size in sizes if size % inside == 0):
        left = max(0.0, started + time_limit_seconds - time.monotonic())
        found = best_plan(on_devices(question, devices), top, left / (len(sizes) - index))
        if found is not None and (best is None or found.prediction.step_seconds < best.prediction.step_seconds):
            best = found
    if best is None:
        raise InfeasibleError(*why_nothing_fits(question, best_plan))
    return best
