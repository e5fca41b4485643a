"""Measured runs correct a profile part by part: how much longer each kind of work took than its points say.

[Note: Corrections]
A profile's points are never touched. `corrections` holds a factor for a part, by which its seconds are multiplied when
they are asked for: gemm, attention, memory (kernels, timed one by one in a few steps of the run), tp and dp (their
collectives, likewise), optimizer. The factor is the median, over the runs, of measured over uncorrected seconds. Parts
that a run hardly has are left alone, and so is everything that these do not explain: there is no factor for the step.
dp is all that FSDP2 does, its packing and its Python too, in the run as in the profile's points.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from profiles.hardware import CORRECTED_PARTS, HardwareProfile
from profiles.input_error import InputError

from .assignment import counts_of
from .compute_cost import ComputeCost, ComputeModel
from .layout_costs import StageCount
from .plan import Plan
from .record import KERNELS, RunRecord
from .step_cost import CostModel
from .target_software import software_of

_LEAST_SHARE = 0.01  # of the step, for a part to say anything about its pace


@dataclass(frozen=True)
class CalibrationRow:
    """One part: its uncorrected predicted and measured seconds (summed over the runs) and its factor, old and new."""

    part: str
    runs: int
    predicted_seconds: float
    measured_seconds: float
    before: float
    after: float


def calibrate(hardware: HardwareProfile, records: Sequence[RunRecord]) -> tuple[HardwareProfile, list[CalibrationRow]]:
    """The profile with the corrections that the runs ask for, and what changed. Points stay as they were measured.

    Raises:
        InputError: no runs, or runs that did not time their kernels.
    """
    if not records:
        raise InputError(
            "no runs to calibrate with", where="--calibrate", expected="one or more run folders", got="none"
        )
    bare = replace(hardware, corrections={})
    seen: dict[str, list[tuple[float, float]]] = {part: [] for part in CORRECTED_PARTS}
    for record in records:
        predicted, measured = predicted_parts(bare, record), measured_parts(record)
        for part in CORRECTED_PARTS:
            if min(predicted[part], measured[part]) > _LEAST_SHARE * record.step_seconds:
                seen[part].append((predicted[part], measured[part]))
    corrections = dict(hardware.corrections)
    rows = []
    for part, pairs in seen.items():
        if not pairs:
            continue
        factor = round(statistics.median(m / p for p, m in pairs), 4)
        rows.append(
            CalibrationRow(
                part,
                len(pairs),
                sum(p for p, _ in pairs),
                sum(m for _, m in pairs),
                hardware.correction(part),
                factor,
            )
        )
        corrections[part] = factor
    note: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "runs": [f"{record.folder} ({record.host}, {record.date})" for record in records],
        "before": dict(hardware.corrections),
    }
    provenance = {**hardware.provenance, "calibrations": [*hardware.provenance.get("calibrations", []), note]}
    return replace(hardware, corrections=corrections, provenance=provenance), rows


def measured_parts(record: RunRecord) -> dict[str, float]:
    """Seconds of a step by part, as the run's busiest rank measured them."""
    if not record.kernels:
        raise InputError(
            f"{record.folder} did not time its kernels",
            where=f"{record.folder}/record.yaml: measured.kernels",
            expected="seconds of gemm, attention and memory",
            got="none",
            hint="train again with this version, two steps at least",
        )
    return {
        **{kind: record.kernels.get(kind, 0.0) for kind in KERNELS},
        "tp": record.parts["tp"],
        "dp": record.parts["dp_exposed"],
        "optimizer": record.parts["optimizer"],
    }


def predicted_parts(hardware: HardwareProfile, record: RunRecord) -> dict[str, float]:
    """The same parts as `hardware` prices them, for the same rank: collectives whole, nothing hidden."""
    plan = record.plan
    waiting = replace(hardware, overlap_compute_slowdown=2.0, overlap_communication_slowdown=2.0)
    prices = CostModel(plan.model, plan.cluster, waiting, plan.job)
    costs = prices.price(plan.layout, [stage.reshard for stage in plan.stages])
    counts = counts_of(plan.model, plan.stages)
    software = software_of(plan.job, hardware, plan.layout, plan.model)
    compute = ComputeModel(plan.model, hardware, plan.job, software)
    parts = {**dict.fromkeys(KERNELS, 0.0), "tp": 0.0, "dp": 0.0, "optimizer": 0.0}
    for stage in record.stages:
        seconds = costs.stage_seconds(stage, counts[stage])
        each = seconds.forward + seconds.backward + seconds.recompute_full
        for kind, kernel_seconds in _kernels(compute, plan, stage, counts[stage]).items():
            parts[kind] += kernel_seconds
        parts["tp"] += each.tp * costs.microbatches
        parts["dp"] += each.dp * costs.microbatches + seconds.gather.dp + seconds.reduce.dp
        parts["optimizer"] += seconds.optimizer.total
    return parts


def _kernels(compute: ComputeModel, plan: Plan, stage: int, count: StageCount) -> dict[str, float]:
    parts: list[tuple[ComputeCost, int, int]] = [
        (compute.block(plan.layout, segment.kind), blocks.total, blocks.full)
        for segment, blocks in zip(plan.model.segments, count, strict=True)
        if blocks.total
    ]
    if stage == 0:
        parts.append((compute.embedding(plan.layout), 1, 0))
    if stage == plan.layout.stages - 1:
        parts.append((compute.head(plan.layout), 1, 0))
    kernels: dict[str, float] = dict.fromkeys(KERNELS, 0.0)
    for cost, number, again in parts:
        for kind in kernels:
            passes = number * (getattr(cost.forward, kind) + getattr(cost.backward, kind))
            kernels[kind] += plan.microbatches * (passes + again * getattr(cost.forward, kind))
    return kernels
