"""The whole search: bound groups of layouts, expand the most promising, solve in order of bound, stop with proof.

Exact because of three facts: a group's bound is below every layout's in it (`CostModel.least_work`), a layout's is
below its best step (`bounds`, first by seconds alone, then with its bytes), and a layout's solution is its best
assignment (`solve_stages`). So once the next bound is not below the best step found, nothing left can be faster, and
the plan carries the counts that say so.
"""

from __future__ import annotations

import gc
import heapq
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from profiles.catalogue import LOCAL
from profiles.model import ModelSpec

from .assignment import stages_of
from .bounds import fits, lower_bound
from .capabilities import CAPABILITIES, able_targets, missing_features
from .errors import InfeasibleError, UnsupportedError
from .first_assignment import first_assignment, quickest_start
from .group_bounds import Alike, GroupBounds, one_state_each
from .guesses import Guesses, Solved
from .layout import Layout
from .layout_costs import LayoutCosts
from .offload import why_no_offload
from .plainest import plainest_first
from .plan import Alternative, Certificate, Plan, Prediction
from .question import Question
from .remedies import why_nothing_fits
from .rules import recompute_modes
from .solve_stages import NOTHING_BEGUN, Begun, SharedCuts, solve_stages
from .space import LayoutGroup, layout_groups
from .stage_ilp import RELATIVE_TOLERANCE
from .step_cost import CostModel

_NEAR_END, _LITTLE = 0.03, 0.1  # of what is to be beaten, and of what is left to it
_ALLOCATIONS = 200_000  # between two looks for cycles; Python's own is 700


@dataclass(frozen=True)
class _Priced:
    """A layout with its bound, and what is kept of it where it has been put aside."""

    costs: LayoutCosts
    begun: Begun = NOTHING_BEGUN


def search(question: Question, top: int = 1, time_limit_seconds: float = float("inf")) -> Plan:
    """The fastest plan and its proof; `top` - 1 runners-up, proven likewise, become its alternatives.

    Past `time_limit_seconds` the best plan so far is returned, and its certificate says the gap left; before
    there is one, the search goes on.

    Raises:
        UnsupportedError: the target cannot train this job in any layout.
        InfeasibleError: no layout is legal, or none fits; the lines say what is missing and what would help.
    """
    plan = best_plan(question, top, time_limit_seconds)
    if plan is None:
        raise InfeasibleError(*why_nothing_fits(question, best_plan))
    return plan


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Python looks for cycles seldom meanwhile: a search has few, and many small objects to look through."""
    before = gc.get_threshold()
    gc.set_threshold(_ALLOCATIONS, before[1], before[2])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _aside(next_seconds: float, cutoff_seconds: float) -> float:
    """Where a layout is put aside for the next. To come back takes time too, so near the end it is a little above that
    one's bound; far from it, where not all layouts may have their turn, it is that bound."""
    left = cutoff_seconds - next_seconds
    return next_seconds + (_LITTLE * left if left < _NEAR_END * cutoff_seconds else 0.0)


