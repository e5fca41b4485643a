"""An Explanation in words: what binds, why each runner-up loses, what would help. Nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .answer import differing_text
from .explain import Binding, Explanation, Rival
from .layout import Layout
from .plan import Plan, Prediction
from .plan_report import PART_NAMES
from .quantity_text import bytes_text, seconds_text
from .report import plain_table

_PARTS_TOLD = 4
_SMALLEST_SHARE = 0.0005  # of the step: a part that differs by less is not told
_MEMORY_TOLD = 3


def explain_report(found: Explanation) -> RenderableType:
    """What binds, the runners-up, what would help."""
    plan, step = found.plan, found.prediction.step_seconds
    head = Text()
    head.append(plan.layout.short(), style="bold green")
    head.append(f", step {seconds_text(step)}, {plan.model.name} on {plan.cluster.devices} × {plan.cluster.hardware}")
    parts: list[RenderableType] = [head]
    if abs(found.stated_seconds / step - 1) > 1e-3:
        stated = seconds_text(found.stated_seconds)
        parts.append(Text(f"the file says {stated}: profile or stages have changed since; all below is priced anew"))
    if found.faster is not None and found.faster.layout is not None and found.faster.step_seconds is not None:
        gain = step / found.faster.step_seconds - 1
        parts.append(
            Text(
                f"{found.faster.condition} is {gain:.2%} faster: {found.faster.layout.short()}, "
                f"step {seconds_text(found.faster.step_seconds)}",
                style="yellow",
            )
        )
    parts += [Text("\nwhat binds", style="bold"), *map(Text, _binding_lines(found.binding, step))]
    parts += [_rivals_table(found), _helps_table(found)]
    return Group(*parts)


def _binding_lines(binding: Binding, step: float) -> list[str]:
    share, free = binding.memory_bytes / binding.limit_bytes, binding.limit_bytes - binding.memory_bytes
    largest = sorted(binding.memory_items.items(), key=lambda item: -item[1])[:_MEMORY_TOLD]
    held = ", ".join(f"{name.replace('_', ' ')} {bytes_text(size)}" for name, size in largest)
    room = f"{bytes_text(free)} free" if free >= 0 else f"{bytes_text(-free)} too much"
    lines = [
        f"memory  rank {binding.memory_rank} holds {bytes_text(binding.memory_bytes)}, {share:.1%} of the limit "
        f"({room}): {held}"
    ]
    if binding.recompute_seconds > 0:
        spent = binding.recompute_seconds
        lines.append(f"        and recomputing to fit takes {seconds_text(spent)}, {spent / step:.1%} of the step")
    if binding.link is None:
        lines.append("links   carry nothing that is not hidden")
    else:
        axes = ", ".join(
            f"{PART_NAMES.get(part, part)} {seconds_text(seconds)}" for part, seconds in binding.link_parts.items()
        )
        lines.append(
            f"links   {binding.link} carries the most exposed seconds: {seconds_text(binding.link_seconds)}, "
            f"{binding.link_seconds / step:.1%} of the step ({axes})"
        )
    bubble = binding.bubble_seconds
    lines.append(f"bubble  {seconds_text(bubble)}, {bubble / step:.1%} of the step" if bubble > 0 else "bubble  none")
    return lines


# ---- runners-up --------------------------------------------------------------------------------------------


def _rivals_table(found: Explanation) -> RenderableType:
    table = plain_table("\nthe best otherwise, and why it loses", "if", "step", "slower by", "layout", "because of")
    for column in (3, 4):
        table.columns[column].justify = "left"
    table.columns[4].no_wrap = False
    step = found.prediction.step_seconds
    for condition, rival in _merged(found):
        if rival.layout is None or rival.step_seconds is None:
            table.add_row(condition, "", "", "", f"none: {'; '.join(rival.reasons)}")
            continue
        table.add_row(
            condition,
            seconds_text(rival.step_seconds),
            f"{rival.step_seconds / step - 1:.2%}",
            rival.layout.short(),
            parts_text(rival.more_seconds, step) + _gap_text(rival.gap),
        )
    return table


def _merged(found: Explanation) -> list[tuple[str, Rival]]:
    """Conditions that end at the same layout and step share a row."""
    rows: list[tuple[str, Rival]] = []
    for rival in found.rivals:
        for index, (condition, other) in enumerate(rows):
            if rival.layout is not None and (rival.layout, rival.step_seconds) == (other.layout, other.step_seconds):
                rows[index] = (f"{condition}, {rival.condition}", other)
                break
        else:
            rows.append((rival.condition, rival))
    return rows


def parts_text(more_seconds: Mapping[str, float], step: float) -> str:
    """The parts that differ most, as `+1.2 s bubble, -0.3 s tp`."""
    largest = sorted(more_seconds.items(), key=lambda item: -abs(item[1]))
    told = [(part, seconds) for part, seconds in largest if abs(seconds) > _SMALLEST_SHARE * step][:_PARTS_TOLD]
    told.sort(key=lambda item: item[1] < 0)  # what costs before what it saves
    words = [f"{'+' if s > 0 else '−'}{seconds_text(abs(s))} {PART_NAMES.get(part, part)}" for part, s in told]
    return ", ".join(words) or "next to nothing"


def _gap_text(gap: float) -> str:
    return f" (to within {gap:.1%})" if gap > 0 else ""


# ---- what would help ---------------------------------------------------------------------------------------


def _helps_table(found: Explanation) -> Table:
    table = plain_table("\nwhat would help, solved anew", "change", "step", "more tokens/s", "layout then")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for each in found.helps:
        layout = found.plan.layout
        same = "the same" if each.layout == layout else f"{each.layout.short()} ({differing_text(layout, each.layout)})"
        table.add_row(each.change, seconds_text(each.step_seconds), f"{each.gain:+.2%}", same + _gap_text(each.gap))
    return table


# ---- beside another layout -----------------------------------------------------------------------------------


def against_report(plan: Plan, prediction: Prediction, rival: Rival) -> RenderableType:
    """The plan and the best layout that a person's settings allow, part by part; or what forbids it."""
    if rival.layout is None or rival.step_seconds is None or rival.peak_memory_bytes is None:
        lines = [Text(f"  {reason}") for reason in rival.reasons]
        return Group(Text(f"{rival.condition} cannot be", style="bold red"), *lines)
    layout: Layout = rival.layout
    head = Text()
    head.append(plan.layout.short(), style="bold green")
    head.append(" beside the best with ")
    head.append(rival.condition, style="bold")
    head.append(f": {layout.short()}" + _gap_text(rival.gap))
    table = plain_table("", "part", "plan", rival.condition, "difference", "of the step")
    for part, seconds in prediction.breakdown_seconds.items():
        other = rival.breakdown_seconds[part]
        if max(seconds, other) > 1e-6 * prediction.step_seconds:
            table.add_row(PART_NAMES.get(part, part), *_beside(seconds, other, prediction.step_seconds))
    table.columns[0].footer = ""
    table.add_section()
    table.add_row("step", *_beside(prediction.step_seconds, rival.step_seconds, prediction.step_seconds))
    table.add_row("peak memory", bytes_text(prediction.peak_memory_bytes), bytes_text(rival.peak_memory_bytes))
    differs = Text(f"differs in {differing_text(plan.layout, layout)}" if layout != plan.layout else "the same layout")
    return Group(head, differs, table)


def _beside(seconds: float, other: float, step: float) -> tuple[str, str, str, str]:
    more = other - seconds
    sign = "+" if more > 0 else "−" if more < 0 else ""
    return (
        seconds_text(seconds),
        seconds_text(other),
        f"{sign}{seconds_text(abs(more))}",
        f"{more / step:+.1%}",
    )
