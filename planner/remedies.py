"""Why nothing fits, and what would: one constraint relaxed at a time and the relaxed question solved, never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .bounds import fits
from .first_assignment import missing_bytes, roomiest_assignment
from .group_bounds import GroupBounds, one_state_each
from .guesses import Solved
from .job import STAGE_KEYS
from .layout import Layout
from .layout_costs import LayoutCosts, StageCount
from .offload import why_no_offload
from .pins import pin_text, plainest
from .plan import Plan
from .quantity_text import seconds_text
from .question import Question
from .rank_limits import ROUNDING
from .rules import RuleContext, recompute_modes, violations, why_no_recompute, why_no_reshard, why_not_proposed
from .space import LayoutGroup, layout_groups
from .step_cost import CostModel

_MOST_DOUBLINGS = 10
_MOST_TRIED = 60  # layouts that may have room, before a change is said to be none that helps
_SECONDS_EACH = 10.0  # that one remedy may be improved for, once there is something that fits
_SHORTEST_SEQUENCE = 128
# The plan of a question with a time limit, from a layout known to fit; None where nothing fits: `search.best_plan`.
Solve = Callable[[Question, int, float, Solved | None], Plan | None]


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change that makes something fit, and the best plan then (to within the gap of its certificate)."""

    change: str
    plan: Plan

    @property
    def seconds_per_token(self) -> float:
        return self.plan.prediction.step_seconds / self.plan.job.tokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "layout": self.plan.layout.to_dict(),
            "devices": self.plan.cluster.devices,
            "step_seconds": self.plan.prediction.step_seconds,
            "seconds_per_token": self.seconds_per_token,
            "peak_memory_bytes": self.plan.prediction.peak_memory_bytes,
            "gap": self.plan.certificate.gap,
        }

    def line(self) -> str:
        step = seconds_text(self.plan.prediction.step_seconds)
        cost = f"step {step}, {seconds_text(self.seconds_per_token)} a token"
        return f"  {self.change}, for example {self.plan.layout.short()}: {cost}"


class Forbidden(NamedTuple):
    """Why a question has no plan: in words, and the closest layout with the bytes that it misses; None of both where no
    layout is legal."""

    reasons: tuple[str, ...]
    missing_bytes: float | None = None
    closest: Solved | None = None


def why_nothing_fits(question: Question, solve: Solve) -> tuple[str, tuple[str, ...], tuple[dict[str, Any], ...]]:
    """The sentence, its reasons and the remedies: what is missing on which stage in the best case, and what helps."""
    why = what_forbids(question)
    where = f"{question.model.name} on {question.cluster.devices} devices"
    if why.closest is None:
        return f"no legal layout of {where}", why.reasons, ()
    lines = list(why.reasons)
    found = tuple(remedies(question, why, solve))
    if found:
        lines += ["what would make it fit, one change at a time:", *(remedy.line() for remedy in found)]
    return f"nothing fits: {where}", tuple(lines), tuple(remedy.to_dict() for remedy in found)


def what_forbids(question: Question) -> Forbidden:
    """Of a question without a plan: what its closest layout misses, or the rules that leave none."""
    rules, limit = question.rules, question.limit_bytes
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    best: tuple[float, int, LayoutCosts, tuple[StageCount, ...]] | None = None
    groups = _smallest_first(prices, rules)
    legal = sum(len(group) for _, group in groups)
    enough = math.inf  # bytes of a rank with which a layout is closer than the closest so far
    for least, group in groups:
        if least > enough:
            continue
        closer: Iterable[Layout] = group
        if best is not None:
            roomy = _with_room(GroupBounds(prices, _with_job(question, memory_limit_bytes=enough)), group)
            closer = (layout for _, layout in roomy)
        for layout in closer:
            found = _roomiest_within(prices.price(layout), enough, recompute_modes(layout, rules))
            if found is not None:
                rank, missing = missing_bytes(*found, limit)
                enough, best = (limit + missing) * (1 - 2 * ROUNDING), (missing, rank, *found)
    if best is None:
        return Forbidden(_why_none_legal(rules))
    missing, rank, costs, counts = best
    allowed = "|".join(question.job.recompute_modes)
    how = {"none": "without recomputation", "full": "all recomputed"}.get(allowed, "recomputing at will")
    named = costs.layout.short()
    closest = f"the closest of {legal} layouts is {named}" if legal > 1 else named
    reason = f"{closest}: {how}, stage {rank} misses {_gib(missing)} of {_gib(limit)} per device"
    return Forbidden((reason,), missing, Solved(costs, counts, costs.step(counts)))


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.3f} MiB"


