"""What the profiler has found so far, and the HardwareProfile and ClusterSpec that it makes."""

from __future__ import annotations

import datetime
import platform
import statistics
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..cluster import ClusterSpec
from ..hardware import HardwareProfile
from ..input_error import InputError
from ..link_fit import fit_links
from ..link_tiers import LEVEL_RATIO, Tier, tiers_from_matrix
from ..points import (
    DTYPE_BYTES,
    EAGER_PASSES,
    AttentionPoint,
    CollectivePoint,
    ContentionPoint,
    GemmPoint,
    ManyGemmPoint,
    MemoryPoint,
    OverlapPoint,
    ShardPoint,
    WaitPoint,
)
from .pace import local_pace

LIST_OF: dict[type, str] = {
    GemmPoint: "gemm",
    ManyGemmPoint: "many_gemm",
    AttentionPoint: "attention",
    MemoryPoint: "memory",
    CollectivePoint: "collectives",
    OverlapPoint: "overlap",
    ContentionPoint: "contention_points",
    WaitPoint: "waits",
    ShardPoint: "shard_overheads",
}
_POINT_OF = {name: kind for kind, name in LIST_OF.items()} | {"gemm_checks": GemmPoint}
_NCCL_COMMUNICATOR_BYTES = 616e6  # middle of the 544 to 688 MB that one was seen to take; gloo's buffers are small
_ALLOCATOR_SLACK = 0.05  # nominal: blocks that the allocator holds and no tensor uses
_BLOCKED = 2.0  # FSDP2 on gloo waits for each collective
_NOT_MEASURED = (1.1, 1.2)  # nominal slowdowns of kernel and collective side by side, until overlap is measured
_LIBRARIES = ("torch", "numpy", "nvidia-ml-py")


@dataclass(frozen=True)
class Request:
    """What to measure: how thoroughly (a level of cases), until when (UNIX seconds), for which dtypes.

    `done` names the cases that an earlier profile has already.
    """

    level: int
    deadline: float
    dtypes: tuple[str, ...]
    done: frozenset[str] = frozenset()


