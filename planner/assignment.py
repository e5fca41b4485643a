"""An assignment as the stages of a plan, and back: what was priced is what runs, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from profiles.model import ModelSpec

from .layout import RECOMPUTE_MODES, Layout
from .layout_costs import Blocks, StageCount
from .plan import Stage
from .recompute_spans import MODES_IN_ORDER, spans_of


def stages_of(layout: Layout, counts: Sequence[StageCount], reshard: Sequence[bool | None] = ()) -> tuple[Stage, ...]:
    """Counts as half-open block ranges, in the order of the model; within a segment the first blocks recompute.

    `reshard` is each stage's choice, where stages have one.
    """
    places = {stage: (rank, chunk) for rank in range(layout.pp) for chunk, stage in enumerate(layout.stages_of(rank))}
    stages, first = [], 0
    for stage, held in enumerate(counts):
        rank, chunk = places[stage]
        end = first + sum(blocks.total for blocks in held)
        stages.append(
            Stage(
                rank=rank,
                chunk=chunk,
                first=first,
                end=end,
                embedding=stage == 0,
                head=stage == len(counts) - 1,
                recompute_none=sum(blocks.none for blocks in held),
                recompute_selective=sum(blocks.selective for blocks in held),
                recompute_full=sum(blocks.full for blocks in held),
                recompute_spans=spans_of([(mode, each.of(mode)) for each in held for mode in MODES_IN_ORDER], first),
                reshard=reshard[stage] if reshard else None,
            )
        )
        first = end
    return tuple(stages)


def counts_of(model: ModelSpec, stages: Sequence[Stage]) -> tuple[StageCount, ...]:
    """What each stage holds of each segment, by how it recomputes."""
    kinds = [k for k, segment in enumerate(model.segments) for _ in range(segment.count)]
    counts = []
    for stage in stages:
        held: list[dict[str, int]] = [dict.fromkeys(RECOMPUTE_MODES, 0) for _ in model.segments]
        for block in range(stage.first, stage.end):
            held[kinds[block]][stage.recompute_mode(block)] += 1
        counts.append(tuple(Blocks(**modes) for modes in held))
    return tuple(counts)
