"""Layouts that a benchmark runs side by side share process groups, and none that one layout has twice."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from benchmarks.side_by_side import GroupKey, shared_groups
from planner.layout import Layout
from runtime.mesh import build_mesh

from .harness import run_ranks

LAYOUTS = (Layout(tp=2, pp=2), Layout(dp=2, tp=2, zero=1, dp_shard=2), Layout(pp=2, dp=2, ep=2))


def names() -> list[dict[str, str]]:
    """Of each layout the groups that this rank is in, by axis."""
    found, made = [], dict[GroupKey, Any]()
    for layout in LAYOUTS:
        with shared_groups(made):
            mesh = build_mesh(layout, "cpu", tied_embeddings=False, experts=layout.ep > 1)
        axes = ("pp", "dp", "tp", "ep") if layout.ep > 1 else ("pp", "dp", "tp")
        found.append({axis: mesh.groups(axis)[0].group_name for axis in axes})
    dist.new_group([0])  # torch's own again
    return found


def test_a_layout_gets_the_groups_of_those_before_it_and_each_axis_its_own() -> None:
    for first, second, third in run_ranks(names, 4):
        assert first["tp"] == second["tp"]  # ranks (0, 1) and (2, 3)
        assert first["pp"] == second["dp"] == third["pp"]  # ranks (0, 2) and (1, 3)
        assert third["dp"] == first["tp"]
        assert third["ep"] != third["dp"]  # the same ranks
        assert len(set(third.values())) == 4