@dataclass
class Findings:
    """Points by list of the profile, single figures by name, and what is known of the machine."""

    command: str
    ranks: int
    facts: dict[str, Any] = field(default_factory=dict)
    points: dict[str, list[Any]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    ended: dict[str, Any] | None = None
    _measured_at: dict[str, dict[int | str, int]] = field(default_factory=dict)

    @classmethod
    def of_profile(cls, profile: HardwareProfile, command: str, ranks: int) -> Findings:
        """What an earlier, perhaps interrupted, profile has found."""
        kept = profile.provenance.get("cases", {})
        figures = dict(kept.get("figures", {}))
        points = {name: list(getattr(profile, name)) for name in _POINT_OF if getattr(profile, name)}
        done, skipped = list(kept.get("done", [])), dict(kept.get("skipped", {}))
        return cls(command, ranks, points=points, figures=figures, done=done, skipped=skipped)

    def add_case(self, name: str, found: dict[str, Any], skipped: str, pace: float) -> None:
        """Book one case: its points, or its figures, or why there are none; and the machine's pace before it."""
        self.done.append(name)
        if skipped:
            self.skipped[name] = skipped
        for key, content in found.items():
            if key in _POINT_OF:
                kind, kept = _POINT_OF[key], self.points.setdefault(key, [])
                for p in content:
                    self._measured_at.setdefault(key, {})[len(kept)] = len(self.paces)
                    kept.append(kind(**p) if isinstance(p, dict) else p)
            else:
                self.figures[key] = content
                self._measured_at.setdefault("figures", {})[key] = len(self.paces)
        self.paces.append(pace)

    def _slowness(self, key: str, place: int | str, typical: float) -> float:
        """How slow the machine was at a measurement of this session, in times of the `typical` pace."""
        at = self._measured_at.get(key, {}).get(place)
        return local_pace(self.paces, at) / typical if at is not None else 1.0

    def _at_one_pace(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(points by list, figures), all as at the median pace ([Note: Pace] in pace.py)."""
        typical = statistics.median(self.paces) if self.paces else 1.0
        points: dict[str, Any] = {}
        for key, found in self.points.items():
            timed = bool(found) and hasattr(found[0], "seconds")
            points[key] = tuple(
                replace(p, seconds=p.seconds / self._slowness(key, i, typical)) if timed else p
                for i, p in enumerate(found)
            )
        figures = {
            name: value / self._slowness("figures", name, typical) if name.endswith("_seconds") else value
            for name, value in self.figures.items()
        }
        return points, figures

    @property
    def usable(self) -> bool:
        """Whether a plan can be made from what there is."""
        return bool(self.facts) and self._dtypes() != []

    def _dtypes(self) -> list[str]:
        """Dtypes with all three products, attention both ways."""
        gemm = {(p.dtype, p.operation) for p in self.points.get("gemm", [])}
        attention = {(p.dtype, p.direction) for p in self.points.get("attention", [])}
        dtypes = {dtype for dtype, _ in gemm}
        return sorted(
            d for d in dtypes if sum(key[0] == d for key in gemm) == 3 and sum(key[0] == d for key in attention) == 2
        )

    # ---- the profile ---------------------------------------------------------------------------------------

    def hardware(self) -> HardwareProfile:
        """The profile of what has been found; `usable` must hold."""
        cuda = self.facts["cuda"]
        points, figures = self._at_one_pace()
        peaks = {
            dtype: max(2.0 * p.m * p.n * p.k / p.seconds for p in points["gemm"] if p.dtype == dtype)
            for dtype in sorted({p.dtype for p in points["gemm"]})
        }
        sums = [p for p in points.get("memory", ()) if p.operation == "residual" and p.direction == "forward"]
        largest = max(sums, key=lambda p: p.elements, default=None)
        named = {k: v for k, v in figures.items() if k.endswith(("_seconds", "_slowdown", "_per_second"))}
        compute, communication = self._overlap() if cuda else (_BLOCKED, _BLOCKED)
        return HardwareProfile(
            name="local",
            device=self.facts["device"],
            backend="nccl" if cuda else "gloo",
            memory_bytes=self.facts["memory_bytes"],
            context_bytes=self.facts["context_bytes"],
            communicator_bytes=_NCCL_COMMUNICATOR_BYTES if cuda else 0.0,
            allocator_slack=_ALLOCATOR_SLACK,
            memory_bandwidth_bytes_per_second=_sum_bytes(largest) / largest.seconds if largest else 1e10,
            **({"launch_seconds": 5e-6} | named),
            overlap_compute_slowdown=compute,
            overlap_communication_slowdown=communication,
            multiprocessors=self.facts["multiprocessors"],
            devices_per_node=self.facts["runs"][0] if self.ranks > 1 else 0,
            peak_flops_per_second=peaks,
            provenance=self._provenance(figures),
            **points,
        )

    def _overlap(self) -> tuple[float, float]:
        found = self.points.get("overlap", [])
        if not found:
            return _NOT_MEASURED
        return (
            statistics.median(p.compute_slowdown for p in found),
            statistics.median(p.communication_slowdown for p in found),
        )

    def _provenance(self, figures: dict[str, Any]) -> dict[str, Any]:
        facts = self.facts
        return {
            "kind": "measured",
            "complete": self.ended is not None,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "host": platform.node(),
            "system": platform.platform(),
            "ranks": self.ranks,
            "nodes": len(facts["runs"]),
            "python": platform.python_version(),
            "libraries": {name: _version(name) for name in _LIBRARIES},
            "driver": facts["driver"],
            "nccl": facts["nccl"],
            "topology": facts["topology"],
            "pace": self._pace(),
            "conditions": {"before": facts["conditions_before"], **(self.ended or {})},
            "cases": {"figures": figures, "skipped": self.skipped, "done": self.done} | self._left_out(),
        }

    def _left_out(self) -> dict[str, Any]:
        """The quick cases by phase that time did not hold; nothing where it held all."""
        found: dict[str, list[str]] = {}
        for phase, name in self.facts.get("quick_cases", ()):
            if name not in self.done:
                found.setdefault(phase, []).append(name)
        return {"left_out": found} if found else {}

    def _pace(self) -> dict[str, float] | None:
        """Seconds of the reference work in this session; None where nothing was scaled by it."""
        if self.facts["cuda"] or not self.paces:
            return None
        return {
            "median_seconds": statistics.median(self.paces),
            "fastest_seconds": min(self.paces),
            "slowest_seconds": max(self.paces),
        }

    # ---- the cluster ---------------------------------------------------------------------------------------

    def cluster(self, hardware: str) -> ClusterSpec:
        """The machine (or machines) that the ranks were on, `hardware` the name of the profile beside it."""
        runs = self.facts["runs"]
        if len(set(runs)) > 1:
            raise InputError(
                "the ranks are not spread evenly over the nodes",
                where="the ranks, in order",
                expected="as many on each node, those of one node next to each other",
                got="on each node in turn " + ", ".join(map(str, runs)),
                hint="start as many ranks on every node, as torchrun --nproc-per-node does",
            )
        return ClusterSpec(
            name="local",
            hardware=hardware,
            nodes=len(runs),
            devices_per_node=runs[0],
            memory_bytes=self.facts["memory_bytes"],
            links=fit_links(
                self._at_one_pace()[0].get("collectives", ()),
                self._tiers(),
                runs[0],
                shared_wires=self._wires_are_shared(),
            ),
        )

    def _wires_are_shared(self) -> bool:
        """Whether a pair of neighbours across two nodes, who meet alone, is faster than all pairs at once."""
        per_node, world, matrix = self.facts["runs"][0], self.ranks, self.figures.get("bandwidths")
        if matrix is None or per_node in (1, world):
            return False
        alone = [matrix[i][i + 1] for i in range(per_node - 1, world - 1, per_node)]
        together = [matrix[i][i + per_node] for i in range(world - per_node)]
        return statistics.median(alone) > LEVEL_RATIO * statistics.median(together)

    def _tiers(self) -> list[Tier]:
        """Tiers from the point-to-point matrix, of which a node is always one where there are several nodes."""
        per_node, world = self.facts["runs"][0], self.ranks
        if world == 1:
            return []
        matrix = self.figures.get("bandwidths")
        if matrix is None:
            found: list[Tier] = [Tier(span=world, bandwidth_bytes_per_second=1e9)]
        else:
            whole = [[x or 1.0 for x in row] for row in matrix]
            found = list(tiers_from_matrix(whole).tiers)
        spans = {tier.span for tier in found}
        if 1 < per_node < world and per_node not in spans:
            inside = [t for t in found if t.span > per_node]
            found.append(replace(inside[0], span=per_node))
        return sorted((t for t in found if t.span % per_node == 0 or per_node % t.span == 0), key=lambda t: t.span)


def _sum_bytes(point: MemoryPoint) -> float:
    """Bytes that a sum of two tensors reads and writes."""
    return EAGER_PASSES["residual"][0] * DTYPE_BYTES[point.dtype] * point.elements


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
