"""What `plan` and `estimate` print: rich renderables built from an Answer. Nothing here prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .answer import Answer, assumptions, differing_text
from .default_layout import IN_WORDS
from .plan import Alternative, Certificate, Plan, Prediction
from .quantity_text import bytes_text, seconds_text
from .report import plain_table
from .stage_table import stage_table

PART_NAMES = {"dp_exposed": "dp exposed"}


def plan_report(plan: Plan, found: Answer, idle: int = 0) -> RenderableType:
    """The layout, its gain, its figures, stages, breakdown, the proof, the runners-up, the assumptions.

    `idle` devices of the cluster are left alone because that is faster.
    """
    head = Text()
    head.append(f"{plan.model.name}", style="bold")
    head.append(
        f" on {plan.cluster.devices} × {plan.cluster.hardware}, batch {plan.job.global_batch} × "
        f"{plan.job.sequence} tokens, {plan.job.precision}\n"
    )
    head.append(plan.layout.short(), style="bold green")
    head.append(f", {plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}")
    if idle:
        head.append(f"; {idle} devices more would stay idle: with them no plan is faster")
    limit = found.question.limit_bytes
    parts: list[RenderableType] = [head, *_about(found, limit), certificate_text(plan.certificate)]
    if plan.alternatives:
        parts.append(alternatives_table(plan, plan.alternatives))
    return Group(*parts, assumptions_text(found))


def estimate_report(found: Answer, fits: bool) -> RenderableType:
    """The same for a layout that the user wrote."""
    verdict, limit = Text(), found.question.limit_bytes
    verdict.append(found.layout.short(), style="bold")
    if fits:
        verdict.append("  fits", style="green")
    else:
        over = found.prediction.peak_memory_bytes - limit
        verdict.append(f"  does not fit: {bytes_text(over)} over {bytes_text(limit)} per device", style="red")
    return Group(verdict, *_about(found, limit), assumptions_text(found))


def _about(found: Answer, limit_bytes: float) -> tuple[RenderableType, ...]:
    return (
        default_text(found),
        figures(found, limit_bytes),
        stage_table(found, limit_bytes),
        breakdown_table(found.prediction),
    )


def default_text(found: Answer) -> Text:
    """How many times as fast as the default, or why that cannot be said."""
    default = found.default
    if default is None:
        return Text(f"the default a person would write ({IN_WORDS}) is not legal here", style="dim")
    if not default.fits:
        return Text(
            f"the default a person would write does not fit: {default.layout.short()} misses "
            f"{bytes_text(default.missing_bytes)} on a device"
        )
    step = f"{default.layout.short()}, step {seconds_text(default.step_seconds)}"
    step += f", peak {bytes_text(default.peak_memory_bytes)}"
    gain = default.step_seconds / found.prediction.step_seconds
    if f"{gain:.2f}" == "1.00":
        return Text(f"as fast as the default a person would write: {step}")
    way, times = ("faster", gain) if gain > 1 else ("slower", 1 / gain)
    return Text(f"{times:.2f}× {way} than the default a person would write: {step}")


def figures(found: Answer, limit_bytes: float) -> Text:
    """The predicted figures of a step, its memory and its price."""
    prediction = found.prediction
    cost = found.cost_per_billion_tokens
    price = "" if cost is None else f", ${cost:,.2f} per billion tokens at ${found.price_per_gpu_hour:g} a GPU-hour"
    return Text(
        f"\nstep {seconds_text(prediction.step_seconds)}, "
        f"{prediction.tokens_per_second_per_device:,.0f} tokens/s per device, "
        f"{prediction.model_tflops_per_device:.3g} model TFLOP/s per device, mfu {prediction.mfu:.1%}, "
        f"bubble {found.bubble_share:.1%}\n"
        f"peak memory {bytes_text(prediction.peak_memory_bytes)} of {bytes_text(limit_bytes)} per device, "
        f"{found.question.model.parameters / 1e9:.3g} B parameters\n"
        f"{found.gpu_hours_per_step:.3g} GPU-hours a step, "
        f"{found.gpu_hours_per_billion_tokens:,.4g} per billion tokens{price}\n"
    )


def breakdown_table(prediction: Prediction) -> Table:
    """Seconds of the step by cause; parts of nothing are left out."""
    table = plain_table("\nwhere the step goes", "part", "time", "share")
    for name, seconds in prediction.breakdown_seconds.items():
        if seconds > 1e-6 * prediction.step_seconds:
            share = seconds / prediction.step_seconds
            table.add_row(PART_NAMES.get(name, name), seconds_text(seconds), f"{share:.1%}")
    return table


def certificate_text(certificate: Certificate) -> Text:
    """The proof in words."""
    c = certificate
    solved = c.layouts_legal - c.layouts_pruned_memory - c.layouts_pruned_bound
    proof = "no legal layout is faster" if c.gap == 0 else f"no legal layout is more than {c.gap:.2%} faster"
    return Text(
        f"\n{proof}: of {c.layouts_legal} legal layouts {c.layouts_pruned_memory} cannot fit, "
        f"{c.layouts_pruned_bound} have a bound above this plan, {solved} were solved "
        f"({c.ilps_solved} ILPs, {c.solver}, {seconds_text(c.solve_seconds)})"
    )


def alternatives_table(plan: Plan, alternatives: Sequence[Alternative]) -> Table:
    """The best layouts, ranked, with how much slower each is and in what it differs from the plan."""
    table = plain_table("\nnext best", "layout", "step", "slower by", "peak memory", "differs in")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for other in alternatives:
        table.add_row(
            other.layout.short(),
            seconds_text(other.step_seconds),
            f"{other.step_seconds / plan.prediction.step_seconds - 1.0:.2%}",
            bytes_text(other.peak_memory_bytes),
            differing_text(plan.layout, other.layout),
        )
    return table


def assumptions_text(found: Answer) -> Text:
    """What the figures assume, a line each."""
    return Text("\n" + "\n".join(f"assumed: {line}" for line in assumptions(found.question)), style="dim")
