"""What people read of a hardware profile that was measured or published, and of the catalogue as a whole."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.alpha_beta import Sample, fit
from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile
from profiles.lists_in_words import first_of
from profiles.model import ModelSpec
from profiles.points import DIRECTIONS, DTYPES, FSDP_COLLECTIVES, SUM_OF_SCALARS, CollectivePoint

from .profile_differences import difference_report
from .profile_figures import best_attention, best_gemm, bus_bandwidth, by_size, flops_unit, gemm_errors, quantile
from .profile_plots import profile_plots
from .quantity_text import bytes_text, figure_text, seconds_text, size_text
from .report import plain_table

__all__ = ["catalogue_report", "difference_report", "profile_report", "show_report"]

NOISY = 0.2  # a spread above it: the seconds are a guess, and the machine was not quiet
_MOST_SIZES, _MOST_GROUPS, _MOST_NAMED = 5, 20, 4  # columns and rows of a table; items of a list in words
_Group = tuple[str, bool, int, int]  # operation, uneven, ranks, stride
_POINTS = ("gemm", "gemm_checks", "many_gemm", "attention", "memory", "collectives")
# Conditions of the machine by their key, as deep in provenance as it may stand: what to call it, scale, unit.
_CONDITIONS = {
    "sm_clock_hertz": ("SM clock", 1e9, "GHz"),
    "cpu_clock_hertz": ("CPU clock", 1e9, "GHz"),
    "temperature_celsius": ("GPU", 1.0, "°C"),
    "cpu_temperature_celsius": ("CPU", 1.0, "°C"),
    "power_watts": ("power", 1.0, "W"),
}


# ---- one profile -----------------------------------------------------------------------------------------


def profile_report(hardware: HardwareProfile) -> RenderableType:
    """What was measured, on one screen: conditions, rates, overheads, collectives with their fit, spread."""
    parts: list[RenderableType] = [_head(hardware), _rates(hardware), "", _scalars(hardware)]
    if by_size(hardware):
        parts += [_collectives(hardware), _fits(hardware)]
    return Group(*parts, _spread(hardware))


def show_report(hardware: HardwareProfile) -> RenderableType:
    """`profile_report`, then plots of what was measured, and of the models and what they rest on where nothing was."""
    return Group(profile_report(hardware), *profile_plots(hardware))


def _head(hardware: HardwareProfile) -> Text:
    known = hardware.provenance
    head = Text()
    head.append(hardware.device, style="bold")
    node = f", {hardware.devices_per_node} a node" if hardware.devices_per_node else ""
    ranks = f", {known['ranks']} ranks at once" if "ranks" in known else ""
    head.append(f" ({hardware.name}), {hardware.backend}{ranks}{node}, {bytes_text(hardware.memory_bytes)} each\n")
    torch = next((value for key, value in _leaves(known) if key == "torch"), None)
    said = [str(known.get("kind", "")), str(known.get("date", "")), f"torch {torch}" if torch else ""]
    found: dict[str, list[float]] = {}
    for key, value in _leaves(known.get("conditions")):
        if key in _CONDITIONS and isinstance(value, int | float):
            found.setdefault(key, []).append(value / _CONDITIONS[key][1])
    for key, (name, _, unit) in _CONDITIONS.items():
        if key in found:
            said.append(f"{name} {_range(found[key], unit)}")
    head.append(", ".join(filter(None, said)) + "\n")
    if known.get("complete") is False:
        head.append("not complete: `cli.py profile --resume` goes on from here\n", style="yellow")
    cases = known.get("cases")
    skipped = known.get("skipped") or (cases.get("skipped") if isinstance(cases, dict) else None)
    if skipped:
        items = [f"{name}, {why}" for name, why in skipped.items()] if isinstance(skipped, dict) else skipped
        items = [str(item) for item in items] if isinstance(items, list | tuple) else [str(items)]
        head.append(f"skipped, {len(items)}: {first_of(items, _MOST_NAMED, '; ')}\n", style="yellow")
    if left_out := [name for names in hardware.left_out.values() for name in names]:
        named = f"no time for {len(left_out)}: {first_of(left_out, _MOST_NAMED)}"
        head.append(f"{named}; `cli.py profile --resume` measures them\n", style="yellow")
    return head


def _range(values: Sequence[float], unit: str) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, str(name))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _leaves(value, key)
    else:
        yield key, content


def _rates(hardware: HardwareProfile) -> Table:
    unit, scale = flops_unit(hardware)
    columns = ("GEMM points", "best", "peak", "held out", "error p50", "p90", "attention points", "forward", "backward")
    table = plain_table(f"compute, {unit}; error of the GEMM grid on the shapes held out from it", "dtype", *columns)
    known = {p.dtype for p in (*hardware.gemm, *hardware.gemm_models)} | set(hardware.peak_flops_per_second)
    for dtype in (d for d in DTYPES if d in known):
        errors = gemm_errors(hardware, dtype)
        rates = [best_gemm(hardware, dtype), hardware.peak_flops_per_second.get(dtype)]
        rates += [best_attention(hardware, dtype, direction) for direction in DIRECTIONS]
        best, peak, forward, backward = ("" if rate is None else figure_text(rate / scale) for rate in rates)
        gemm = _points(dtype, hardware.gemm, hardware.gemm_models)
        attention = _points(dtype, hardware.attention, hardware.attention_models)
        shown = [f"{quantile(errors, share):.1%}" for share in (0.5, 0.9)] if errors else ["", ""]
        table.add_row(dtype, gemm, best, peak, str(len(errors) or ""), *shown, attention, forward, backward)
    return table


def _contention(hardware: HardwareProfile) -> list[tuple[str, str]]:
    """(what, slowdowns): of a GEMM, and of what is bound by memory with all that were measured."""
    points = hardware.contention_points
    most = max((p.active for p in points), default=0)
    beside = [(f"{p.active} computing", p.slowdown) for p in points if not p.memory_bytes]
    memory = [(bytes_text(p.memory_bytes), p.slowdown) for p in points if p.memory_bytes and p.active == most]
    rows = (("contention", beside), (f"of memory, {most} computing", memory))
    return [(name, ", ".join(f"{what} × {slowdown:.2f}" for what, slowdown in each)) for name, each in rows]


def _points(dtype: str, measured: Sequence[Any], models: Sequence[Any]) -> str:
    number = sum(point.dtype == dtype for point in measured)
    return str(number or ("modelled" if any(model.dtype == dtype for model in models) else "none"))


def _scalars(hardware: HardwareProfile) -> Table:
    h = hardware
    links = [("to device", h.host_to_device_bytes_per_second), ("to host", h.device_to_host_bytes_per_second)]
    bandwidths = [f"{figure_text(h.memory_bandwidth_bytes_per_second / 1e9)} GB/s"]
    bandwidths += [f"{name} {figure_text(rate / 1e9)} GB/s" for name, rate in links if rate]
    overheads = [
        ("launch", h.launch_seconds),
        ("microbatch", h.microbatch_overhead_seconds),
        ("tp shard", h.shard_overhead_seconds),
        ("with sequence", h.sequence_shard_overhead_seconds),
        ("of large blocks", max((p.seconds for p in h.shard_overheads), default=0.0)),
        ("parameter", h.parameter_overhead_seconds),
        ("operation", h.operation_overhead_seconds),
        ("in a split backward", h.split_overhead_seconds),
        ("in selective recomputation", h.selective_overhead_seconds),
        ("FSDP forward", h.fsdp_forward_overhead_seconds),
        ("FSDP backward", h.fsdp_backward_overhead_seconds),
        ("message", h.message_overhead_seconds),
    ]
    overlap = f"compute × {h.overlap_compute_slowdown:.2f}, communication × {h.overlap_communication_slowdown:.2f}"
    if h.overlap:
        sides = ([p.compute_slowdown for p in h.overlap], [p.communication_slowdown for p in h.overlap])
        compute, communication = (f"{min(side):.2f} to {max(side):.2f}" for side in sides)
        overlap += f"; measured {compute} and {communication}"
    summed = [p for p in h.collectives if p.operation == SUM_OF_SCALARS]
    scalars = [f"summed over {p.ranks} ranks in {seconds_text(p.seconds)}" for p in summed]
    held = f"context {bytes_text(h.context_bytes)}, a communicator {bytes_text(h.communicator_bytes)}"
    held += f", allocator slack {h.allocator_slack:.1%}"
    lines = [
        ("memory bandwidth", ", ".join(bandwidths)),
        ("overheads", ", ".join(f"{name} {seconds_text(value)}" for name, value in overheads if value > 0)),
        ("loss and norm", ", ".join(scalars)),
        ("overlap", overlap),
        ("stragglers", f"× {h.straggler_slowdown:.3f}"),
        *_contention(h),
        ("memory held", held),
        ("corrections", ", ".join(f"{part} × {factor:.3f}" for part, factor in h.corrections.items())),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, text in lines:
        if text:
            grid.add_row(Text(name, style="dim"), Text(text))
    return grid


def _collectives(hardware: HardwareProfile) -> RenderableType:
    """Seconds by group and size; sizes that differ by a rounding share a column."""
    columns: list[list[int]] = []
    for size in sorted({p.bytes for p in by_size(hardware)}):
        if columns and size <= 1.05 * columns[-1][0]:
            columns[-1].append(size)
        else:
            columns.append([size])
    last = len(columns) - 1
    shown = sorted({round(i * last / (_MOST_SIZES - 1)) for i in range(_MOST_SIZES)} if last else {0})
    names = [size_text(columns[i][-1]) for i in shown]
    groups: dict[_Group, list[CollectivePoint]] = {}
    for p in by_size(hardware):
        groups.setdefault((p.operation, p.uneven, p.ranks, p.stride), []).append(p)
    listed = _listed(sorted(groups))
    title = f"\ncommunication, {len(listed)} of {len(groups)} groups and {len(shown)} of {last + 1} sizes"
    title += "; bus bandwidth in GB/s at the largest"
    table = plain_table("", "operation", "ranks", "stride", *names, "bus")
    for operation, uneven, ranks, stride in listed:
        points = groups[operation, uneven, ranks, stride]
        cells = [next((seconds_text(p.seconds) for p in points if p.bytes in columns[i]), "") for i in shown]
        bus = "" if uneven else figure_text(bus_bandwidth(max(points, key=lambda p: p.bytes)) / 1e9)
        table.add_row(operation.replace("_", " ") + " uneven" * uneven, str(ranks), str(stride), *cells, bus)
    return Group(Text(title, style="bold"), table)  # a table's own title wraps at its width


def _listed(groups: Sequence[_Group]) -> list[_Group]:
    """All of them where a screen holds them, else the smallest and the largest of each operation."""
    if len(groups) <= _MOST_GROUPS:
        return list(groups)
    operations = dict.fromkeys(group[:2] for group in groups)
    alike = [[group for group in groups if group[:2] == operation] for operation in operations]
    return [group for some in alike for group in dict.fromkeys((some[0], max(some, key=lambda g: (g[2], -g[3]))))]


def _fits(hardware: HardwareProfile) -> Table:
    """The α-β formula over each operation's points, those across nodes apart where the width of a node is known."""
    columns = ("points", "once", "a step", "GB/s", "ramp", "error p50", "worst")
    table = plain_table("\ncommunication as α-β with a ramp", "operation", *columns)
    groups: dict[str, list[Sample]] = {}
    for p in by_size(hardware):
        if not p.uneven:
            across = hardware.devices_per_node and p.ranks * p.stride > hardware.devices_per_node
            name = p.operation.replace("_", " ") + (", across nodes" if across else "")
            sample = Sample(FSDP_COLLECTIVES.get(p.operation, p.operation), p.ranks, p.bytes, p.seconds)
            groups.setdefault(name, []).append(sample)
    for name, samples in sorted(groups.items()):
        fitted = fit(samples)
        if fitted is None:
            table.add_row(name, str(len(samples)), "two sizes needed")
            continue
        f, errors = fitted.figures, sorted(abs(residual) for residual in fitted.residuals)
        table.add_row(
            name,
            str(len(samples)),
            seconds_text(f.fixed_seconds),
            seconds_text(f.step_seconds),
            figure_text(f.bandwidth_bytes_per_second / 1e9),
            size_text(f.ramp_bytes) if f.ramp_bytes else "none",
            f"{statistics.median(errors):.0%}",
            f"{errors[-1]:.0%}",
        )
    return table


