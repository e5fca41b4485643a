"""Why nothing fits, and what would: each remedy is found by trying it, never guessed."""

from __future__ import annotations

from dataclasses import replace

from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec

from .bounds import fits, lower_bound
from .first_assignment import first_assignment, least_missing_bytes
from .job import TrainingJob
from .layout import Layout
from .question import Question
from .rules import RuleContext, recompute_modes, violations, why_no_recompute
from .space import enumerate_layouts
from .step_cost import CostModel

_MOST_DOUBLINGS = 10


def why_nothing_fits(
    model: ModelSpec, cluster: ClusterSpec, hardware: HardwareProfile, job: TrainingJob
) -> tuple[str, tuple[str, ...]]:
    """The sentence and its reasons: what is missing on which stage in the best case, and what would help."""
    rules = Question(model, cluster, hardware, job).rules
    limit = job.memory_limit_bytes or cluster.memory_bytes
    prices = CostModel(model, cluster, hardware, job)
    best: tuple[float, int, Layout] | None = None
    legal = 0
    for layout in enumerate_layouts(rules):
        legal += 1
        stage, missing = least_missing_bytes(prices.price(layout), limit, recompute_modes(layout, rules))
        if best is None or missing < best[0]:
            best = (missing, stage, layout)
    if best is None:
        return f"no legal layout of {model.name} on {cluster.devices} devices", _why_none_legal(rules)
    missing, stage, layout = best
    how = {"none": "without recomputation", "full": "all recomputed"}.get(
        job.recompute_pin or "", "recomputing at will"
    )
    lines = [
        f"the closest of {legal} layouts is {layout.short()}: {how}, stage {stage} misses "
        f"{_gib(missing)} of {_gib(limit)} per device",
        "what would make it fit:",
        f"  {_gib(limit + missing)} of memory per device",
    ]
    lines += _without_constraints(model, cluster, hardware, job) + _with_more_devices(model, cluster, hardware, job)
    return f"nothing fits: {model.name} on {cluster.devices} devices", tuple(lines)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _first_that_fits(
    model: ModelSpec, cluster: ClusterSpec, hardware: HardwareProfile, job: TrainingJob
) -> Layout | None:
    """Some layout with an assignment that fits, or None when none was found."""
    prices = CostModel(model, cluster, hardware, job)
    limit = job.memory_limit_bytes or cluster.memory_bytes
    rules = Question(model, cluster, hardware, job).rules
    for layout in enumerate_layouts(rules):
        costs = prices.price(layout)
        modes = recompute_modes(layout, rules)
        if lower_bound(costs, limit, modes) is not None and fits(costs, first_assignment(costs, limit, modes), limit):
            return layout
    return None


def _without_constraints(
    model: ModelSpec, cluster: ClusterSpec, hardware: HardwareProfile, job: TrainingJob
) -> list[str]:
    """Each pin, ban and limit of the user's taken away alone."""
    freed = [(f"--pin {key}", replace(job, pins={k: v for k, v in job.pins.items() if k != key})) for key in job.pins]
    freed += [(f"--ban {key}", replace(job, bans=tuple(k for k in job.bans if k != key))) for key in job.bans]
    if job.memory_limit_bytes is not None:
        freed.append(("--memory-limit", replace(job, memory_limit_bytes=None)))
    return [
        f"  without {flag}, for example {layout.short()}"
        for flag, relaxed in freed
        if (layout := _first_that_fits(model, cluster, hardware, relaxed)) is not None
    ]


def _with_more_devices(
    model: ModelSpec, cluster: ClusterSpec, hardware: HardwareProfile, job: TrainingJob
) -> list[str]:
    """The cluster doubled until something fits, as far as its widest link reaches."""
    for doublings in range(1, _MOST_DOUBLINGS + 1):
        larger = replace(cluster, nodes=cluster.nodes * 2**doublings)
        if larger.devices > cluster.links[-1].span:
            break
        layout = _first_that_fits(model, larger, hardware, job)
        if layout is not None:
            return [f"  {larger.devices} devices, for example {layout.short()}"]
    return []


def _why_none_legal(rules: RuleContext) -> tuple[str, ...]:
    """The rules that forbid the plainest layouts, and the pinned one, so that the user sees which number to change."""
    world, pins = rules.world_size, rules.job.pins
    plain = [Layout(dp=world), Layout(pp=world), Layout(tp=world)]
    others = pins.get("tp", 1) * pins.get("pp", 1)
    if pins and world % others == 0:
        fixed = {key: value for key, value in pins.items() if key != "recompute"}
        settings = {"dp": world // others, **fixed}
        settings["dp_shard"] = settings["dp"] if settings.get("zero", 0) else 1
        plain = [Layout(**settings)]
    lines = [f"{layout.short()}: {reason}" for layout in plain for reason in violations(layout, rules)]
    if (pin := rules.job.recompute_pin) is not None:
        again = [(layout, why_no_recompute(pin, layout, rules)) for layout in plain]
        lines += [f"{layout.short()}: {reason}" for layout, reason in again if reason is not None]
    if pins:
        lines.append("pinned: " + ", ".join(f"{key}={value}" for key, value in pins.items()))
    return tuple(lines)
