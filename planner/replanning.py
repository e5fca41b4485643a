"""A run's plan for other devices: the same model, batch and data order, and what the change costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from profiles.cluster import ClusterSpec
from profiles.input_error import InputError

from .plan import Plan
from .question import question_of
from .search import best_plan, search

_SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Replan:
    """`after` follows `before` from step `steps_done` on; the pins and bans in `dropped` had no plan left to give."""

    before: Plan
    after: Plan
    steps_done: int
    steps: int
    dropped: tuple[str, ...] = ()

    @property
    def steps_left(self) -> int:
        return self.steps - self.steps_done

    def seconds_left(self, plan: Plan) -> float:
        """As predicted, of training alone."""
        return self.steps_left * plan.prediction.step_seconds

    def gpu_hours_left(self, plan: Plan) -> float:
        return self.seconds_left(plan) * plan.layout.world_size / _SECONDS_AN_HOUR

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "steps_left": self.steps_left,
            "before": self._row(self.before),
            "after": self._row(self.after),
            "dropped": list(self.dropped),
        }

    def _row(self, plan: Plan) -> dict[str, Any]:
        return {
            "devices": plan.layout.world_size,
            "layout": plan.layout.to_dict(),
            "step_seconds": plan.prediction.step_seconds,
            "peak_memory_bytes": plan.prediction.peak_memory_bytes,
            "seconds_left": self.seconds_left(plan),
            "gpu_hours_left": self.gpu_hours_left(plan),
        }


def plan_again(plan: Plan, cluster: ClusterSpec, time_limit_seconds: float) -> tuple[Plan, tuple[str, ...]]:
    """The fastest plan of the same job on `cluster`, and the pins and bans that were dropped to have one.

    A person's pins and bans hold as long as any plan obeys them; then all of them go, since what they were meant for
    is not known.

    Raises:
        InfeasibleError: there is none without them either.
    """
    question = replace(question_of(plan), cluster=cluster)
    found = best_plan(question, 1, time_limit_seconds)
    if found is not None:
        return found, ()
    free = replace(question, job=replace(question.job, pins={}, bans=()))
    return search(free, 1, time_limit_seconds), (*_pins(plan), *(f"{key} banned" for key in plan.job.bans))


def steps_in_all(steps: int | None, settings: Mapping[str, Any], done: int) -> int:
    """Of the whole run: as given, or as in its settings; an InputError where none of them is left or nobody says."""
    total = steps if steps is not None else settings.get("steps")
    if not isinstance(total, int) or total <= done:
        raise InputError(
            "the run has nothing left to plan for"
            if isinstance(total, int)
            else "how long the run is to be is unknown",
            where="--steps",
            expected=f"more than the {done} steps of its last checkpoint",
            got=str(total) if isinstance(total, int) else "neither --steps nor a run that says so",
        )
    return total


def _pins(plan: Plan) -> list[str]:
    return [f"{key}={value}" for key, value in plan.job.to_dict()["pins"].items()]


def cluster_left(plan: Plan, devices: int | None, lost_nodes: int | None, run_dir: Path) -> ClusterSpec:
    """The plan's cluster with so many devices, or without so many nodes; an InputError where that is none of it."""
    cluster = plan.cluster
    if (devices is None) == (lost_nodes is None):
        raise InputError(
            "how much is left is not said" if devices is None else "how much is left is said twice",
            where="replan",
            expected="one of --devices and --lost-nodes",
            got="neither" if devices is None else "both",
            hint=f"cli.py replan {run_dir} --devices {max(1, cluster.devices // 2)}",
        )
    if devices is not None:
        return cluster.with_devices(devices)
    assert lost_nodes is not None
    if not 0 < lost_nodes < cluster.nodes:
        raise InputError(
            f"the plan's cluster cannot lose {lost_nodes} nodes",
            where="--lost-nodes",
            expected=f"1 to {cluster.nodes - 1} of its {cluster.nodes} nodes" if cluster.nodes > 1 else "--devices N",
            got=str(lost_nodes),
        )
    return cluster.with_devices((cluster.nodes - lost_nodes) * cluster.devices_per_node)