@_rare_collections()
def best_plan(
    question: Question, top: int = 1, time_limit_seconds: float = float("inf"), known: Solved | None = None
) -> Plan | None:
    """As `search`, from a layout that is `known` to fit; None where no layout is legal or none fits."""
    started = time.monotonic()
    deadline = started + time_limit_seconds
    check_supported(question)
    prices, rules = CostModel(question.model, question.cluster, question.hardware, question.job), question.rules
    ties, shared, groups = count(), SharedCuts(), GroupBounds(prices, question)
    left: list[tuple[float, int, LayoutGroup | Alike | Layout | _Priced]] = [
        (prices.least_work(group), next(ties), group) for group in layout_groups(rules)
    ]
    heapq.heapify(left)
    legal = sum(len(group) for _, _, group in left if isinstance(group, LayoutGroup))
    guesses = Guesses(question)
    first = guesses.plain([(least, group) for least, _, group in left if isinstance(group, LayoutGroup)], prices)
    if known is not None and (first is None or known.step_seconds < first.step_seconds):
        first = known
    best: list[Solved] = []
    together: set[LayoutGroup] = set()  # of one state, and bounded whatever their schedule, with their bytes
    bounded: set[LayoutGroup] = set()  # by their own state and schedule, not only by their degrees
    ended: set[Layout] = set()  # solved, or proven not to reach the best
    proven = float("inf")  # the least that any layout could still reach
    pruned_memory = ilps = 0
    while left:
        cutoff = best[top - 1].step_seconds if len(best) >= top else float("inf")
        if first is not None and top == 1:
            cutoff = min(cutoff, first.step_seconds)
        late = (bool(best) or first is not None) and time.monotonic() > deadline
        if late or left[0][0] >= cutoff * (1 - RELATIVE_TOLERANCE):
            proven = min(proven, left[0][0])
            break
        least, _, item = heapq.heappop(left)
        if isinstance(item, LayoutGroup) and len(item.states) > 1:
            for group in item.by_state():
                if groups.states_too_large(group):
                    pruned_memory += len(group)
                else:
                    heapq.heappush(left, (max(least, prices.least_work(group)), next(ties), group))
            continue
        if isinstance(item, LayoutGroup) and item not in bounded:
            if len(dict(item.pipelines)) > 1 and item not in together:  # one bound of them all may be enough
                alike = groups.alike(item)
                pruned_memory += len(item) - sum(len(each.group) for each in alike)
                for each in alike:
                    heapq.heappush(left, (max(least, each.least_seconds), next(ties), each))
                continue
            bounded.add(item)
            for group in one_state_each(item):
                bound = groups.least_of_one_state(group, cutoff)
                if bound is None:
                    pruned_memory += len(group)
                else:
                    bounded.add(group)
                    heapq.heappush(left, (max(least, bound), next(ties), group))
            continue
        if isinstance(item, Alike):
            bound = groups.least_of(item, cutoff)
            if bound is None:
                pruned_memory += len(item.group)
            else:
                together.add(item.group)
                heapq.heappush(left, (max(least, bound), next(ties), item.group))
            continue
        if isinstance(item, LayoutGroup):
            for layout in item:
                bound = lower_bound(prices.price_seconds(layout), math.inf, recompute_modes(layout, rules), cutoff)
                assert bound is not None, "a layout that can recompute nothing is not in the space"
                heapq.heappush(left, (max(least, bound), next(ties), layout))
            continue
        if isinstance(item, Layout):
            costs, bound = None, groups.least_of_layout(item, cutoff)
            if bound is not None and bound <= cutoff:
                costs = prices.price(item)
                bound = lower_bound(costs, question.limit_bytes, recompute_modes(item, rules), cutoff)
            if bound is None:
                pruned_memory += 1
            elif costs is None:
                heapq.heappush(left, (max(least, bound), next(ties), item))
            else:
                heapq.heappush(left, (max(least, bound), next(ties), _Priced(costs)))
                first = guesses.look_at(costs, bound, cutoff, first)
            continue
        costs, begun = item.costs, item.begun
        modes = recompute_modes(costs.layout, rules)
        start = partial(quickest_start, costs, question.limit_bytes, modes)
        if begun.counts is None and cutoff == math.inf:
            costs, counts = start() or (costs, None)
            begun = replace(begun, counts=counts)
        solution = solve_stages(
            costs,
            question.limit_bytes,
            bound_seconds=least,
            cutoff_seconds=cutoff,
            aside_seconds=_aside(left[0][0], cutoff) if left else math.inf,
            begun=begun,
            start=start,
            modes=modes,
            shared=shared,
            deadline=deadline if best or first is not None or begun.counts is not None else float("inf"),
        )
        ilps += solution.ilps_solved
        if solution.aside:
            heapq.heappush(left, (solution.bound_seconds, next(ties), _Priced(solution.costs, solution.aside)))
            if solution.counts is not None and (first is None or solution.step_seconds < first.step_seconds):
                first = Solved(solution.costs, solution.counts, solution.step_seconds)
            continue
        ended.add(costs.layout)
        proven = min(proven, solution.bound_seconds)
        if solution.counts is None:
            pruned_memory += solution.bound_seconds == float("inf")
        else:
            best.append(Solved(solution.costs, solution.counts, solution.step_seconds))
            best.sort(key=lambda solved: solved.step_seconds)
    pruned_bound = sum(_layouts_of(item) for _, _, item in left)
    if first is not None and (not best or first.step_seconds < best[0].step_seconds):
        best = [first, *best]  # nothing that was solved is better
        pruned_bound -= first.costs.layout not in ended  # its layout is then among those left, and was not ruled out
    if not best:
        return None
    best = plainest_first(best, question, prices)
    certificate = _certificate(
        best[0].step_seconds, proven, legal, pruned_memory, pruned_bound, ilps, time.monotonic() - started
    )
    return make_plan(question, best[0], certificate, best[1:top])


def _layouts_of(item: LayoutGroup | Alike | Layout | _Priced) -> int:
    if isinstance(item, Alike):
        return len(item.group)
    return len(item) if isinstance(item, LayoutGroup) else 1