def _spread(hardware: HardwareProfile) -> Text:
    """A spread of 0 is one that was not recorded (nccl-tests prints none)."""
    spreads = [point.spread for key in _POINTS for point in getattr(hardware, key)]
    known = [spread for spread in spreads if spread > 0]
    if not known:
        return Text(f"\n{len(spreads)} points, spread not recorded" if spreads else "\nno points: nothing was measured")
    noisy = sum(spread > NOISY for spread in known)
    return Text(
        f"\n{len(spreads)} points, {len(known)} with a spread (interquartile range over median): "
        f"median {statistics.median(known):.1%}, {noisy} noisy, above {NOISY:.0%}"
    )


# ---- the catalogue ---------------------------------------------------------------------------------------


def catalogue_report(
    models: Sequence[ModelSpec], clusters: Sequence[ClusterSpec], hardware: Sequence[HardwareProfile]
) -> RenderableType:
    """What can be named on the command line: models, clusters and the hardware that they are made of."""
    return Group(
        _models(models),
        _clusters(clusters),
        _hardware(hardware),
        Text("\nto add one: CONTRIBUTING.md says how, a YAML file each"),
    )


def _left(table: Table, *columns: str) -> Table:
    """The table, with words and not figures in these columns."""
    for column in table.columns:
        if column.header in columns:
            column.justify = "left"
    return table


