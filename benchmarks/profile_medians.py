"""Several profiles of one machine -> one: the median of each point and figure, against a pace that drifts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from profiles.hardware import POINT_LISTS, HardwareProfile


def merge_profiles(profiles: Sequence[HardwareProfile]) -> HardwareProfile:
    """The profile with the median of every point, over the profiles that have it, and of every single figure.

    What was measured, where and with which libraries is the first one's; `sessions` in its provenance says when each
    was measured and at which pace.
    """
    first = profiles[0]
    lists = {name: _medians(getattr(p, name) for p in profiles) for name in POINT_LISTS}
    figures = {
        f.name: statistics.median(getattr(p, f.name) for p in profiles) for f in fields(first) if f.type == "float"
    }
    peaks = {
        dtype: statistics.median(p.peak_flops_per_second[dtype] for p in profiles if dtype in p.peak_flops_per_second)
        for dtype in first.peak_flops_per_second
    }
    paces = [p.provenance["pace"] for p in profiles if p.provenance.get("pace")]
    pace = None
    if paces:
        pace = {
            "median_seconds": statistics.median(p["median_seconds"] for p in paces),
            "fastest_seconds": min(p["fastest_seconds"] for p in paces),
            "slowest_seconds": max(p["slowest_seconds"] for p in paces),
        }
    sessions = [{"date": p.provenance.get("date"), "pace": p.provenance.get("pace")} for p in profiles]
    provenance = {**first.provenance, "pace": pace, "sessions": sessions}
    return replace(first, peak_flops_per_second=peaks, provenance=provenance, **figures, **lists)


def _medians(lists: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(
        replace(
            same[0],
            **{
                f.name: statistics.median(getattr(p, f.name) for p in same)
                for f in fields(same[0])
                if f.type == "float"
            },
        )
        for same in same_points(lists)
    )


def same_points(lists: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Points that measured the same (all but their decimal fields agree; the n-th such of each list) together."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for points in lists:
        seen: dict[tuple[Any, ...], int] = {}
        for point in points:
            what = tuple(getattr(point, f.name) for f in fields(point) if f.type != "float")
            seen[what] = seen.get(what, 0) + 1
            found.setdefault((*what, seen[what]), []).append(point)
    return list(found.values())
