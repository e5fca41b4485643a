"""Bytes that no layout of a group holds less than, before any layout of it is priced."""

from __future__ import annotations

from typing import NamedTuple

from profiles.model import ModelSpec
from profiles.software import Software

from .gradient_moments import few_microbatches, least_phases_of_any
from .in_flight import SUMMED
from .job import TrainingJob
from .layout import Layout
from .memory_bytes import PartTotals, least_totals
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

    def part_bytes(self, group: LayoutGroup) -> LeastBytes:
        """What no layer of the commonest kind and neither end holds less than in a group with one state: with more
        chunks fewer weights are gathered at once, but split backwards have more gradients besides (`state_bytes`)."""
        memory, commonest = self._memory, max(self._model.segments, key=lambda segment: segment.count)
        alike: dict[str, list[Layout]] = {}
        for schedule, chunks in group.pipelines:
            layout = group.base.but(schedule=schedule, virtual_stages=chunks)
            alike.setdefault(memory.schedule_like(layout), []).append(layout)
        ends = [(min(each, key=_chunks), max(each, key=_chunks)) for each in alike.values()]
        layers = [
            memory.block_standing(one, commonest.kind, one.stages_choose or None)
            for fewest, most in ends
            for one in dict.fromkeys((fewest, most))
        ]
        embeddings, heads = zip(*(memory.ends_standing(fewest) for fewest, _ in ends), strict=True)
        phases = (SUMMED,) * group.base.pp
        if self._software.on_fsdp:
            most_chunks = tuple(dict(sorted(group.pipelines)).items())  # of each schedule
            phases = least_phases_of_any(most_chunks, group.base.pp, group.base.microbatches(self._job.global_batch))
        layer, embedding, head = (least_totals(parts, phases) for parts in (layers, embeddings, heads))
        return LeastBytes(commonest.count, layer, embedding, head, phases)

    def state_bytes(self, group: LayoutGroup) -> float:
        """Weights, gradients and optimizer of a whole pipeline, of a group with one state: no layout of it and no
        assignment holds less on all its ranks together."""
        least, microbatches = float("inf"), group.base.microbatches(self._job.global_batch)
        # Gradients come late where all forwards are first or microbatches few; more chunks have fewer weights gathered
        # at once; what split backwards have besides is left out.
        most = {"gpipe": 0, "1f1b": 0}
        for schedule, chunks in group.pipelines:
            few = few_microbatches(Pipeline(schedule, group.base.pp, chunks, microbatches))
            like = "gpipe" if schedule in FORWARDS_FIRST or few else "1f1b"
            most[like] = max(most[like], chunks)
        for schedule, chunks in most.items():
            if chunks:
                layout = group.base.but(schedule=schedule, virtual_stages=chunks)
                least = min(least, self._state_bytes(layout, microbatches))
        return least

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


def _chunks(layout: Layout) -> int:
    return layout.virtual_stages
