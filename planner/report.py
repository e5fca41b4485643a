"""What people read: rich renderables built from values. Nothing here prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.input_error import InputError
from profiles.model import ModelSpec

from .errors import NoPlanError
from .layout import Layout
from .plan import Alternative, Certificate, Plan, Prediction, Stage

_PART_NAMES = {"dp_exposed": "dp exposed"}
_MEMORY_NAMES = {
    "gradients": "grads",
    "optimizer": "optim",
    "gathered_weights": "gather",
    "activations": "activ",
    "transient": "passing",
    "pipeline_buffers": "pipe",
    "communicators": "comm",
    "context": "context",
    "allocator_slack": "slack",
}
# Bytes below this share of the limit everywhere get no column of their own.
_SMALLEST_SHARE = 0.001


def seconds_text(seconds: float) -> str:
    """Three significant figures in s or ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def bytes_text(size_bytes: float) -> str:
    """GiB, or MiB below one GiB."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def plain_table(title: str, *columns: str) -> Table:
    """A table whose first column is words and whose others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


# ---- plan and estimate -----------------------------------------------------------------------------------


def plan_report(plan: Plan, limit_bytes: float) -> RenderableType:
    """The layout, its figures, the stages with memory itemised, the breakdown, the proof, the runners-up."""
    devices = plan.cluster.devices
    head = Text()
    head.append(f"{plan.model.name}", style="bold")
    head.append(
        f" on {devices} × {plan.cluster.hardware}, batch {plan.job.global_batch} × {plan.job.sequence} tokens, "
    )
    head.append(f"{plan.job.precision}\n")
    head.append(plan.layout.short(), style="bold green")
    head.append(f", {plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}\n")
    parts: list[RenderableType] = [
        head,
        figures(plan.model, plan.prediction, limit_bytes),
        stage_table(plan.stages, plan.prediction, limit_bytes),
        breakdown_table(plan.prediction),
        certificate_text(plan.certificate),
    ]
    if plan.alternatives:
        parts.append(alternatives_table(plan.layout, plan.prediction, plan.alternatives))
    return Group(*parts)


def estimate_report(
    model: ModelSpec, layout: Layout, stages: Sequence[Stage], prediction: Prediction, limit_bytes: float, fits: bool
) -> RenderableType:
    """The same for a layout that the user wrote."""
    verdict = Text()
    verdict.append(layout.short(), style="bold")
    if fits:
        verdict.append("  fits\n", style="green")
    else:
        over = prediction.peak_memory_bytes - limit_bytes
        verdict.append(f"  does not fit: {bytes_text(over)} over {bytes_text(limit_bytes)} per device\n", style="red")
    return Group(
        verdict,
        figures(model, prediction, limit_bytes),
        stage_table(stages, prediction, limit_bytes),
        breakdown_table(prediction),
    )


def figures(model: ModelSpec, prediction: Prediction, limit_bytes: float) -> Text:
    """The predicted figures of a step in two lines."""
    return Text(
        f"step {seconds_text(prediction.step_seconds)}, "
        f"{prediction.tokens_per_second_per_device:,.0f} tokens/s per device, "
        f"{prediction.model_tflops_per_device:.3g} model TFLOP/s per device, mfu {prediction.mfu:.1%}\n"
        f"peak memory {bytes_text(prediction.peak_memory_bytes)} of {bytes_text(limit_bytes)} per device, "
        f"{model.parameters / 1e9:.3g} B parameters\n"
    )


def stage_table(stages: Sequence[Stage], prediction: Prediction, limit_bytes: float) -> Table:
    """A row a stage: what it holds and its bytes by cause; equal neighbours share a row."""
    names = [
        name
        for name in prediction.memory_bytes[0]
        if any(items[name] > _SMALLEST_SHARE * limit_bytes for items in prediction.memory_bytes)
    ]
    unit, scale = ("GiB", 2**30) if prediction.peak_memory_bytes >= 2**31 else ("MiB", 2**20)
    table = plain_table(
        f"stages (E embedding, H head), memory in {unit} of {limit_bytes / scale:,.1f}",
        "stage",
        "layers",
        "recompute",
        *(_MEMORY_NAMES.get(name, name) for name in names),
        "total",
    )
    for first, last in _alike(stages, prediction):
        stage, items = stages[first], prediction.memory_bytes[first]
        total = sum(items.values())
        held = [f"{stage.end - stage.first}"]
        held += ["E"] * stage.embedding + ["H"] * stage.head
        table.add_row(
            f"{first}" if first == last else f"{first}-{last}",
            " ".join(held),
            _recompute_text(stage),
            *(f"{items[name] / scale:,.2f}" for name in names),
            Text(f"{total / scale:,.2f}", style="red" if total > limit_bytes * (1 + 1e-9) else ""),
        )
    return table


