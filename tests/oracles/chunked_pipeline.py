"""Pipelines with chunks whose seconds and bytes can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from planner.in_flight import in_flight
from planner.layout import Layout
from planner.layout_costs import LayoutCosts, SegmentCosts
from planner.memory_bytes import MemoryBytes, PartMemory
from planner.part_seconds import PartSeconds, Seconds


def interleaved(layers: int, pp: int, chunks: int, head_seconds: float = 0.0) -> LayoutCosts:
    """Interleaved 1F1B of 2·pp microbatches: a layer takes 1 s forward and 2 s backward, and holds a byte in flight."""
    nothing, none = PartSeconds(), PartMemory()
    seconds = PartSeconds(forward=Seconds(1.0), backward_input=Seconds(2.0), recompute_full=Seconds(1.0))
    layout = Layout(pp=pp, schedule="interleaved-1f1b", virtual_stages=chunks)
    return LayoutCosts(
        layout=layout,
        microbatches=2 * pp,
        segments=(SegmentCosts("dense", layers, seconds, replace(none, held=MemoryBytes(activations=1.0))),),
        embedding=nothing,
        head=replace(nothing, forward=Seconds(head_seconds / 3), backward_input=Seconds(head_seconds * 2 / 3)),
        microbatch=nothing,
        hop_seconds=(0.0,) * (layout.stages - 1),
        step_seconds=0.0,
        embedding_memory=none,
        head_memory=none,
        fixed_memory=(MemoryBytes(),) * pp,
        in_flight=in_flight(layout.pipeline(2 * pp)),
        allocator_slack=0.0,
    )
