"""Layout -> DeviceMesh: which rank stands where on the axes pp, dp and tp."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from planner.layout import Layout

AXES = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Coordinate:
    """Where a rank stands on each mesh axis."""

    pp: int
    dp: int
    tp: int


def coordinate_of(rank: int, layout: Layout) -> Coordinate:
    """Ranks count tp fastest, then dp, then pp.

    With pp=2, dp=2, tp=2 rank 5 = 1·4 + 0·2 + 1:

    >>> coordinate_of(5, Layout(pp=2, dp=2, tp=2))
    Coordinate(pp=1, dp=0, tp=1)
    """
    return Coordinate(
        pp=rank // (layout.dp * layout.tp),
        dp=rank // layout.tp % layout.dp,
        tp=rank % layout.tp,
    )


def rank_of(coordinate: Coordinate, layout: Layout) -> int:
    """The inverse of `coordinate_of`.

    >>> rank_of(Coordinate(pp=1, dp=0, tp=1), Layout(pp=2, dp=2, tp=2))
    5
    """
    return (coordinate.pp * layout.dp + coordinate.dp) * layout.tp + coordinate.tp


@dataclass(frozen=True)
class RankMesh:
    """This rank's view of the grid. `tied_group` joins first and last stage at the same (dp, tp); it is None
    on other stages, with pp=1, and where embeddings are not tied."""

    device_mesh: DeviceMesh
    coordinate: Coordinate
    tied_group: dist.ProcessGroup | None

    def axis(self, name: str) -> DeviceMesh:
        return self.device_mesh[name]


def build_mesh(layout: Layout, device_type: str, *, tied_embeddings: bool) -> RankMesh:
    """The mesh and groups of a layout. Every rank creates every group, in the same order, or torch can hang."""
    shape = (layout.pp, layout.dp, layout.tp)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    here = coordinate_of(dist.get_rank(), layout)
    tied_group = None
    if tied_embeddings and layout.pp > 1:
        for dp in range(layout.dp):
            for tp in range(layout.tp):
                ends = [rank_of(Coordinate(pp, dp, tp), layout) for pp in (0, layout.pp - 1)]
                group = dist.new_group(ends)
                if dist.get_rank() in ends:
                    assert isinstance(group, dist.ProcessGroup)
                    tied_group = group
    return RankMesh(mesh, here, tied_group)
