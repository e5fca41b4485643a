"""Bytes that no layout of a group holds less than, before any layout of it is priced."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from profiles.model import ModelSpec
from profiles.software import Software

from .gradient_moments import few_microbatches, least_phases_of_any
from .in_flight import SUMMED
from .job import TrainingJob
from .layout import Layout
from .memory_bytes import PartMemory, PartTotals, least_totals
from .memory_cost import MemoryModel
from .schedule import FORWARDS_FIRST, Pipeline
from .space import LayoutGroup


class LeastBytes(NamedTuple):
    """Whatever the schedule and the chunks: layers of the commonest segment, one of them, embedding and head, and each
    rank's phase of gradients."""

    layers: int
    layer: PartTotals
    embedding: PartTotals
    head: PartTotals
    phases: tuple[str, ...]


class LeastMemory:
    """What layouts hold at least, of the bytes that `memory` prices."""

    def __init__(self, model: ModelSpec, job: TrainingJob, software: Software, memory: MemoryModel) -> None:
        self._model, self._job, self._software, self._memory = model, job, software, memory

    def part_bytes(self, layouts: Sequence[tuple[Layout, int]]) -> LeastBytes:
        """What no layer of the commonest kind and neither end holds less than under any of these schedules with so many
        chunks as the layout or up to those beside it: with more fewer weights are gathered at once, but split backwards
        have more gradients besides (`state_bytes`). In all else the layouts are alike."""
        memory, commonest = self._memory, max(self._model.segments, key=lambda segment: segment.count)
        alike: dict[str, list[tuple[Layout, int]]] = {}
        for layout, most in layouts:
            alike.setdefault(memory.schedule_like(layout), []).append((layout, most))
        layers, ends = list[PartMemory](), list[tuple[PartMemory, PartMemory]]()
        for each in alike.values():
            fewest, most = min((layout for layout, _ in each), key=_chunks), max(most for _, most in each)
            choice = fewest.stages_choose or None
            layers.append(memory.block_standing(fewest, commonest.kind, choice))
            if most > fewest.virtual_stages:
                layers.append(memory.block_standing(fewest.but(virtual_stages=most), commonest.kind, choice))
            ends.append(memory.ends_standing(fewest))
        one = layouts[0][0]
        phases = (SUMMED,) * one.pp
        if self._software.on_fsdp:
            pipelines = tuple((layout.schedule, most) for layout, most in layouts)
            phases = least_phases_of_any(pipelines, one.pp, one.microbatches(self._job.global_batch))
        layer, embedding, head = (least_totals(parts, phases) for parts in (layers, *zip(*ends, strict=True)))
        return LeastBytes(commonest.count, layer, embedding, head, phases)

    def state_bytes(self, group: LayoutGroup) -> float:
        """Weights, gradients and optimizer of a whole pipeline, of a group with one state: no layout of it and no
        assignment holds less on all its ranks together."""
        microbatches = group.base.microbatches(self._job.global_batch)
        each = _most_chunks(group.pipelines, group.base.pp, microbatches)
        layouts = (group.base.but(schedule=schedule, virtual_stages=chunks) for schedule, chunks in each)
        return min(self._state_bytes(layout, microbatches) for layout in layouts)

    def _state_bytes(self, layout: Layout, microbatches: int) -> float:
        memory, choice = self._memory, layout.stages_choose or None
        parts = [(each.count, memory.block_standing(layout, each.kind, choice)) for each in self._model.segments]
        embedding, head = memory.ends_standing(layout)
        total = embedding.state.total + head.state.total + sum(number * part.state.total for number, part in parts)
        if layout.schedule != "gpipe" and (layout.pp > 1 or microbatches > 1):
            # Sums of gradients, which are there when a first backward has ended, but for some of the embedding's.
            total += head.summed.total + sum(number * part.summed.total for number, part in parts)
            total += embedding.summed.total if microbatches > layout.pp else 0.0
        return total


@lru_cache(maxsize=4096)
def _most_chunks(pipelines: tuple[tuple[str, int], ...], ranks: int, microbatches: int) -> tuple[tuple[str, int], ...]:
    """(schedule, chunks) under which weights and gradients are fewest. Gradients come late where all forwards are first
    or microbatches few; more chunks have fewer weights gathered at once; what split backwards have besides is left
    out."""
    most = dict[str, int]()
    for schedule, chunks in pipelines:
        few = few_microbatches(Pipeline(schedule, ranks, chunks, microbatches))
        like = "gpipe" if schedule in FORWARDS_FIRST or few else "1f1b"
        most[like] = max(most.get(like, 0), chunks)
    return tuple(most.items())


def _chunks(layout: Layout) -> int:
    return layout.virtual_stages
