"""Predicted beside measured: errors, rank correlation, regret, the noise of each, and the parts of a step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from side_by_side import Case

from planner.calibrate import predicted_parts
from planner.record import RunRecord
from profiles.hardware import HardwareProfile


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation."""

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [float(order.index(i)) for i in range(len(values))]

    a, b = ranks(left), ranks(right)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def part_rows(case: Case, hardware: HardwareProfile) -> list[tuple[str, float, float]]:
    """(part, predicted, measured) seconds on the busiest rank; kernels and collectives as if nothing overlapped."""
    record = RunRecord(Path(), case.plan, "", "", case.rank, case.measured_seconds, case.parts, case.kernels)
    predicted, found = predicted_parts(hardware, record), case.parts
    breakdown = case.plan.prediction.breakdown_seconds
    compute = breakdown["compute"] + breakdown["recompute"]
    around = sum(predicted[kind] for kind in case.kernels)
    rows = [(kind, predicted[kind], seconds) for kind, seconds in case.kernels.items()]
    rows.append(("around them", compute - around, found["compute"] - sum(case.kernels.values())))
    rows.append(("tp", predicted["tp"], found["tp"]))
    rows += [(axis, breakdown[axis], found.get(axis, 0.0)) for axis in ("cp", "ep")]
    rows.append(("dp", predicted["dp"], found["dp_exposed"]))
    rows.append(("pp, bubble", breakdown["pp"] + breakdown["bubble"], found["pp_bubble"]))
    rows.append(("optimizer", breakdown["optimizer"], found["optimizer"] + found["other"]))
    return [row for row in rows if max(row[1], row[2]) > 5e-4]


def show(cases: Sequence[Case], hardware: HardwareProfile, parts: bool) -> None:
    """The table of one model, and its summary."""
    print(f"{'layout':<34}{'stages':<10}{'predicted':>10}{'measured':>10}{'error':>8}{'at equal pace':>15}")
    for case in sorted(cases, key=lambda case: case.measured_seconds):
        split = "/".join(str(stage.end - stage.first) for stage in case.plan.stages)
        predicted = case.plan.prediction.step_seconds
        times = f"{predicted * 1e3:>8.0f}ms{case.measured_seconds * 1e3:>8.0f}ms{case.error:>+8.1%}"
        print(f"{case.plan.layout.short():<34}{split:<10}{times}{case.paced_error(hardware):>+15.1%}")
        if parts:
            rows = part_rows(case, hardware)
            print("    " + "  ".join(f"{name} {p * 1e3:.0f}/{m * 1e3:.0f}" for name, p, m in rows))
    summarise(cases, hardware)


def halves(cases: Sequence[Case]) -> tuple[list[float], list[float]]:
    """Median seconds of each layout over one half of the rounds and over the other, every second one."""
    return tuple([statistics.median(c.seconds[start::2]) for c in cases] for start in (0, 1))  # type: ignore[return-value]


def summarise(cases: Sequence[Case], hardware: HardwareProfile) -> None:
    predicted = [case.plan.prediction.step_seconds for case in cases]
    measured = [case.measured_seconds for case in cases]
    chosen = min(cases, key=lambda case: case.plan.prediction.step_seconds)
    print(f"\nlayouts             {len(cases)}")
    for name, errors in (
        ("error", [case.error for case in cases]),
        ("at equal pace", [case.paced_error(hardware) for case in cases]),
    ):
        middle, mean = statistics.median(map(abs, errors)), statistics.mean(errors)
        print(f"{name:<20}median {middle:.1%}, mean signed {mean:+.1%}")
    slowness = [case.slowness(hardware) for case in cases]
    print(f"pace                {min(slowness):.2f} to {max(slowness):.2f} times the profile's seconds")
    print(f"Spearman            {spearman(predicted, measured):.3f}")
    print(f"regret              {chosen.measured_seconds / min(measured) - 1.0:.1%} ({chosen.plan.layout.short()})")
    if all(case.seconds[1:] for case in cases):
        one, other = halves(cases)
        apart = statistics.median(abs(a / b - 1.0) for a, b in zip(one, other, strict=True))
        again = other[one.index(min(one))] / min(other) - 1.0
        print(f"noise floor         {apart:.1%} (two halves of the rounds, median over layouts)")
        print(f"  of Spearman       {spearman(one, other):.3f} (one half against the other)")
        print(f"  of regret         {again:.1%} (the best of one half in the other)")


def show_parts(cases: Sequence[Case], hardware: HardwareProfile) -> None:
    """Each part over all layouts: seconds predicted and measured, summed, and the median ratio."""
    totals: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name, predicted, measured in part_rows(case, hardware):
            totals.setdefault(name, []).append((predicted, measured))
    print(f"\n{'part, over all layouts':<26}{'predicted':>10}{'measured':>10}{'median ratio':>14}")
    for name, pairs in totals.items():
        ratios = [p / m for p, m in pairs if m > 1e-4]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "none"
        predicted, measured = (sum(column) for column in zip(*pairs, strict=True))
        print(f"{name:<26}{predicted:>9.2f}s{measured:>9.2f}s{ratio:>14}")
