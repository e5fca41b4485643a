"""Seconds of a rank by the paths that every simulation of its schedule contains (`simulation.known_paths`).

A path is a sum over stages of how often it passes them. Of the n layers of the commonest kind on a rank each lies, at
best, on that of its stages which the path passes least, of the others each on the stage elsewhere that it passes least.
So each path is linear in n; with layers of one kind, of which a stage between the ends has one at least,

    always + Σ fewest_s · e_s + (n - Σ fewest_own) · min e_own + (L - n - Σ fewest_else) · min e_else

e_s is what a layer on stage s adds to the path, fewest_s 1, but 0 on the first and the last stage, L all layers. With
layers of several kinds no stage is certain to have one of the commonest: fewest_s is 0, and each layer of another kind
lies on the stage that the path passes least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .layout_costs import LayoutCosts, SegmentCosts
from .part_seconds import PartSeconds
from .path_rows import PATH_PHASES
from .schedule import Pipeline
from .simulation import known_paths


def seconds_of_paths(costs: LayoutCosts, segment: SegmentCosts) -> Callable[[int, int], float]:
    """(rank, its layers) -> seconds up to the last reduction, without recomputation, that no assignment is below whose
    rank holds so many layers of the `segment`. They rise with the layers."""
    stages, ranks, paths = costs.layout.stages, costs.layout.pp, known_paths(costs.pipeline)
    passed = _passed(costs.pipeline)
    of_kinds = [(one, _added(passed, one.seconds)) for one in costs.segments]
    (each,) = (added for one, added in of_kinds if one is segment)
    ends = [[getattr(end, phase).total for end in costs.stage_ends] for phase in PATH_PHASES]
    always = np.einsum("pfs,fs->p", passed, np.array(ends))
    always += [path.sent_seconds(costs.hop_seconds) for path in paths]
    always += sum(one.layers * added.min(axis=1) for one, added in of_kinds if one is not segment)
    fewest = np.full(stages, float(len(of_kinds) == 1))
    fewest[[0, -1]] = 0.0
    always += each @ fewest
    lines, of_rank = list[list[tuple[float, float]]](), len(paths) // ranks
    for rank in range(ranks):
        mine, own = slice(rank * of_rank, (rank + 1) * of_rank), np.zeros(stages, dtype=bool)
        own[list(costs.layout.stages_of(rank))] = True
        here, elsewhere = each[mine][:, own].min(axis=1), each[mine][:, ~own].min(axis=1, initial=math.inf)
        elsewhere[elsewhere == math.inf] = 0.0  # one rank has all layers
        constant = always[mine] - here * fewest[own].sum() + elsewhere * (segment.layers - fewest[~own].sum())
        slope = here - elsewhere
        constant += np.minimum(slope, 0.0) * segment.layers  # where more layers take less: as if it had all
        lines.append(list(zip(constant.tolist(), np.maximum(slope, 0.0).tolist(), strict=True)))

    def seconds(rank: int, layers: int) -> float:
        return max(constant + slope * layers for constant, slope in lines[rank])

    return seconds


def _added(passed: np.ndarray, layer: PartSeconds) -> np.ndarray:
    """[path, stage] seconds that a layer on the stage adds to the path."""
    return np.einsum("pfs,f->ps", passed, np.array([getattr(layer, phase).total for phase in PATH_PHASES]))


@lru_cache(maxsize=200)
def _passed(pipeline: Pipeline) -> np.ndarray:
    """[path, phase, stage] how often a path passes a phase of a stage; those of a rank stand together."""
    return np.array([[getattr(path, phase) for phase in PATH_PHASES] for path in known_paths(pipeline)], dtype=float)
