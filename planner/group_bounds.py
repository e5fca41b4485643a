"""Bounds of layouts in groups: those that share degrees and state, all their pipelines together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from .bounds import any_pipeline_bound, largest_segment
from .question import Question
from .rank_limits import ROUNDING
from .rules import recompute_modes
from .space import LayoutGroup
from .step_cost import CostModel


def one_state_each(group: LayoutGroup) -> Iterator[LayoutGroup]:
    """The same layouts in groups with one state each, whose last stages are on the same rank."""
    for of_state in group.by_state():
        yield from of_state.by_shape()


def states_too_large(prices: CostModel, group: LayoutGroup, question: Question) -> bool:
    """Whether weights, gradients and optimizer alone, of a group with one state, are more than its ranks hold."""
    return prices.least_state_bytes(group) > group.base.pp * question.limit_bytes * (1 + ROUNDING)


def least_of_one_state(
    prices: CostModel, group: LayoutGroup, question: Question, enough_seconds: float = math.inf
) -> float | None:
    """Seconds that no layout of a group with one state and shape is below; above `enough_seconds` any such will do.
    None when none fits."""
    base, pipelines = group.base, group.pipelines
    of_schedule = [replace(base, schedule=schedule) for schedule in dict(pipelines)]
    modes = list({mode for layout in of_schedule for mode in recompute_modes(layout, question.rules)})
    alike = prices.of_fewest_chunks(base, pipelines)
    sizes = prices.least_bytes(base, pipelines, largest_segment(alike[0]).kind)
    bounds = [
        any_pipeline_bound(costs, pipelines, sizes, question.limit_bytes, modes, enough_seconds) for costs in alike
    ]
    return min((bound for bound in bounds if bound is not None), default=None)