def check_supported(question: Question) -> None:
    """Refuse what the target cannot train, by name, before anything is searched."""
    job, capabilities = question.job, CAPABILITIES[question.job.target]
    _check_features(question.model, job.target)
    if job.precision not in capabilities.precisions:
        raise UnsupportedError(
            f"the {job.target} runtime does not train in {job.precision} today",
            (f"it trains in {' and '.join(capabilities.precisions)}: --precision {capabilities.precisions[-1]}",),
        )
    if not set(job.recompute_modes) & set(capabilities.recompute):
        raise UnsupportedError(
            f"the {job.target} runtime does not recompute {_listed(job.recompute_modes)} today",
            (f"it recomputes {' or '.join(capabilities.recompute)}",),
        )
    if (reason := why_no_offload(job, question.hardware)) is not None:
        raise UnsupportedError(reason)
    if not question.hardware.supports(job.precision):
        known = [dtype for dtype in capabilities.precisions if question.hardware.supports(dtype)]
        instead = f"--precision {known[0]} (among Megatron's flags: no --{job.precision})" if known else ""
        lines = (f"it has figures for {', '.join(known)}: {instead}" if known else "profile it first",)
        if question.cluster.hardware == LOCAL:
            lines += (f"or measure the others: cli.py profile --resume --precision {job.precision}",)
        raise UnsupportedError(
            f"the hardware profile {question.hardware.name} has no figures for {job.precision}", lines
        )


def _check_features(model: ModelSpec, target: str) -> None:
    """Refuse a model with features that the target lacks; say who trains it."""
    missing = missing_features(model, target)
    if not missing:
        return
    if others := able_targets(model):
        way_out = f"{' and '.join(others)} can: --target {others[0]}"
    else:
        lacking = missing_features(model, "megatron")
        way_out = f"nor does Megatron-LM train {model.name}: it lacks {_listed(lacking)}"
    raise UnsupportedError(f"{target} cannot train {_listed(missing)} yet", (way_out,))


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def solve_layout(question: Question, layout: Layout, recompute: str | None) -> tuple[Solved, bool]:
    """The best assignment of one layout and whether it fits; one that does not fit is priced all the same.

    `recompute` fixes the mode of every layer; None leaves it free.
    """
    costs = CostModel(question.model, question.cluster, question.hardware, question.job).price(layout)
    modes = (recompute,) if recompute is not None else recompute_modes(layout, question.rules)
    for limit in (question.limit_bytes, float("inf")):
        bound = lower_bound(costs, limit, modes)
        if bound is None:
            continue
        first = first_assignment(costs, limit, modes)
        finite = limit if limit != float("inf") else 1e3 * max(m.total for m in costs.memory(first))
        begun = Begun(first if fits(costs, first, finite) else None)
        solution = solve_stages(costs, finite, bound_seconds=bound, begun=begun, modes=modes)
        if solution.counts is not None:
            return Solved(solution.costs, solution.counts, solution.step_seconds), limit != float("inf")
    raise AssertionError("an assignment without a memory limit always exists")


# ---- the answer ----------------------------------------------------------------------------------------


def make_plan(question: Question, solved: Solved, certificate: Certificate, others: Sequence[Solved] = ()) -> Plan:
    """The Plan of a solved layout."""
    return Plan(
        model=question.model,
        cluster=question.cluster,
        job=question.job,
        layout=solved.costs.layout,
        stages=stages_of(solved.costs.layout, solved.counts, solved.costs.reshard),
        prediction=predict(question, solved),
        certificate=certificate,
        alternatives=tuple(
            Alternative(layout=o.costs.layout, step_seconds=o.step_seconds, peak_memory_bytes=o.peak_memory_bytes)
            for o in others
        ),
    )


def predict(question: Question, solved: Solved) -> Prediction:
    """The figures of one step; mfu against the peak of the precision, attention counted in full."""
    job, devices = question.job, question.cluster.devices
    flops = question.model.step_flops(job.global_batch, job.sequence) / solved.step_seconds / devices
    return Prediction(
        step_seconds=solved.step_seconds,
        tokens_per_second_per_device=job.tokens / solved.step_seconds / devices,
        model_tflops_per_device=flops / 1e12,
        mfu=flops / question.hardware.peak_flops_per_second[job.precision],
        peak_memory_bytes=solved.peak_memory_bytes,
        breakdown_seconds=solved.costs.breakdown(solved.counts),
        memory_bytes=tuple(memory.items() for memory in solved.costs.memory(solved.counts)),
    )


def _certificate(
    objective: float, proven: float, legal: int, memory: int, bound: int, ilps: int, seconds: float
) -> Certificate:
    """Bounds closer to the objective than the solver's tolerance count as met."""
    least = objective if proven >= objective * (1 - RELATIVE_TOLERANCE) else proven
    return Certificate(
        objective_seconds=objective,
        bound_seconds=least,
        gap=objective / least - 1.0,
        layouts_legal=legal,
        layouts_pruned_memory=memory,
        layouts_pruned_bound=bound,
        ilps_solved=ilps,
        solver="HiGHS through pulp",
        solve_seconds=seconds,
    )
