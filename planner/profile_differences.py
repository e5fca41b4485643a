"""Two hardware profiles beside each other: figures, seconds of the points both have or can price, what one lacks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from profiles.hardware import HardwareProfile
from profiles.points import DIRECTIONS, AttentionPoint, GemmPoint

from .quantity_text import seconds_text
from .report import plain_table

_SAME = 1e-3  # figures closer than this are not listed
_NOMINAL_SIDES = (512, 1024, 2048, 4096, 8192)  # square products where both sides have no more than a model
_NOMINAL_SEQUENCES = (1024, 2048, 4096, 8192)
_Point = Any  # one of the kinds in profiles.points


@dataclass(frozen=True)
class _Kind:
    """One list of a profile: which fields make a part of it, and what prices a point that was not measured."""

    key: str
    part_fields: tuple[str, ...]
    price: Callable[[HardwareProfile, _Point], float | None]

    def part(self, point: _Point) -> str:
        values = [getattr(point, name) for name in self.part_fields]
        if self.key == "collectives":
            operation, ranks, stride, uneven = values
            return f"{operation.replace('_', ' ')}{' uneven' * uneven}, {ranks} ranks, stride {stride}"
        name = {"many_gemm": "products", "gemm": "GEMM"}.get(self.key, self.key)
        return " ".join([name, *values]).replace("_", " ")

    def shape(self, point: _Point) -> str:
        """What tells the point from the others of its part; what is at its default goes without saying."""
        left_out = {*self.part_fields, "seconds", "spread"}
        told = [f for f in fields(point) if f.name not in left_out and getattr(point, f.name) != f.default]
        words = (f"{'' if f.type == 'str' else f.name + ' '}{getattr(point, f.name)}" for f in told)
        return " ".join(words).replace("_", " ")

    def points(self, hardware: HardwareProfile) -> dict[str, dict[str, _Point]]:
        """Measured points by part and shape."""
        parts: dict[str, dict[str, _Point]] = {}
        for point in getattr(hardware, self.key):
            parts.setdefault(self.part(point), {})[self.shape(point)] = point
        return parts


# ---- what prices a point; corrections are left out, since measured seconds have none ------------------------


def _gemm(hardware: HardwareProfile, p: GemmPoint) -> float | None:
    measured = any((q.dtype, q.operation) == (p.dtype, p.operation) for q in hardware.gemm)
    if not measured and not any(m.dtype == p.dtype for m in hardware.gemm_models):
        return None
    return hardware.gemm_seconds(p.operation, p.dtype, p.m, p.n, p.k) / hardware.correction("gemm")


def _attention(hardware: HardwareProfile, p: AttentionPoint) -> float | None:
    def plain(q: AttentionPoint) -> bool:
        return q.causal and not q.kv_heads and q.backend == "default"

    kind = (p.dtype, p.direction)
    measured = any((q.dtype, q.direction) == kind and plain(q) for q in hardware.attention)
    if not plain(p) or not (measured or any(m.dtype == p.dtype for m in hardware.attention_models)):
        return None
    seconds = hardware.attention_seconds(p.direction, p.dtype, p.batch, p.heads, p.sequence, p.head_dim)
    return seconds / hardware.correction("attention")


def _memory(hardware: HardwareProfile, p: _Point) -> float | None:
    part = "optimizer" if p.operation in ("adamw", "gradient_norm") else "memory"
    seconds = hardware.memory_seconds(p.operation, p.dtype, p.elements, p.direction) / hardware.correction(part)
    return seconds or None


def _collective(hardware: HardwareProfile, p: _Point) -> float | None:
    return None if p.uneven else hardware.collective_seconds(p.operation, p.ranks, p.bytes, p.stride)


_KINDS = (
    _Kind("gemm", ("dtype",), _gemm),
    _Kind("many_gemm", ("kind", "dtype"), lambda hardware, p: None),
    _Kind("attention", ("dtype", "direction"), _attention),
    _Kind("memory", ("operation",), _memory),
    _Kind("collectives", ("operation", "ranks", "stride", "uneven"), _collective),
)


def _nominal(here: HardwareProfile, there: HardwareProfile, kind: _Kind) -> dict[str, dict[str, _Point]]:
    """Shapes at which models are compared, for parts that neither side has measured."""
    points: list[_Point] = []
    if kind.key == "gemm":
        dtypes = {m.dtype for m in (*here.gemm_models, *there.gemm_models)}
        points = [
            GemmPoint(dtype=dtype, operation="forward", m=s, n=s, k=s, seconds=1.0)
            for dtype in sorted(dtypes)
            for s in _NOMINAL_SIDES
        ]
    if kind.key == "attention":
        dtypes = {m.dtype for m in (*here.attention_models, *there.attention_models)}
        points = [
            AttentionPoint(dtype=d, direction=way, batch=1, heads=16, sequence=s, head_dim=128, seconds=1.0)
            for d in sorted(dtypes)
            for way in DIRECTIONS
            for s in _NOMINAL_SEQUENCES
        ]
    parts: dict[str, dict[str, _Point]] = {}
    for point in points:
        parts.setdefault(kind.part(point), {})[kind.shape(point)] = point
    return parts


# ---- the report ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartDifference:
    """Seconds of one part, the other profile's over this one's, with the shape where they differ most.

    `priced` says that on one side at least the seconds are interpolated or modelled, not measured at that shape.
    """

    part: str
    points: int
    priced: bool
    median: float
    least: float
    most: float
    largest_at: str
    seconds: tuple[float, float]


def part_differences(
    hardware: HardwareProfile, other: HardwareProfile
) -> tuple[list[PartDifference], list[str], list[str]]:
    """(parts that both know, parts that only `hardware` knows, parts that only `other` knows)."""
    found: list[PartDifference] = []
    only_here: list[str] = []
    only_there: list[str] = []
    for kind in _KINDS:
        mine, theirs, nominal = kind.points(hardware), kind.points(other), _nominal(hardware, other, kind)
        for part in dict.fromkeys([*mine, *theirs, *nominal]):
            a, b = mine.get(part, {}), theirs.get(part, {})
            shared = [shape for shape in a if shape in b]
            points = {shape: a[shape] for shape in shared} or a | b or nominal[part]
            seconds = [
                (
                    shape,
                    a[shape].seconds if shape in a else kind.price(hardware, point),
                    b[shape].seconds if shape in b else kind.price(other, point),
                )
                for shape, point in points.items()
            ]
            pairs = [(shape, x, y) for shape, x, y in seconds if x is not None and y is not None]
            if pairs:
                found.append(_difference(part, pairs, priced=not shared))
                continue
            note = " (other shapes)" if a and b else ""
            if any(x is not None for _, x, _ in seconds):
                only_here.append(part + note)
            if any(y is not None for _, _, y in seconds):
                only_there.append(part + note)
    return found, only_here, only_there


def _difference(part: str, pairs: list[tuple[str, float, float]], *, priced: bool) -> PartDifference:
    ratios = [there / here for _, here, there in pairs]
    shape, here, there = max(pairs, key=lambda pair: abs(math.log(pair[2] / pair[1])))
    return PartDifference(
        part=part,
        points=len(pairs),
        priced=priced,
        median=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        largest_at=shape,
        seconds=(here, there),
    )


def difference_report(hardware: HardwareProfile, other: HardwareProfile) -> RenderableType:
    """What differs between two profiles, `other` over `hardware`."""
    head = Text()
    for name, profile in (("this", hardware), ("other", other)):
        told = [
            profile.device,
            profile.backend,
            str(profile.provenance.get("date", profile.provenance.get("kind", ""))),
        ]
        head.append(f"{name:5}", style="bold")
        head.append(f"  {profile.name}: {', '.join(filter(None, told))}\n")
    parts: list[RenderableType] = [head]
    figures = plain_table("figures that differ", "figure", "this", "other", "other / this")
    for name, mine, theirs in _figures(hardware, other):
        ratio = f"{theirs / mine:.3f}" if mine and theirs else ""
        figures.add_row(name, *("none" if value is None else f"{value:.4g}" for value in (mine, theirs)), ratio)
    parts.append(figures if figures.row_count else Text("all figures are the same"))
    found, only_here, only_there = part_differences(hardware, other)
    same = [d.part for d in found if max(abs(d.least - 1), abs(d.most - 1)) <= _SAME]
    differing = [d for d in found if d.part not in same]
    if differing:
        parts.append(_part_table(differing))
    if same:
        parts.append(Text(f"\nthe same at every point: {'; '.join(same)}"))
    for name, missing in (("this", only_here), ("other", only_there)):
        if missing:
            parts.append(Text(f"\nonly {name} has: {'; '.join(missing)}"))
    return Group(*parts)


def _part_table(found: list[PartDifference]) -> RenderableType:
    table = plain_table("", "part", "points", "median", "range")
    table.add_column("most different", no_wrap=False)
    for d in found:
        here, there = (seconds_text(value) for value in d.seconds)
        table.add_row(
            d.part,
            f"{'~' if d.priced else ''}{d.points}",
            f"{d.median:.3g}",
            f"{d.least:.3g} to {d.most:.3g}",
            f"{d.largest_at}: {here}, {there}",
        )
    title = "\nseconds, other / this (~ interpolated or modelled on one side at least)"
    return Group(Text(title, style="bold"), table)  # a table's own title wraps at its width


def _figures(hardware: HardwareProfile, other: HardwareProfile) -> Iterator[tuple[str, float | None, float | None]]:
    """Single figures that differ, by name: the profile's own, peaks, corrections."""
    for f in fields(HardwareProfile):
        mine, theirs = getattr(hardware, f.name), getattr(other, f.name)
        number = all(value is None or isinstance(value, int | float) for value in (mine, theirs))
        if number and _differ(mine, theirs):
            yield f.name.replace("_", " "), mine, theirs
    for key, prefix in (("peak_flops_per_second", "peak flops per second, "), ("corrections", "correction of ")):
        mine, theirs = getattr(hardware, key), getattr(other, key)
        default = 1.0 if key == "corrections" else None
        for name in dict.fromkeys([*mine, *theirs]):
            if _differ(mine.get(name, default), theirs.get(name, default)):
                yield prefix + name, mine.get(name, default), theirs.get(name, default)


def _differ(mine: float | None, theirs: float | None) -> bool:
    if mine is None or theirs is None:
        return mine is not theirs
    return abs(mine - theirs) > _SAME * max(abs(mine), abs(theirs))
