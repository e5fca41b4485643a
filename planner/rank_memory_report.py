"""What a dry run prints: a rank's bytes predicted and live, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from .quantity_text import bytes_text, seconds_text
from .rank_memory import RankMemory
from .report import plain_table
from .stage_table import layers_text

# The parts in the order of the table; others follow. The last two are seldom more than a little.
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "gathered_weights",
    "activations",
    "logits",
    "pipeline_buffers",
    "transient",
    "inputs",
)
_NAMES = {"transient": "passing", "inputs": "token ids"}
_SMALLEST_SHARE = 1e-5  # of the total; smaller parts have no row


def rank_memory_report(found: RankMemory) -> RenderableType:
    """The table, what it leaves out, and how the figures came about."""
    plan = found.plan
    microbatches = f"{plan.microbatches} microbatch" + ("es" if plan.microbatches > 1 else "")
    head = Text(
        f"dry run of rank {found.rank} of {plan.layout.world_size}: {plan.model.name}, {plan.layout.short()}, "
        f"{microbatches}\npipeline rank {found.pipeline_rank}, layers {layers_text(found.stages)} "
        "(E embedding, H head)\n"
    )
    table = plain_table("tensors at the peak", "part", "predicted", "live", "difference", "of live")
    total = max(found.live_bytes, 1)
    parts = sorted({*found.predicted, *found.live}, key=lambda part: (*PARTS, part).index(part))
    rows = [(_NAMES.get(p, p.replace("_", " ")), found.predicted.get(p, 0.0), found.live.get(p, 0)) for p in parts]
    rows = [row for row in rows if max(row[1:]) > _SMALLEST_SHARE * total]
    rows.append(("all tensors", found.predicted_bytes, found.live_bytes))
    for name, predicted, live in rows:
        table.add_row(
            name,
            bytes_text(predicted),
            bytes_text(live),
            _difference(predicted - live),
            f"{(predicted - live) / total:+.1%}",
        )
    left_out = ", ".join(f"{part.replace('_', ' ')} {bytes_text(size)}" for part, size in found.left_out.items())
    notes = [
        f"left out, since no tensors: {left_out} (predicted)",
        "predicted is each part at the rank's fullest moment, live what it was booked for; what passes or is held may "
        "be told apart differently, the total may not",
        f"simulated without numbers in {seconds_text(found.seconds)}; collectives move nothing"
        + (", RMSNorm keeps what CUDA's does" if found.gpu_kernels else ""),
    ]
    if found.gpu is not None:
        notes.append(_gpu_text(found, found.gpu))
    return Group(head, table, Text(), *map(Text, notes))


def _difference(size: float) -> str:
    return ("−" if size < 0 else "+") + bytes_text(abs(size))


def _gpu_text(found: RankMemory, gpu: Mapping[str, Any]) -> str:
    if gpu["failed"] is not None:
        return f"on this machine's {gpu['device']}: {gpu['failed']}"
    return (
        f"on this machine's {gpu['device']}: peak {bytes_text(gpu['allocated_bytes'])} allocated, "
        f"{bytes_text(gpu['reserved_bytes'])} reserved; a step takes {seconds_text(gpu['step_seconds'])} without "
        f"communication, {seconds_text(found.predicted_seconds)} by the plan"
    )
