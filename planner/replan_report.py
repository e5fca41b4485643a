"""What `replan` prints: the plan before and after, and what the steps that are left cost. Nothing here prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from .plan import Plan
from .quantity_text import bytes_text, seconds_text
from .replanning import Replan
from .report import plain_table


def replan_report(found: Replan, run_dir: Path, kept: Path | None) -> RenderableType:
    """A row a plan; then where both are and how to go on."""
    job, before = found.before.job, found.before
    head = Text()
    head.append(before.model.name, style="bold")
    head.append(
        f", batch {job.global_batch} × {job.sequence} tokens, after step {found.steps_done:,} of {found.steps:,}"
    )
    table = plain_table(
        "", "plan", "devices", "step", "peak memory", f"{found.steps_left:,} steps left", "GPU-hours", "layout"
    )
    table.columns[-1].justify = "left"
    for name, plan in (("before", before), ("after", found.after)):
        table.add_row(name, *_figures(found, plan), plan.layout.short())
    slower = found.after.prediction.step_seconds / before.prediction.step_seconds
    hours = found.gpu_hours_left(found.after) - found.gpu_hours_left(before)
    parts: list[RenderableType] = [
        head,
        table,
        Text(f"\neach step takes {slower:.2f} × the seconds, all that is left {hours:+,.3g} GPU-hours"),
    ]
    if found.dropped:
        parts.append(Text(f"nothing fits under what the job pins or bans, so without it: {', '.join(found.dropped)}"))
    where = f"plan written to {run_dir / 'plan.yaml'}"
    if kept is not None:
        where += f", the one before it is {kept.name}"
    parts.append(Text(f"{where}; go on with: cli.py train --run-dir {run_dir} --resume"))
    return Group(*parts)


def _figures(found: Replan, plan: Plan) -> tuple[str, ...]:
    return (
        f"{plan.layout.world_size}",
        seconds_text(plan.prediction.step_seconds),
        bytes_text(plan.prediction.peak_memory_bytes),
        _duration(found.seconds_left(plan)),
        f"{found.gpu_hours_left(plan):,.3g}",
    )


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else seconds_text(seconds)
