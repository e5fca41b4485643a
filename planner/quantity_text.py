"""Quantities as a reader wants them: three significant figures and a unit."""

from __future__ import annotations

import math


def seconds_text(seconds: float) -> str:
    """In s, ms or µs, from 999.5 s on whole seconds."""
    if seconds >= 1:
        return f"{figure_text(seconds)} s"
    scale, unit = (1e3, "ms") if seconds >= 1e-3 or seconds == 0 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"


def bytes_text(size_bytes: float) -> str:
    """GiB, or MiB below one GiB, with as many digits as a memory limit is compared by."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def size_text(size_bytes: float) -> str:
    """Bytes as one word of a column: "4 MiB"."""
    power = min(3, max(0, int((math.log2(size_bytes) + 0.01) // 10)))
    return f"{size_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def figure_text(value: float) -> str:
    """Three significant figures, from 999.5 on a whole number: "12,300", "9.9", "0.012"."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
