"""Segments of a model in their order on the stages: which stage may hold which, and rows that hold fractions to it too.

A model whose layers are of several kinds is a chain, and stages take runs of it. z[k,s] is 1 when all layers up to
segment k are on the stages up to s, so that later ones may lie there. With N[s,k] layers of segment k on stage s

    Σ_{s'<=s} N[s',k] >= L_k · z[k,s]        Σ_{s'<=s} N[s',k+1] <= L_k+1 · z[k,s]        N[s,k+1] <= most · z[k,s]

Fractions of z would let later layers lie early, and as many as the factor allows, so that is as small as can be, and
branches make z whole before all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .counted import Counted
from .layout_costs import LayoutCosts
from .linear_program import LinearProgram

# The columns of a segment's layers on a stage.
LayersOf = Callable[[int, int], Iterable[int]]


def stages_of_segments(costs: LayoutCosts) -> list[range]:
    """Stages that may hold layers of each segment.

    Those between the first and the last are never empty: before stage s are s - 1 layers at least, after it S - 2 - s.
    """
    stages, layers, first = costs.layout.stages, costs.layers, 0
    found = []
    for segment in costs.segments:
        end = first + segment.layers
        found.append(range(max(0, stages - 2 - (layers - 1 - first)), min(stages, end + 1)))
        first = end
    return found


def write_order(
    linear: LinearProgram, costs: LayoutCosts, layers_of: LayersOf, most: Sequence[int]
) -> dict[str, Counted]:
    """The rows of `linear`, whose columns `layers_of` knows; z by name, to branch on. A stage holds `most` layers of a
    segment."""
    stages, allowed, found = range(costs.layout.stages), stages_of_segments(costs), dict[str, Counted]()
    for k, segment in enumerate(costs.segments[:-1]):
        after = costs.segments[k + 1].layers
        z = [linear.binary(f"z_{k}_{s}") for s in stages]
        done, begun = dict[int, float](), dict[int, float]()
        for s in stages:
            later = dict.fromkeys(layers_of(s, k + 1), 1.0)
            done |= dict.fromkeys(layers_of(s, k), 1.0)
            begun |= later
            linear.row(f"all_before_{k}_{s}", done | {z[s]: -segment.layers}, least=0.0)
            linear.row(f"none_before_{k}_{s}", begun | {z[s]: -after}, most=0.0)
            linear.row(f"not_before_{k}_{s}", later | {z[s]: -most[k + 1]}, most=0.0)
            if s > 0:
                linear.row(f"in_order_{k}_{s}", {z[s]: 1.0, z[s - 1]: -1.0}, least=0.0)
            if s + 1 >= allowed[k].stop:
                linear.row(f"all_by_{k}_{s}", {z[s]: 1.0}, least=1.0)
            found[f"z_{k}_{s}"] = Counted(z[s], 1, 0)
    return found
