"""Why this plan: what binds, the runner-up of each axis, what would help, and another layout beside it. All re-solved.

Values only; `explain_report.py` puts them into words. Every question asked here is a search of its own, so each has its
share of one time limit; what is then not proven carries the gap of its certificate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from profiles.alpha_beta import ONE_STEP
from profiles.cluster import ClusterSpec, LinkTier
from profiles.input_error import InputError

from .assignment import counts_of
from .comm_cost import Group
from .errors import InfeasibleError
from .job import TrainingJob
from .layout import SCHEDULES, Layout
from .parse import parse_pins
from .pins import pin_text
from .plan import Plan, Prediction
from .question import Question
from .remedies import what_forbids, why_nothing_fits
from .search import Solved, best_plan, predict, solve_layout
from .sensitivity import relaxed_questions
from .space import divisors, fills_devices
from .step_cost import CostModel

_RANKED = 8  # layouts of the first search, among which most runners-up are found
_FILLING = ("tp", "cp", "pp", "dp")  # whose product is the number of devices
AXES = ("tp", "cp", "pp", "dp", "ep", "zero", "schedule", "virtual_stages", "micro_batch")


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What holds the plan back: its fullest rank, the link with the most exposed seconds, the bubble."""

    memory_rank: int
    memory_bytes: float
    limit_bytes: float
    memory_items: dict[str, float]
    link: str | None
    link_seconds: float
    link_parts: dict[str, float]
    bubble_seconds: float
    recompute_seconds: float


@dataclass(frozen=True, kw_only=True)
class Rival:
    """The best layout under one condition, beside the plan; without a layout, `reasons` say what forbids it.

    `more_seconds` is by how much each part of the step is longer than the plan's; they sum to the difference.
    """

    condition: str
    layout: Layout | None = None
    step_seconds: float | None = None
    peak_memory_bytes: float | None = None
    breakdown_seconds: dict[str, float] = field(default_factory=dict)
    more_seconds: dict[str, float] = field(default_factory=dict)
    gap: float = 0.0
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {
            "layout": self.layout.to_dict() if self.layout else None,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True, kw_only=True)
class Help:
    """The best plan once one thing is better; `gain` is how many more tokens a second it trains, relative."""

    change: str
    layout: Layout
    step_seconds: float
    seconds_per_token: float
    gain: float
    gap: float

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"layout": self.layout.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """`prediction` is the plan's as today's profile has it; `stated_seconds` what its file says."""

    plan: Plan
    prediction: Prediction
    stated_seconds: float
    binding: Binding
    rivals: tuple[Rival, ...]
    helps: tuple[Help, ...]
    faster: Rival | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": self.plan.layout.to_dict(),
            "prediction": self.prediction.to_dict(),
            "stated_seconds": self.stated_seconds,
            "binds": vars(self.binding),
            "runners_up": [rival.to_dict() for rival in self.rivals],
            "helps": [each.to_dict() for each in self.helps],
            "faster": self.faster.to_dict() if self.faster else None,
        }


class _Budget:
    """One time limit shared by all searches: each may take what is left over those still to come."""

    def __init__(self, seconds: float, searches: int) -> None:
        self._deadline, self._searches = time.monotonic() + seconds, searches

    def solve(self, question: Question, top: int = 1) -> Plan | None:
        left = max(1, self._searches)
        self._searches -= 1
        return best_plan(question, top, max(0.0, self._deadline - time.monotonic()) / left)


