"""Seconds and bytes of one published run: the only place where validation meets the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from profiles.hardware import HardwareProfile

from .layout import RECOMPUTE_MODES
from .layout_costs import Blocks, SegmentCosts, StageCount
from .run_case import RunCase
from .step_cost import CostModel


@dataclass(frozen=True, kw_only=True)
class CasePrediction:
    """One step. `allocated_bytes` is what the framework's allocator sees of the peak, which is what trainers report:
    all but the device's context and the communicators, and but what blocks leave unused where tensors are counted.
    `memory_bytes` itemises the fullest rank."""

    step_seconds: float
    peak_memory_bytes: float
    allocated_bytes: float
    breakdown_seconds: dict[str, float]
    memory_bytes: dict[str, float]
    recompute: str


def predict(case: RunCase, hardware: HardwareProfile) -> CasePrediction:
    """The prediction of a case; where the recomputation is not stated, that of the least that fits."""
    if case.recompute is not None:
        return price(case, hardware, case.recompute)
    predictions = (price(case, hardware, mode) for mode in RECOMPUTE_MODES)
    for prediction in predictions:
        if prediction.peak_memory_bytes <= case.cluster.memory_bytes:
            break
    return prediction


def price(case: RunCase, hardware: HardwareProfile, recompute: str) -> CasePrediction:
    """The case with every layer under one recompute mode."""
    prices = CostModel(case.model, case.cluster, hardware, case.job, case.software)
    costs = prices.price(case.layout, (None,) * case.layout.stages)  # stages of torch's own pipeline choose nothing
    counts = assignment(costs.segments, case.chunk_layers, recompute)
    breakdown = costs.breakdown(counts)
    fullest = max(costs.memory(counts), key=lambda memory: memory.total)
    unused = fullest.allocator_slack if case.software.counts_tensors else 0.0
    return CasePrediction(
        step_seconds=sum(breakdown.values()),
        peak_memory_bytes=fullest.total,
        allocated_bytes=fullest.total - fullest.context - fullest.communicators - unused,
        breakdown_seconds=breakdown,
        memory_bytes=fullest.items(),
        recompute=recompute,
    )


def assignment(segments: Sequence[SegmentCosts], chunk_layers: Sequence[int], mode: str) -> list[StageCount]:
    """Chunks of so many layers each, laid along the chain of segments, all layers under one recompute mode."""
    ends = list(accumulate(segment.layers for segment in segments))
    counts, first = [], 0
    for layers in chunk_layers:
        last = first + layers
        held = []
        for end, segment in zip(ends, segments, strict=True):
            number = max(0, min(last, end) - max(first, end - segment.layers))
            held.append(Blocks(**{mode: number}))
        counts.append(tuple(held))
        first = last
    return counts
