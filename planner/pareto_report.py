"""A front as a table and a terminal plot. Nothing here prints."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from .pareto import Front
from .profile_plots import Axis, Series, plot
from .quantity_text import bytes_text, seconds_text
from .report import plain_table


def front_report(found: Front) -> RenderableType:
    """A row a point, its letter in the plot; what others beat in both is marked and not joined."""
    by_devices = found.kind == "devices"
    table = plain_table(
        f"step against {'devices' if by_devices else 'memory per device'}",
        "devices" if by_devices else "limit",
        "step",
        "tokens/s",
        "GPU-hours per billion tokens",
        "peak memory",
        "layout",
    )
    table.columns[-1].justify = "left"
    for point in found.points:
        layout = point.layout.short()
        if not point.on_front:
            layout += "  (beaten)"
        elif point.gap > 0:
            layout += f"  (at most {point.gap:.1%} from the best)"
        table.add_row(
            f"{point.devices}" if by_devices else bytes_text(point.limit_bytes),
            seconds_text(point.step_seconds),
            f"{point.tokens_per_second:,.0f}",
            f"{point.gpu_hours_per_billion_tokens:,.4g}",
            bytes_text(point.peak_memory_bytes),
            layout,
        )
    parts: list[RenderableType] = [table]
    if found.ended is not None:
        where = f"on {found.ended:.0f} devices" if by_devices else f"under {bytes_text(found.ended)}"
        parts.append(Text(f"no plan {where}"))
    return Group(*parts, Text(), _plot(found))


def _plot(found: Front) -> RenderableType:
    by_devices = found.kind == "devices"

    def of(on_front: bool) -> tuple[tuple[float, float], ...]:
        points = [point for point in found.points if point.on_front == on_front]
        xs = [float(point.devices) if by_devices else point.peak_memory_bytes for point in points]
        return tuple(sorted((x, point.step_seconds) for x, point in zip(xs, points, strict=True)))

    series = [Series("the front", of(True), joined=True)]
    if beaten := of(False):
        series.append(Series("beaten", beaten))
    x = Axis("devices", 2, lambda n: f"{n:.0f}") if by_devices else Axis("peak memory per device", 2, bytes_text)
    return plot(series, x, "seconds a step")
