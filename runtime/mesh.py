"""Layout -> DeviceMesh: which rank stands where on the axes pp, dp and tp."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from planner.layout import Layout

AXES = ("pp", "dp", "tp")  # dp, and edp, as a whole; under HSDP they are two dimensions of the mesh
EXPERT_AXES = ("edp", "ep", "etp")  # [Note: Expert grid] in planner/layout.py


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
    """This rank's view of the grid. `tied_group` joins the ranks of the first and the last stage at the same (dp, tp);
    it is None on other ranks, where one rank has both stages, and where embeddings are not tied."""

    device_mesh: DeviceMesh
    coordinate: Coordinate
    tied_group: dist.ProcessGroup | None
    expert_mesh: DeviceMesh | None = None

    def axis(self, name: str) -> DeviceMesh:
        """One of AXES or, with experts, EXPERT_AXES, as one or two dimensions: HSDP's dp is (replicate, shard)."""
        mesh = self.expert_mesh if name in EXPERT_AXES else self.device_mesh
        assert mesh is not None, name
        assert mesh.mesh_dim_names is not None
        if name in mesh.mesh_dim_names:
            return mesh[name]
        return mesh[f"{name}_replicate", f"{name}_shard"]

    def groups(self, name: str) -> list[dist.ProcessGroup]:
        """The process groups of an axis."""
        return self.axis(name).get_all_groups()

    def all_groups(self) -> list[dist.ProcessGroup]:
        """Every process group that this rank is in, but the world."""
        tied = [] if self.tied_group is None else [self.tied_group]
        return [group for axis in AXES for group in self.groups(axis)] + tied


def build_mesh(layout: Layout, device_type: str, *, tied_embeddings: bool, experts: bool = False) -> RankMesh:
    """The mesh and groups of a layout; with `experts` the expert grid over the same ranks too.

    Every rank creates every group, in the same order, or torch can hang.
    """
    replicas = layout.dp // layout.dp_shard if layout.zero else 1
    mesh = _mesh(device_type, {"pp": layout.pp, "dp": layout.dp, "tp": layout.tp}, replicas)
    expert_mesh = None
    if experts:
        sizes = {"pp": layout.pp, "edp": layout.edp, "ep": layout.ep, "etp": layout.etp}
        expert_mesh = _mesh(device_type, sizes, replicas)
    here = coordinate_of(dist.get_rank(), layout)
    tied_group = None
    last = layout.pipeline(1).rank_of(layout.stages - 1)
    if tied_embeddings and last > 0:
        for dp in range(layout.dp):
            for tp in range(layout.tp):
                ends = [rank_of(Coordinate(pp, dp, tp), layout) for pp in (0, last)]
                group = dist.new_group(ends)
                if dist.get_rank() in ends:
                    assert isinstance(group, dist.ProcessGroup)
                    tied_group = group
    return RankMesh(mesh, here, tied_group, expert_mesh)


def _mesh(device_type: str, sizes: dict[str, int], replicas: int) -> DeviceMesh:
    """Axes by name, slowest first; with several replicas the data-parallel one is cut in two."""
    cut: dict[str, int] = {}
    for name, size in sizes.items():
        if name in ("dp", "edp") and replicas > 1:
            cut |= {f"{name}_replicate": replicas, f"{name}_shard": size // replicas}
        else:
            cut[name] = size
    return init_device_mesh(device_type, tuple(cut.values()), mesh_dim_names=tuple(cut))