def _models(models: Sequence[ModelSpec]) -> Table:
    columns = ("layers", "hidden", "parameters, B", "active, B", "experts")
    table = _left(plain_table("models", "name", "family", *columns), "family")
    for m in models:
        active = f"{m.active_parameters / 1e9:.3g}" if m.active_parameters < m.parameters else ""
        experts = f"{m.experts.number}, {m.experts.top_k} a token" if m.experts else ""
        figures = (str(m.layers), f"{m.hidden_size:,}", figure_text(m.parameters / 1e9), active, experts)
        table.add_row(m.name, m.family, *figures)
    return table


def _clusters(clusters: Sequence[ClusterSpec]) -> Table:
    tiers = "GB/s a device, tier by tier"
    table = plain_table("\nclusters, as NAME:NODES", "name", "hardware", "devices a node", "most nodes", tiers)
    _left(table, "hardware", tiers)
    for c in clusters:
        links = ", ".join(f"{link.tier} {figure_text(link.bandwidth_bytes_per_second / 1e9)}" for link in c.links)
        most = c.links[-1].span // c.devices_per_node
        table.add_row(c.name, c.hardware, str(c.devices_per_node), f"{most:,}", links)
    return table


def _hardware(hardware: Sequence[HardwareProfile]) -> Table:
    columns = ("GiB", "dtype", "peak", "GEMM", "kind")
    table = plain_table("\nhardware: TFLOP/s at peak and as a GEMM achieves it", "name", "device", *columns)
    _left(table, "device", "dtype", "kind")
    for h in hardware:
        peaks = h.peak_flops_per_second
        dtype = "bf16" if "bf16" in peaks else max(peaks, key=lambda key: peaks[key], default="")
        rates = [peaks.get(dtype), best_gemm(h, dtype)]
        shown = ("" if rate is None else figure_text(rate / 1e12) for rate in rates)
        kind = str(h.provenance.get("kind", ""))
        table.add_row(h.name, h.device, f"{h.memory_bytes / 2**30:,.0f}", dtype, *shown, kind)
    return table