def explain(question: Question, plan: Plan, time_limit_seconds: float = 120.0) -> Explanation:
    """Why the plan is as it is; about ten searches.

    Raises:
        InfeasibleError: nothing fits, the plan neither.
    """
    solved = _as_planned(question, plan)
    prediction = predict(question, solved)
    axes = list(_axes(question, plan.layout))
    helps = relaxed_questions(question)
    budget = _Budget(time_limit_seconds, 2 + len(axes) // 2 + len(helps))
    ranked = budget.solve(question, _RANKED)
    if ranked is None:  # the plan was edited, or the profile has changed
        raise InfeasibleError(*why_nothing_fits(question, best_plan))
    known = _Ranked(question, prediction, ranked)
    rivals = []
    for axis, values in axes:
        rivals.append(
            known.first_with(axis, getattr(plan.layout, axis))
            or _rival(
                f"{axis} ≠ {_text(getattr(plan.layout, axis))}", _pinned(question, axis, values), prediction, budget
            )
        )
    rivals += _recompute_rivals(question, plan, prediction, budget)
    now = prediction.step_seconds / question.job.tokens
    found = []
    for change, relaxed in helps:
        better = budget.solve(relaxed)
        if better is not None:
            each = better.prediction.step_seconds / relaxed.job.tokens
            found.append(
                Help(
                    change=change,
                    layout=better.layout,
                    step_seconds=better.prediction.step_seconds,
                    seconds_per_token=each,
                    gain=now / each - 1,
                    gap=better.certificate.gap,
                )
            )
    return Explanation(
        plan=plan,
        prediction=prediction,
        stated_seconds=plan.prediction.step_seconds,
        binding=_binding(question, plan.layout, prediction),
        rivals=tuple(sorted(rivals, key=lambda rival: rival.step_seconds or float("inf"))),
        helps=tuple(sorted(found, key=lambda each: -each.gain)),
        faster=known.faster_than(plan.layout),
    )


def compare(question: Question, plan: Plan, text: str, time_limit_seconds: float = 60.0) -> tuple[Prediction, Rival]:
    """The plan as priced today, and the best layout with the settings that a person wrote, as `tp=4,pp=8`.

    Keys left out are chosen best; the job's own pins and bans hold for them. What a rule or the bytes forbid is an
    answer too.

    Raises:
        InputError: the text is no settings, or no layout with them fills the devices.
    """
    pins, _ = parse_pins([word for word in text.split(",") if word.strip()], (), "--against")
    if not pins:
        raise InputError("no layout to compare with", where="--against", expected="KEY=VALUE, …", got=text)
    job = question.job
    kept = {key: pin for key, pin in job.pins.items() if key not in pins}
    wanted = replace(job, pins={**kept, **pins}, bans=tuple(key for key in job.bans if key not in pins))
    if not fills_devices(wanted, question.cluster.devices):
        raise _does_not_fill(text, wanted, question.cluster.devices)
    prediction = predict(question, _as_planned(question, plan))
    return prediction, _rival(text, replace(question, job=wanted), prediction, _Budget(time_limit_seconds, 1))


def _does_not_fill(text: str, job: TrainingJob, devices: int) -> InputError:
    held = [f"{key}={pin_text(pin)}" for key, pin in job.pins.items() if key in _FILLING]
    held += [f"{key} banned" for key in job.bans if key in _FILLING]
    return InputError(
        "the settings do not fill the devices",
        where="--against",
        expected=f"tp·cp·pp·dp of {devices} devices",
        got=text,
        hint=f"what holds, with the plan's own pins and bans: {', '.join(held)}",
    )


def _as_planned(question: Question, plan: Plan) -> Solved:
    """The plan with its own stages, priced by today's profile."""
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    costs = prices.price(plan.layout, [stage.reshard for stage in plan.stages])
    counts = counts_of(plan.model, plan.stages)
    return Solved(costs, counts, costs.step(counts))


# ---- what binds --------------------------------------------------------------------------------------------


def _binding(question: Question, layout: Layout, prediction: Prediction) -> Binding:
    totals = [sum(items.values()) for items in prediction.memory_bytes]
    rank = max(range(len(totals)), key=totals.__getitem__)
    links: dict[str, dict[str, float]] = {}
    for part, (operation, group) in _groups(layout).items():
        if seconds := prediction.breakdown_seconds[part]:
            links.setdefault(tightest_link(question.cluster, operation, group).tier, {})[part] = seconds
    most = max(links, key=lambda tier: sum(links[tier].values()), default=None)
    parts = links[most] if most is not None else {}
    return Binding(
        memory_rank=rank,
        memory_bytes=totals[rank],
        limit_bytes=question.limit_bytes,
        memory_items=dict(prediction.memory_bytes[rank]),
        link=most,
        link_seconds=sum(parts.values()),
        link_parts=parts,
        bubble_seconds=prediction.breakdown_seconds["bubble"],
        recompute_seconds=prediction.breakdown_seconds["recompute"],
    )


def _groups(layout: Layout) -> dict[str, tuple[str, Group]]:
    """The collective and the group of each axis whose seconds are a part of the step."""
    tp, cp, dp = layout.tp, layout.cp, layout.dp
    return {
        "tp": ("all_reduce" if not layout.sequence_parallel else "all_gather", Group(tp, 1)),
        "cp": ("exchange" if layout.cp_style == "ring" else "all_to_all", Group(cp, tp)),
        "ep": ("all_to_all", Group(layout.ep, layout.etp)),
        "pp": ("send_recv", Group(layout.pp, tp * cp * dp)),
        "dp_exposed": ("reduce_scatter" if layout.zero else "all_reduce", Group(dp, tp * cp)),
    }


def tightest_link(cluster: ClusterSpec, operation: str, group: Group) -> LinkTier:
    """The tier that bounds the group's bandwidth ([Note: Where a group lies]), the widest of equals."""
    span = group.size * group.stride
    if operation in ONE_STEP:  # a message crosses one tier, the slowest pair's the widest
        return cluster.link_within(span)
    widest = cluster.links.index(cluster.link_within(span))
    tightest, least, below = cluster.links[widest], float("inf"), 1
    for link in cluster.links[: widest + 1]:
        sharing = max(1, min(group.size, below // group.stride))
        whole = group.size if span <= link.span else 0
        bandwidth = sharing * link.operation(operation, whole).bandwidth_bytes_per_second
        if bandwidth <= least:
            tightest, least = link, bandwidth
        below = link.span
    return tightest


# ---- runners-up --------------------------------------------------------------------------------------------


def _axes(question: Question, layout: Layout) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each axis and knob that could be otherwise, with all its other values that the job allows."""
    world, experts, able = question.cluster.devices, question.model.experts, question.rules.capabilities
    degrees = tuple(divisors(world))
    values: dict[str, tuple[Any, ...]] = {
        "tp": degrees,
        "cp": degrees if able.cp_styles else (),
        "pp": degrees,
        "dp": degrees,
        "ep": tuple(divisors(experts.number)) if experts is not None and able.experts else (),
        "zero": tuple(sorted({*able.zero, *able.zero_with_pipeline})),
        "schedule": tuple(name for name in SCHEDULES if name in able.schedules) if layout.pp > 1 else (),
        "virtual_stages": tuple(range(1, question.model.layers + 3)) if layout.virtual_stages > 1 else (),
        "micro_batch": tuple(divisors(question.job.global_batch)),
    }
    for axis in AXES:
        others = tuple(v for v in values[axis] if v != getattr(layout, axis) and question.job.allows(axis, v))
        if others:
            yield axis, others


def _pinned(question: Question, key: str, values: tuple[Any, ...]) -> Question:
    return replace(question, job=replace(question.job, pins={**question.job.pins, key: values}))


def _recompute_rivals(question: Question, plan: Plan, prediction: Prediction, budget: _Budget) -> list[Rival]:
    """The best plan that recomputes nothing, of one that does; the best that recomputes everything, of one that not."""
    used = any(stage.recompute_full or stage.recompute_selective for stage in plan.stages)
    others = tuple(mode for mode in question.job.recompute_modes if (mode == "none") == used)
    others = tuple(mode for mode in others if mode in question.rules.capabilities.recompute)
    if not others:
        return []
    name = "no recompute" if used else "recompute everywhere"
    return [_rival(name, _pinned(question, "recompute", others), prediction, budget)]


def _rival(condition: str, question: Question, base: Prediction, budget: _Budget) -> Rival:
    """The best plan of a narrower question, or what forbids it."""
    plan = budget.solve(question)
    if plan is None:
        return Rival(condition=condition, reasons=what_forbids(question).reasons)
    return _beside(condition, plan.layout, plan.prediction, base, plan.certificate.gap)


def _beside(condition: str, layout: Layout, prediction: Prediction, base: Prediction, gap: float) -> Rival:
    parts = prediction.breakdown_seconds
    return Rival(
        condition=condition,
        layout=layout,
        step_seconds=prediction.step_seconds,
        peak_memory_bytes=prediction.peak_memory_bytes,
        breakdown_seconds=dict(parts),
        more_seconds={part: seconds - base.breakdown_seconds[part] for part, seconds in parts.items()},
        gap=gap,
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Ranked:
    """The best layouts of the question in order; each is solved again only when its parts are asked for."""

    def __init__(self, question: Question, base: Prediction, best: Plan) -> None:
        self._question, self._base, self._best = question, base, best
        self._layouts = [best.layout, *(other.layout for other in best.alternatives)]
        self._predictions = {best.layout: best.prediction}

    def _prediction(self, layout: Layout) -> Prediction:
        if layout not in self._predictions:
            self._predictions[layout] = predict(self._question, solve_layout(self._question, layout, None)[0])
        return self._predictions[layout]

    def first_with(self, axis: str, other_than: Any) -> Rival | None:
        for layout in self._layouts:
            if getattr(layout, axis) != other_than:
                condition = f"{axis} ≠ {_text(other_than)}"
                return _beside(condition, layout, self._prediction(layout), self._base, self._best.certificate.gap)
        return None

    def faster_than(self, layout: Layout) -> Rival | None:
        """The best of all where it beats the plan: one that a person changed, or that was not proven."""
        best = self._best
        if best.prediction.step_seconds >= self._base.step_seconds * (1 - 1e-6):
            return None
        other = "another layout" if best.layout != layout else "the same layout with other stages"
        return _beside(other, best.layout, best.prediction, self._base, best.certificate.gap)