def remedies(question: Question, why: Forbidden, solve: Solve) -> Iterator[Remedy]:
    """Memory, the host's too, each pin, ban and limit of the user's, the sequence and the devices, each alone."""
    job, enough_bytes = question.job, question.limit_bytes + (why.missing_bytes or 0.0)
    if job.memory_limit_bytes is not None:
        yield from _tried("without --memory-limit", _with_job(question, memory_limit_bytes=None), solve)
    more = _with_job(question, memory_limit_bytes=enough_bytes * (1 + 1e-9))
    yield from _tried(f"{_gib(enough_bytes)} of memory per device", more, solve, why.closest)
    offloaded = _with_job(question, offload="optimizer")
    if job.offload == "none" and why_no_offload(offloaded.job, question.hardware) is None:
        yield from _first(iter([("--offload optimizer", offloaded)]), solve)
    for key, pin in job.pins.items():
        free = {k: v for k, v in job.pins.items() if k != key}
        yield from _tried(f"without --pin {key}={pin_text(pin)}", _with_job(question, pins=free), solve)
    for key in job.bans:
        free = tuple(k for k in job.bans if k != key)
        yield from _tried(f"without --ban {key}", _with_job(question, bans=free), solve)
    yield from _first(_shorter(question), solve)
    yield from _first(_larger(question), solve)


def _with_job(question: Question, **changes: Any) -> Question:
    return replace(question, job=replace(question.job, **changes))


def _shorter(question: Question) -> Iterator[tuple[str, Question]]:
    """The sequence halved, and halved again; the batch has as many more sequences, so that a step has its tokens."""
    job, halvings = question.job, 1
    while job.sequence % 2**halvings == 0 and job.sequence >> halvings >= _SHORTEST_SEQUENCE:
        shorter = job.sequence >> halvings
        changed = _with_job(question, sequence=shorter, global_batch=job.global_batch << halvings)
        yield f"sequences of {shorter} tokens, {changed.job.global_batch} a step", changed
        halvings += 1


