"""The stages of a reduced plan for a module that a factory makes, which nobody can make smaller: all its blocks."""

from __future__ import annotations

from .layout import Layout
from .plan import Plan, Stage


def module_stages(plan: Plan, layout: Layout) -> tuple[Stage, ...]:
    """The plan's own stages where the reduced layout has as many, else all blocks dealt out evenly over those it has.

    Then of each stage as large a share recomputes as of the whole model, one block at least where any does.
    """
    if layout.stages == plan.layout.stages:
        return plan.stages
    layers, pipeline = plan.model.layers, layout.pipeline(1)
    recomputing = sum(stage.recompute_full for stage in plan.stages)
    ends = [layers * place // layout.stages for place in range(layout.stages + 1)]
    stages = []
    for place in range(layout.stages):
        rank = pipeline.rank_of(place)
        size = ends[place + 1] - ends[place]
        full = min(size, -(-recomputing * size // layers))
        stages.append(
            Stage(
                rank=rank,
                chunk=pipeline.stages_of(rank).index(place),
                first=ends[place],
                end=ends[place + 1],
                embedding=place == 0,
                head=place == layout.stages - 1,
                recompute_none=size - full,
                recompute_selective=0,
                recompute_full=full,
            )
        )
    return tuple(stages)
