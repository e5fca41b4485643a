"""The layout that a person would write without a planner, priced: what a plan's gain is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .bounds import fits
from .first_assignment import first_assignment
from .layout import Layout
from .layout_costs import LayoutCosts, StageCount
from .question import Question
from .rules import recompute_modes, violations
from .space import divisors
from .step_cost import CostModel

IN_WORDS = "tp = the node, the least pp that fits, dp the rest, mb1, zero 1, 1f1b, as little recompute as fits"


@dataclass(frozen=True, kw_only=True)
class DefaultLayout:
    """The default with its step and peak; where no pp makes it fit the closest, and `missing_bytes` is above 0."""

    layout: Layout
    counts: tuple[StageCount, ...]
    step_seconds: float
    peak_memory_bytes: float
    missing_bytes: float

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0


def default_layout(question: Question) -> DefaultLayout | None:
    """tp as wide as node and rules allow, the smallest pp that fits, dp the rest, micro batch 1, 1F1B, zero 1.

    Zero 1 where the target has it, else its least level that shards. Experts take as many ranks as divide them, in the
    node; sequence parallelism only where a rule asks for it. Layers are dealt out evenly by their seconds and recompute
    as little as fits. The job's pins and bans are not the default's. None where no such layout is legal.
    """
    question = replace(question, job=replace(question.job, pins={}, bans=()))
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    closest: DefaultLayout | None = None
    for layout in _written(question):
        costs = prices.price(layout)
        found = _priced(costs, question)
        if found.fits:
            return found
        if closest is None or found.missing_bytes < closest.missing_bytes:
            closest = found
    return closest


def _priced(costs: LayoutCosts, question: Question) -> DefaultLayout:
    limit = question.limit_bytes
    counts = first_assignment(costs, limit, recompute_modes(costs.layout, question.rules))
    peak = max(memory.total for memory in costs.memory(counts))
    return DefaultLayout(
        layout=costs.layout,
        counts=counts,
        step_seconds=costs.step(counts),
        peak_memory_bytes=peak,
        missing_bytes=0.0 if fits(costs, counts, limit) else peak - limit,
    )


def _written(question: Question) -> Iterator[Layout]:
    """The legal layouts of the widest tp that has any, by rising pp."""
    world, node = question.cluster.devices, question.cluster.devices_per_node
    for tp in reversed(divisors(node)):
        if world % tp:
            continue
        layouts = [found for pp in divisors(world // tp) if (found := _legal(question, tp, pp)) is not None]
        if layouts:
            yield from layouts
            return


def _legal(question: Question, tp: int, pp: int) -> Layout | None:
    rules, node = question.rules, question.cluster.devices_per_node
    dp = question.cluster.devices // (tp * pp)
    levels = rules.capabilities.zero_with_pipeline if pp > 1 else rules.capabilities.zero
    zero = 0 if dp == 1 else min((level for level in levels if level), default=0)
    experts = question.model.experts
    grids = [ep for ep in reversed(divisors(experts.number)) if ep <= node] if experts is not None else [1]
    for ep in grids:
        for parallel in (False, True):
            layout = Layout(
                tp=tp, pp=pp, dp=dp, dp_shard=dp if zero else 1, zero=zero, ep=ep, sequence_parallel=parallel
            )
            if not violations(layout, rules):
                return layout
    return None