def _recompute_text(stage: Stage) -> str:
    words = [f"{n} {mode}" for mode in ("selective", "full") if (n := getattr(stage, f"recompute_{mode}"))]
    return " ".join(words) or "none"


def _alike(stages: Sequence[Stage], prediction: Prediction) -> list[tuple[int, int]]:
    """Runs of stages that would print the same row."""

    def shown(i: int) -> tuple[Any, ...]:
        stage = stages[i]
        items = tuple(round(value / 2**20) for value in prediction.memory_bytes[i].values())
        return (stage.end - stage.first, stage.embedding, stage.head, stage.recompute_full, items)

    runs: list[tuple[int, int]] = []
    for i in range(len(stages)):
        if runs and shown(runs[-1][0]) == shown(i):
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs


def breakdown_table(prediction: Prediction) -> Table:
    """Seconds of the step by cause; parts of nothing are left out."""
    table = plain_table("\nwhere the step goes", "part", "time", "share")
    for name, seconds in prediction.breakdown_seconds.items():
        if seconds > 1e-6 * prediction.step_seconds:
            share = seconds / prediction.step_seconds
            table.add_row(_PART_NAMES.get(name, name), seconds_text(seconds), f"{share:.1%}")
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


def alternatives_table(layout: Layout, prediction: Prediction, alternatives: Sequence[Alternative]) -> Table:
    """The best layouts, ranked, with how much slower each is."""
    table = plain_table("\nnext best", "layout", "step", "slower by", "peak memory")
    for other in alternatives:
        slower = other.step_seconds / prediction.step_seconds - 1.0
        table.add_row(
            other.layout.short(), seconds_text(other.step_seconds), f"{slower:.2%}", bytes_text(other.peak_memory_bytes)
        )
    return table


# ---- a run -------------------------------------------------------------------------------------------------


def record_report(record: dict[str, Any]) -> RenderableType:
    """Predicted beside measured, part by part, and what the training reached.

    `record` is the content of RUN/record.yaml. A measured step cannot tell recomputation from compute nor
    waiting for a message from waiting for a stage, so those are summed on the predicted side too.
    """
    predicted, measured = record["predicted"], record["measured"]
    parts, found = predicted["breakdown_seconds"], measured["parts"]
    rows = [
        ("compute + recompute", parts["compute"] + parts["recompute"], found["compute"]),
        ("tp communication", parts["tp"], found["tp"]),
        ("pp + bubble", parts["pp"] + parts["bubble"], found["pp_bubble"]),
        ("dp exposed", parts["dp_exposed"], found["dp_exposed"]),
        ("optimizer", parts["optimizer"], found["optimizer"] + found["other"]),
        ("step", predicted["step_seconds"], measured["step_seconds"]),
    ]
    table = plain_table("\npredicted beside measured", "part", "predicted", "measured", "difference", "of the step")
    for name, expected, seen in rows:
        if expected == 0 and abs(seen) < 1e-6:
            continue
        share = (expected - seen) / measured["step_seconds"]
        table.add_row(
            name,
            seconds_text(expected),
            seconds_text(seen),
            f"{expected / seen - 1:+.1%}" if seen > 0 else "",
            f"{share:+.1%}",
            end_section=name == "optimizer",
        )
    expected, seen = predicted["peak_memory_bytes"], measured["peak_memory_bytes"]
    table.add_row("peak memory", bytes_text(expected), bytes_text(seen), f"{expected / seen - 1:+.1%}", "")
    loss = Text(
        f"\ntrain loss {record['train_loss']:.3f}, validation loss {record['validation_loss']:.3f} nats per byte after "
        f"{record['steps']} steps; a bigram model of the same text reaches {record['bigram_loss']:.3f}"
    )
    return Group(table, loss)


# ---- errors --------------------------------------------------------------------------------------------------


def input_error_report(error: InputError) -> RenderableType:
    """What, where, expected, got, try: one line each."""
    grid = Table.grid(padding=(0, 2))
    for label, text in error.lines():
        grid.add_row(Text(label, style="bold red" if label == "error" else "bold"), Text(text))
    return grid


def no_plan_report(error: NoPlanError) -> RenderableType:
    """The answer no, and its reasons."""
    return Group(Text(error.what, style="bold red"), *(Text(f"  {line}") for line in error.lines))
