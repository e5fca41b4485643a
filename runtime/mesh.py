"""Layout -> DeviceMesh: which rank stands where on the axes pp, dp, cp and tp."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from planner.layout import Layout

# dp here are the dp·cp ranks with the same dense weights. It, and edp, as a whole; under HSDP they are two dimensions.
AXES = ("pp", "dp", "tp")
EXPERT_AXES = ("edp", "ep", "etp")  # [Note: Expert grid] in planner/layout.py


@dataclass(frozen=True)
class Coordinate:
    """Where a rank stands on each mesh axis."""

    pp: int
    dp: int
    cp: int
    tp: int


def coordinate_of(rank: int, layout: Layout) -> Coordinate:
    """Ranks count tp fastest, then cp, dp, pp.

    With pp=2, dp=2, cp=2, tp=2 rank 11 = 1·8 + 0·4 + 1·2 + 1:

    >>> coordinate_of(11, Layout(pp=2, dp=2, cp=2, tp=2))
    Coordinate(pp=1, dp=0, cp=1, tp=1)
    """
    return Coordinate(
        pp=rank // (layout.dp * layout.cp * layout.tp),
        dp=rank // (layout.cp * layout.tp) % layout.dp,
        cp=rank // layout.tp % layout.cp,
        tp=rank % layout.tp,
    )


def rank_of(coordinate: Coordinate, layout: Layout) -> int:
    """The inverse of `coordinate_of`.

    >>> rank_of(Coordinate(pp=1, dp=0, cp=1, tp=1), Layout(pp=2, dp=2, cp=2, tp=2))
    11
    """
    sequences = coordinate.pp * layout.dp + coordinate.dp
    return (sequences * layout.cp + coordinate.cp) * layout.tp + coordinate.tp


@dataclass(frozen=True)
class RankMesh:
    """This rank's view of the grid.

    `context_group` is its cp group, `sequence_group` the ranks of cp and tp, where both cut the sequence; None where
    cp=1. `tied_group` joins the ranks of the first and the last stage at the same (dp, cp, tp); it is None on other
    ranks, where one rank has both stages, and where embeddings are not tied.
    """

    device_mesh: DeviceMesh
    coordinate: Coordinate
    tied_group: dist.ProcessGroup | None
    expert_mesh: DeviceMesh | None = None
    context_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None

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
        beside = (self.tied_group, self.context_group, self.sequence_group)
        return [group for axis in AXES for group in self.groups(axis)] + [
            group for group in beside if group is not None
        ]


def build_mesh(layout: Layout, device_type: str, *, tied_embeddings: bool, experts: bool = False) -> RankMesh:
    """The mesh and groups of a layout; with `experts` the expert grid over the same ranks too.

    Every rank creates every group, in the same order, or torch can hang.
    """
    replicas = layout.dp // layout.dp_shard if layout.zero else 1
    mesh = _mesh(device_type, {"pp": layout.pp, "dp": layout.dp * layout.cp, "tp": layout.tp}, replicas)
    expert_mesh = None
    if experts:
        sizes = {"pp": layout.pp, "edp": layout.edp, "ep": layout.ep, "etp": layout.etp}
        expert_mesh = _mesh(device_type, sizes, replicas)
    context_group = sequence_group = tied_group = None
    world, of_stage = range(layout.world_size), layout.world_size // layout.pp
    if layout.cp > 1:
        of_sequence = layout.cp * layout.tp
        context_group = _own_group(
            [start + tp + layout.tp * cp for cp in range(layout.cp)]
            for start in world[::of_sequence]
            for tp in range(layout.tp)
        )
        if experts and layout.sequence_parallel:
            sequence_group = _own_group(list(world[start : start + of_sequence]) for start in world[::of_sequence])
    last = layout.pipeline(1).rank_of(layout.stages - 1)
    if tied_embeddings and last > 0:
        tied_group = _own_group([rank, rank + last * of_stage] for rank in range(of_stage))
    here = coordinate_of(dist.get_rank(), layout)
    return RankMesh(mesh, here, tied_group, expert_mesh, context_group, sequence_group)


def _own_group(groups: Iterable[list[int]]) -> dist.ProcessGroup | None:
    """Make all groups; the one that this rank is in, if any."""
    own = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    return own


def _mesh(device_type: str, sizes: dict[str, int], replicas: int) -> DeviceMesh:
    """Axes by name, slowest first; with several replicas the data-parallel one is cut in two."""
    cut: dict[str, int] = {}
    for name, size in sizes.items():
        if name in ("dp", "edp") and replicas > 1:
            cut |= {f"{name}_replicate": replicas, f"{name}_shard": size // replicas}
        else:
            cut[name] = size
    return init_device_mesh(device_type, tuple(cut.values()), mesh_dim_names=tuple(cut))
