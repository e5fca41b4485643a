"""Where ranks stand, and which groups they share."""

from __future__ import annotations

import doctest

import torch.distributed as dist

import runtime.mesh
from planner.layout import Layout
from runtime.mesh import build_mesh, coordinate_of, rank_of
from tests.distributed.harness import run_ranks

LAYOUT = Layout(pp=3, dp=2, cp=2, tp=2)


def test_the_worked_examples() -> None:
    assert doctest.testmod(runtime.mesh) == doctest.TestResults(failed=0, attempted=2)


def test_ranks_and_coordinates_are_inverse_and_tp_is_fastest() -> None:
    coordinates = [coordinate_of(rank, LAYOUT) for rank in range(LAYOUT.world_size)]
    assert [rank_of(coordinate, LAYOUT) for coordinate in coordinates] == list(range(24))
    assert [c.tp for c in coordinates[:8]] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [c.cp for c in coordinates[:8]] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [c.dp for c in coordinates[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [c.pp for c in coordinates[::8]] == [0, 1, 2]


def groups() -> dict[str, list[int]]:
    mesh = build_mesh(Layout(pp=3, tp=2), "cpu", tied_embeddings=True)
    found = {axis: dist.get_process_group_ranks(mesh.axis(axis).get_group()) for axis in ("pp", "dp", "tp")}
    found["tied"] = dist.get_process_group_ranks(mesh.tied_group) if mesh.tied_group is not None else []
    return found


def test_the_groups_of_each_rank() -> None:
    ranks = run_ranks(groups, 6)
    assert ranks[1] == {"pp": [1, 3, 5], "dp": [1], "tp": [0, 1], "tied": [1, 5]}
    assert ranks[2] == {"pp": [0, 2, 4], "dp": [2], "tp": [2, 3], "tied": []}
    assert ranks[4] == {"pp": [0, 2, 4], "dp": [4], "tp": [4, 5], "tied": [0, 4]}


def groups_with_cp() -> dict[str, list[int]]:
    layout = Layout(dp=2, cp=2, cp_style="ring", tp=2, sequence_parallel=True, zero=3, dp_shard=1)
    mesh = build_mesh(layout, "cpu", tied_embeddings=False, experts=True)
    replicas, shards = mesh.groups("dp")
    found = {"replicas": replicas, "shards": shards, "context": mesh.context_group, "sequence": mesh.sequence_group}
    return {name: dist.get_process_group_ranks(group) for name, group in found.items() if group is not None}


def test_weights_are_cut_over_cp_and_copied_over_the_rest_of_dp() -> None:
    ranks = run_ranks(groups_with_cp, 8)
    assert ranks[1] == {"replicas": [1, 5], "shards": [1, 3], "context": [1, 3], "sequence": [0, 1, 2, 3]}
    assert ranks[6] == {"replicas": [2, 6], "shards": [4, 6], "context": [4, 6], "sequence": [4, 5, 6, 7]}
