"""A hardware profile drawn in the terminal: efficiency against FLOPs, bandwidth against size; plotext is used here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from rich.console import Group, RenderableType
from rich.text import Text

from profiles.hardware import HardwareProfile
from profiles.points import DTYPES, CollectivePoint

from .profile_figures import best_gemm, bus_bandwidth, by_size, flops_unit
from .quantity_text import figure_text, size_text

_WIDTH, _HEIGHT = 100, 20
_SIDES = [2**power for power in range(7, 15)]  # of the square products at which a model is drawn
# Figures beside the models by their key in provenance, which says where a catalogue profile has them from.
_SOURCED = {
    "peak_flops_per_second": "peak",
    "memory_bandwidth_bytes_per_second": "memory bandwidth",
    "launch_seconds": "launch",
    "overlap_compute_slowdown": "compute beside communication",
    "overlap_communication_slowdown": "communication beside compute",
}
_SI = ("", " k", " M", " G", " T", " P")


@dataclass(frozen=True)
class Axis:
    """A logarithmic x axis: its name, what its ticks are powers of, and how a value is written."""

    label: str
    base: float
    text: Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name; `joined` where a line between them means something."""

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = False


def profile_plots(hardware: HardwareProfile) -> list[RenderableType]:
    """Plots of what was measured, and of the models where nothing was, with what those rest on."""
    parts: list[RenderableType] = []
    measured = [d for d in DTYPES if any(p.dtype == d for p in hardware.gemm)]
    modelled = [model.dtype for model in hardware.gemm_models if model.dtype not in measured]
    if measured:
        parts += [Text("\nGEMM: FLOP/s of each measured product", style="bold"), _efficiency(hardware, measured)]
    if modelled:
        parts += [_sources(hardware), Text("\nGEMM: FLOP/s of square products, by the model", style="bold")]
        parts += [_modelled_efficiency(hardware, modelled)]
    if any(not p.uneven for p in by_size(hardware)):
        parts += [Text("\ncollectives: bus bandwidth of the largest group", style="bold"), _bandwidths(hardware)]
    return parts


def _sources(hardware: HardwareProfile) -> RenderableType:
    """What each model says and where that is from."""
    unit, scale = flops_unit(hardware)
    lines = [Text("\nnot measured but modelled", style="bold")]
    for m in hardware.gemm_models:
        tiles = f", {m.units} tiles at once" if m.units else ""
        rate = figure_text(m.achievable_flops_per_second / scale)
        lines.append(Text(f"GEMM {m.dtype}: {rate} {unit}{tiles}; {m.source or 'no source'}"))
    for m in hardware.attention_models:
        rates = [figure_text(f / scale) for f in (m.forward_flops_per_second, m.backward_flops_per_second)]
        lines.append(Text(f"attention {m.dtype}: {' and '.join(rates)} {unit}; {m.source or 'no source'}"))
    for key, name in _SOURCED.items():
        if isinstance(hardware.provenance.get(key), str):
            lines.append(Text(f"{name}: {hardware.provenance[key]}"))
    return Group(*lines)


# ---- what is drawn -----------------------------------------------------------------------------------------


def _efficiency(hardware: HardwareProfile, dtypes: Sequence[str]) -> RenderableType:
    series = []
    for dtype in dtypes:
        best = best_gemm(hardware, dtype) or math.inf
        shapes = [(2.0 * p.m * p.n * p.k, p.seconds) for p in hardware.gemm if p.dtype == dtype]
        series.append(Series(dtype, tuple((flops, 100 * flops / seconds / best) for flops, seconds in shapes)))
    return plot(series, Axis("FLOPs of the product", 10, _si), "% of best")


