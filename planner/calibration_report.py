"""What calibrating changed, part by part, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .calibrate import CalibrationRow
from .quantity_text import seconds_text
from .report import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType


def calibration_report(rows: Sequence[CalibrationRow], path: Path) -> RenderableType:
    """Predicted without any correction beside measured, and the factor of each part before and now."""
    from rich.console import Group
    from rich.text import Text

    table = plain_table(
        "measured runs against the profile", "part", "runs", "uncorrected", "measured", "factor before", "factor now"
    )
    for row in rows:
        table.add_row(
            row.part,
            str(row.runs),
            seconds_text(row.predicted_seconds),
            seconds_text(row.measured_seconds),
            f"{row.before:.3f}",
            f"{row.after:.3f}",
        )
    note = Text(
        f"\nwritten to {path}: the points are as they were measured, plans multiply each part by its factor; "
        "delete `corrections` there to undo it"
    )
    return Group(table, note)