def _larger(question: Question) -> Iterator[tuple[str, Question]]:
    """More nodes until something fits, by half and by double in turn, as far as the widest link reaches."""
    nodes = question.cluster.nodes
    sizes = [halves * nodes * 2**doublings for doublings in range(_MOST_DOUBLINGS) for halves in (3, 4)]
    for size in (size // 2 for size in sizes if size % 2 == 0):
        larger = replace(question.cluster, nodes=size)
        if larger.devices > larger.links[-1].span:
            return
        yield f"{larger.devices} devices", replace(question, cluster=larger)


def _first(changes: Iterator[tuple[str, Question]], solve: Solve) -> Iterator[Remedy]:
    """Of the first change with which something plainly fits."""
    for change, question in changes:
        for remedy in _tried(change, question, solve):
            yield remedy
            return


def _tried(change: str, question: Question, solve: Solve, known: Solved | None = None) -> Iterator[Remedy]:
    """The remedy if it is one, from what is `known` to fit. What plainly fits nowhere is not searched at length."""
    known = known or _something_that_fits(question)
    if known is not None and (plan := solve(question, 1, _SECONDS_EACH, known)) is not None:
        yield Remedy(change=change, plan=plan)


def _something_that_fits(question: Question) -> Solved | None:
    """Of the layouts with most room for layers one that fits as it has most room."""
    limit = question.limit_bytes
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    groups = (group for least, group in _smallest_first(prices, question.rules) if least <= limit)
    bounds = GroupBounds(prices, question)
    roomy = [one for group in groups for one in _with_room(bounds, group)]
    for _, layout in sorted(roomy, key=lambda one: -one[0])[:_MOST_TRIED]:
        found = _roomiest_within(prices.price(layout), limit, recompute_modes(layout, question.rules))
        if found is not None:
            costs, counts = found
            return Solved(costs, counts, costs.step(counts))
    return None


def _roomiest_within(
    costs: LayoutCosts, limit_bytes: float, modes: Sequence[str]
) -> tuple[LayoutCosts, tuple[StageCount, ...]] | None:
    """The layout with all the room that it may have, None where that is too little. The moments of its reductions take
    long to find, and without them no layout holds more."""
    for some_or_all in (replace(costs, find_reductions=None), costs):
        found = roomiest_assignment(some_or_all, limit_bytes, modes)
        if not fits(*found, limit_bytes):
            return None
    return found


def _smallest_first(prices: CostModel, rules: RuleContext) -> list[tuple[float, LayoutGroup]]:
    """The space in groups of one state and schedule, each with bytes that no layout of it holds less than on every
    rank: weights, gradients and optimizer, shared evenly. The smallest micro batches first, then the least state."""
    groups = (one for group in layout_groups(rules) for one in one_state_each(group))
    least = [(prices.least_memory.state_bytes(group) / group.base.pp, group) for group in groups]
    return sorted(least, key=lambda one: (one[1].base.micro_batch, one[0]))


def _with_room(bounds: GroupBounds, group: LayoutGroup) -> Iterator[tuple[int, Layout]]:
    """Of a group with one state and schedule the layouts that hold all layers, as far as their least bytes say, each
    with how many more it would hold."""
    if bounds.room(group) is not None:
        for one in group.by_chunks():
            found = bounds.room(one)
            if found is not None:
                layout, room = found
                yield room.spare, layout


def _why_none_legal(rules: RuleContext) -> tuple[str, ...]:
    """The rules that forbid the plainest layouts, and the pinned one, so that the user sees which number to change."""
    world, pins = rules.world_size, {key: plainest(pin) for key, pin in rules.job.pins.items()}
    if "reshard" in pins and world > 1:  # of stages that have a choice
        stages = next(pp for pp in range(2, world + 1) if world % pp == 0)
        pins = {"pp": stages, "zero": 3, "schedule": "gpipe"} | pins
    plain = [Layout(dp=world), Layout(pp=world), Layout(tp=world)]
    others = pins.get("tp", 1) * pins.get("cp", 1) * pins.get("pp", 1)
    if pins and world % others == 0:
        settings = {"dp": world // others, **{key: value for key, value in pins.items() if key not in STAGE_KEYS}}
        settings.setdefault("dp_shard", settings["dp"] if settings.get("zero", 0) else 1)
        settings.setdefault("cp_style", "none" if settings.get("cp", 1) == 1 else "ring")
        plain = [Layout(**settings)]
    lines = [f"{layout.short()}: {reason}" for layout in plain for reason in violations(layout, rules)]
    lines += [f"{layout.short()}: {reason}" for layout in plain if (reason := why_not_proposed(layout)) is not None]
    if "recompute" in pins:
        again = [(layout, why_no_recompute(pins["recompute"], layout, rules)) for layout in plain]
        lines += [f"{layout.short()}: {reason}" for layout, reason in again if reason is not None]
    if "reshard" in pins:
        choice = f"reshard={pin_text(pins['reshard'])}"
        lines += [f"{layout.short()}: {choice}: {reason}" for layout in plain if (reason := why_no_reshard(layout))]
    if world % others:
        lines = [f"tp·cp·pp = {others} does not divide {world} devices"]
    if pins:
        lines.append("pinned: " + ", ".join(f"{key}={pin_text(pin)}" for key, pin in rules.job.pins.items()))
    if rules.job.bans:
        lines.append("banned: " + ", ".join(rules.job.bans))
    return tuple(lines)