def _modelled_efficiency(hardware: HardwareProfile, dtypes: Sequence[str]) -> RenderableType:
    curves: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for dtype in dtypes:
        peak = hardware.peak_flops_per_second.get(dtype) or best_gemm(hardware, dtype) or math.inf
        flops = ((s, 200.0 * s**3 / hardware.gemm_seconds("forward", dtype, s, s, s)) for s in _SIDES)
        curves.setdefault(tuple((s, round(rate / peak, 6)) for s, rate in flops), []).append(dtype)
    series = [Series(" and ".join(names), points, joined=True) for points, names in curves.items()]
    return plot(series, Axis("m = n = k", 2, lambda side: f"{side:.0f}"), "% of peak")


def _bandwidths(hardware: HardwareProfile) -> RenderableType:
    groups: dict[str, dict[tuple[int, int], list[CollectivePoint]]] = {}
    for p in by_size(hardware):
        if not p.uneven:
            groups.setdefault(p.operation, {}).setdefault((p.ranks, -p.stride), []).append(p)
    series = []
    for operation, found in sorted(groups.items()):
        ranks, stride = max(found)
        points = sorted((float(p.bytes), bus_bandwidth(p) / 1e9) for p in found[ranks, stride])
        apart = f", {-stride} apart" if stride < -1 else ""
        series.append(Series(f"{operation.replace('_', ' ')} ({ranks} ranks{apart})", tuple(points), joined=True))
    return plot(series, Axis("size", 2, size_text), "GB/s")


def _si(value: float) -> str:
    power = min(5, int((math.log10(value) + 1e-9) // 3)) if value >= 1 else 0
    return f"{value / 1000**power:.3g}{_SI[power]}"


# ---- drawing -----------------------------------------------------------------------------------------------


def plot(series: Sequence[Series], x: Axis, y_label: str) -> RenderableType:
    """The series as letters, their names above; y from 0 to the largest, the ends of both axes written out.

    plotext has one figure a process: it is emptied before and after, so that nothing is left behind.
    """
    import plotext

    values = [value for s in series for value, _ in s.points]
    low, high = min(values), max(values)
    top = max(height for s in series for _, height in s.points)
    figure = plotext.figure
    plotext.terminal.limit(False, False)  # else a small terminal cuts the plot
    figure.clear()
    figure.theme("colorless").plot_size(_WIDTH, _HEIGHT)
    for s in series:
        if s.joined:
            figure.draw(figure.signal(_logs(s), _heights(s), marker="·").lines(True))
    for letter, s in zip(ascii_lowercase, series, strict=False):
        figure.draw(figure.signal(_logs(s), _heights(s), marker=letter))
    ticks = _ticks(low, high, x.base)
    left, right = math.log(low), math.log(high)
    figure.ruler("x", "lower").lim(left - 0.5 * (low == high), right + 0.5 * (low == high))
    figure.ruler("x", "lower").ticks([math.log(tick) for tick in ticks], [x.text(tick) for tick in ticks])
    figure.ruler("y", "left").lim(0, top)
    figure.ruler("y", "left").ticks([top * i / 4 for i in range(5)], [f"{top * i / 4:.3g}" for i in range(5)])
    figure.label(x.label, "x", "lower").label(y_label, "y", "left")
    drawn = figure.build().string(colorless=True)
    figure.clear()
    plotext.terminal.limit()
    names = ", ".join(f"{letter} {s.name}" for letter, s in zip(ascii_lowercase, series, strict=False))
    lines = "\n".join(line.rstrip() for line in drawn.splitlines())
    return Group(Text(names), Text(lines.rstrip(), no_wrap=True))


def _logs(series: Series) -> list[float]:
    return [math.log(value) for value, _ in series.points]


def _heights(series: Series) -> list[float]:
    return [height for _, height in series.points]


def _ticks(low: float, high: float, base: float) -> list[float]:
    """Both ends, and between them up to four powers of `base` that do not crowd them."""
    if low == high:
        return [low]
    span = math.log(high / low)
    powers = range(math.ceil(math.log(low, base)), math.floor(math.log(high, base)) + 1)
    inner = [base**p for p in powers if min(math.log(base**p / low), math.log(high / base**p)) > span / 10]
    return [low, *inner[:: max(1, math.ceil(len(inner) / 4))], high]
