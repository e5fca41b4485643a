"""Where ranks stand, and which groups they share."""

from __future__ import annotations

import doctest

import torch.distributed as dist

import runtime.mesh
from planner.layout import Layout
from runtime.mesh import build_mesh, coordinate_of, rank_of
from tests.distributed.harness import run_ranks

LAYOUT = Layout(pp=3, dp=2, tp=4)


def test_the_worked_examples() -> None:
    assert doctest.testmod(runtime.mesh) == doctest.TestResults(failed=0, attempted=2)


def test_ranks_and_coordinates_are_inverse_and_tp_is_fastest() -> None:
    coordinates = [coordinate_of(rank, LAYOUT) for rank in range(LAYOUT.world_size)]
    assert [rank_of(coordinate, LAYOUT) for coordinate in coordinates] == list(range(24))
    assert [c.tp for c in coordinates[:8]] == [0, 1, 2, 3, 0, 1, 2, 3]
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
