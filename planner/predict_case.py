"""Seconds and bytes of one published run: the only place where validation meets the cost model."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.hardware import HardwareProfile

from .layout import RECOMPUTE_MODES
from .run_case import RunCase, SkippedRunError
from .step_cost import CostModel, StageCount


@dataclass(frozen=True, kw_only=True)
class CasePrediction:
    """One step. `allocated_bytes` is what the framework's allocator sees of the peak, which is what trainers report:
    all but the device's context and the communicators. `memory_bytes` itemises the fullest rank."""

    step_seconds: float
    peak_memory_bytes: float
    allocated_bytes: float
    breakdown_seconds: dict[str, float]
    memory_bytes: dict[str, float]
    recompute: str


class NotPricedError(SkippedRunError):
    """The cost model has no price yet for what the row asks; the text says for what."""


def predict(case: RunCase, hardware: HardwareProfile) -> CasePrediction:
    """The prediction of a case; where the recomputation is not stated, that of the least that fits.

    Raises:
        NotPricedError: with the reason.
    """
    if case.recompute is not None:
        return price(case, hardware, case.recompute)
    last: CasePrediction | None = None
    for mode in RECOMPUTE_MODES:
        try:
            last = price(case, hardware, mode)
        except NotPricedError:
            if mode == RECOMPUTE_MODES[-1] and last is None:
                raise
            continue
        if last.peak_memory_bytes <= case.cluster.memory_bytes:
            break
    assert last is not None
    return last


def price(case: RunCase, hardware: HardwareProfile, recompute: str) -> CasePrediction:
    """The case with every layer under one recompute mode, by the cost model of today."""
    _require_priced(case, recompute)
    costs = CostModel(case.model, case.cluster, hardware, case.job).price(case.layout)
    counts = [StageCount(n, 0) if recompute == "none" else StageCount(0, n) for n in case.chunk_layers]
    breakdown = costs.breakdown(counts)
    fullest = max(costs.memory(counts), key=lambda memory: memory.total)
    return CasePrediction(
        step_seconds=sum(breakdown.values()),
        peak_memory_bytes=fullest.total,
        allocated_bytes=fullest.total - fullest.context - fullest.communicators,
        breakdown_seconds=breakdown,
        memory_bytes=fullest.items(),
        recompute=recompute,
    )


def _require_priced(case: RunCase, recompute: str) -> None:
    layout = case.layout
    lacking = {
        "experts": case.model.experts is not None,
        "context parallelism": layout.cp > 1,
        f"the {layout.schedule} schedule": layout.schedule not in ("gpipe", "1f1b"),
        "selective recomputation": recompute == "selective",
        "fp8": case.job.precision == "fp8",
    }
    missing = [what for what, has in lacking.items() if has]
    if missing:
        raise NotPricedError(f"not priced yet: {', '.join(missing)}")
