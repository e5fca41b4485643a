"""What `verify` prints: what was run in the plan's place, and how far it is from a single process."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from .reduced_plan import ReducedPlan
from .report import plain_table

_NOT_LOOKED_AT = "not looked at: what only size shows (memory, speed, overflow), and 16-bit rounding"


def verify_report(reduced: ReducedPlan, verdict: dict[str, Any]) -> RenderableType:
    """`verdict` is `runtime.verify.Verdict` as its `to_dict` has it."""
    plan = reduced.plan
    head = Text(
        f"{plan.layout.short()}, {plan.microbatches} microbatches, on {plan.layout.world_size} ranks beside one "
        f"process: {plan.model.name}, {verdict['steps']} steps of {plan.job.global_batch} × {plan.job.sequence} tokens"
    )
    changes = plain_table("\nwhat was reduced", "", "in the plan", "here", "why")
    changes.columns[-1].justify = "left"
    for change in reduced.changes:
        changes.add_row(change.what, change.before, change.after, change.why)
    checks = plain_table("\nrelative difference", "of the", "precision", "largest", "allowed", "where", "")
    for check in verdict["checks"]:
        checks.add_row(
            check["quantity"],
            check["precision"],
            _difference(check["difference"]),
            f"{check['tolerance']:.0e}",
            f"step {check['step']}, rank {check['rank']}",
            Text("holds") if check["holds"] else Text("DIFFERS", style="bold red"),
        )
    return Group(head, changes, checks, Text(), *_conclusion(verdict))


def _conclusion(verdict: dict[str, Any]) -> list[Text]:
    if verdict["holds"]:
        return [Text("the same as a single process, step by step", style="bold"), Text(_NOT_LOOKED_AT)]
    lines = [Text("not the same as a single process", style="bold red")]
    for check in verdict["checks"]:
        if check["holds"]:
            continue
        words = f"{check['quantity']} in {check['precision']}: beyond the tolerance from step {check['first_step']} on"
        if check["names"]:
            most = ", ".join(f"{name} {_difference(value)}" for name, value in check["names"].items())
            words = f"{check['quantity']} after step {check['step']}, the largest differences: {most}"
        lines.append(Text(f"  {words}"))
    return lines


def _difference(value: float | None) -> str:
    return "no number" if value is None else f"{value:.1e}"
