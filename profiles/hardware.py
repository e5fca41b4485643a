"""HardwareProfile: what one device was measured (or published) to do, and the seconds that follow from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from .interpolate import RateGrid, causal_seconds_at, held_at, line_at, seconds_at, tiled_flops, tiled_seconds
from .points import (
    DIRECTIONS,
    DTYPE_BYTES,
    DTYPES,
    EAGER_PASSES,
    GEMM_OPERATIONS,
    AttentionModel,
    AttentionPoint,
    CollectivePoint,
    ContentionPoint,
    GemmModel,
    GemmPoint,
    ManyGemmPoint,
    MemoryPoint,
    OverlapPoint,
    ShardPoint,
    WaitPoint,
    read_point,
)
from .store import Reader, dump_yaml, load_document, write_atomically

SCHEMA = "meshwright.hardware/v1"
CORRECTED_PARTS = ("gemm", "attention", "memory", "tp", "dp", "optimizer")


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """One device and its surroundings; every list may be empty but one of a pair.

    While a kernel and a collective run at once, the kernel takes `overlap_compute_slowdown` times as long and
    the collective `overlap_communication_slowdown` times; 2 and 2 is where one waits for the other. Compute
    takes `straggler_slowdown` times what it takes the mean rank, since all wait for the slowest.
    `context_bytes` is what a rank holds before any tensor of the model; `communicator_bytes` per process group with
    more than one rank; `allocator_slack` the share of tensor bytes lost to the allocator.
    What no kernel and no collective explains: `microbatch_overhead_seconds` for each forward and backward of a
    microbatch; `shard_overhead_seconds` for each of one block whose weights are cut over tp, under sequence parallelism
    `sequence_shard_overhead_seconds` (`shard_overheads` by size, if any);
    `parameter_overhead_seconds` for each parameter tensor that a step clips and updates. Where kernels run behind the
    host (GPUs) `host_operation_seconds` is what it takes to issue one operation, `compiled_operation_seconds` one of a
    compiled block: no pass is shorter. Where the host is the device, `operation_overhead_seconds` is what each
    operation of a block takes besides its kernel; on top `split_overhead_seconds` for each of a backward in halves,
    `selective_overhead_seconds` for each of a forward under selective recomputation, both times that it runs;
    `fsdp_forward_overhead_seconds` and `fsdp_backward_overhead_seconds` what FSDP2 does around one module in a
    microbatch that neither gathers nor reduces; `message_overhead_seconds` (and for each byte so much more) what a
    message out and one in take from the compute beside them. `multiprocessors` is what a wave of tiles has, 0 where a
    GEMM has none (CPUs). Collectives were measured with `devices_per_node` ranks a node; `gemm_checks` are shapes off
    the grid, measured to judge the grid by.
    """

    name: str
    device: str
    backend: str
    memory_bytes: float
    context_bytes: float
    communicator_bytes: float
    allocator_slack: float
    memory_bandwidth_bytes_per_second: float
    launch_seconds: float
    overlap_compute_slowdown: float
    overlap_communication_slowdown: float
    straggler_slowdown: float = 1.0
    microbatch_overhead_seconds: float = 0.0
    shard_overhead_seconds: float = 0.0
    sequence_shard_overhead_seconds: float = 0.0
    parameter_overhead_seconds: float = 0.0
    host_operation_seconds: float = 0.0
    compiled_operation_seconds: float = 0.0
    operation_overhead_seconds: float = 0.0
    split_overhead_seconds: float = 0.0
    selective_overhead_seconds: float = 0.0
    fsdp_forward_overhead_seconds: float = 0.0
    fsdp_backward_overhead_seconds: float = 0.0
    message_overhead_seconds: float = 0.0
    message_overhead_seconds_per_byte: float = 0.0
    host_to_device_bytes_per_second: float | None = None
    device_to_host_bytes_per_second: float | None = None
    multiprocessors: int = 0
    devices_per_node: int = 0
    peak_flops_per_second: dict[str, float]
    provenance: dict[str, Any]
    corrections: dict[str, float] = field(default_factory=dict)
    gemm_models: tuple[GemmModel, ...] = ()
    attention_models: tuple[AttentionModel, ...] = ()
    contention_points: tuple[ContentionPoint, ...] = ()
    waits: tuple[WaitPoint, ...] = ()
    shard_overheads: tuple[ShardPoint, ...] = ()
    overlap: tuple[OverlapPoint, ...] = ()
    collectives: tuple[CollectivePoint, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()
    attention: tuple[AttentionPoint, ...] = ()
    gemm: tuple[GemmPoint, ...] = ()
    gemm_checks: tuple[GemmPoint, ...] = ()
    many_gemm: tuple[ManyGemmPoint, ...] = ()

    @property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """What the profiler had no time for though plans want it: cases by phase, as its provenance has them."""
        cases = self.provenance.get("cases")
        found = cases.get("left_out") if isinstance(cases, dict) else None
        found = found if isinstance(found, dict) else {}
        return {str(phase): tuple(map(str, names)) for phase, names in found.items() if isinstance(names, list)}

    # ---- seconds ---------------------------------------------------------------------------------------

    def gemm_seconds(self, operation: str, dtype: str, m: int, n: int, k: int, count: int = 1) -> float:
        """Seconds of the (m × k)·(k × n) product that `operation` of a linear issues, or of `count` of them as one."""
        grid = self._gemm_grids.get((dtype, operation))
        if grid is not None:
            return grid.seconds(m, n, k, count) * self.correction("gemm")
        model = self._gemm_models[dtype]
        compute = tiled_seconds(
            m,
            n,
            k,
            units=model.units,
            flops_per_second=model.achievable_flops_per_second,
            write_seconds=DTYPE_BYTES[dtype] / self.memory_bandwidth_bytes_per_second,
            count=count,
        )
        bytes_moved = DTYPE_BYTES[dtype] * (m * k + k * n + m * n) * count
        modelled = max(compute, bytes_moved / self.memory_bandwidth_bytes_per_second, self.launch_seconds)
        return modelled * self.correction("gemm")

    def batched_gemm_seconds(self, dtype: str, count: int, m: int, n: int, k: int) -> float:
        """Seconds of `count` separate products in one kernel, as attention without a flash kernel issues them.

        With an inner dimension of one head they are bound by memory, and neither side hides the other: arXiv
        2205.05198, table 4, has 1.3 ms for the core attention of 4 × 2048 tokens over 8 heads of 96 on an A100.
        """
        model = self._gemm_models.get(dtype)
        if model is None:
            return self.gemm_seconds("forward", dtype, m, n, k, count)
        compute = tiled_flops(m, n, k, model.units, count) / model.achievable_flops_per_second
        moved = DTYPE_BYTES[dtype] * (m * k + k * n + m * n) * count / self.memory_bandwidth_bytes_per_second
        return max(compute + moved, self.launch_seconds) * self.correction("attention")

    def attention_seconds(
        self, direction: str, dtype: str, batch: float, heads: int, sequence: float, head_dim: float, kernel: str = ""
    ) -> float:
        """Seconds of causal attention; FLOPs are 4 (forward) or 10 (backward, flash recomputes) · b·a·s²·d / 2.

        `kernel` names a generation of flash attention where the profile has a model for it; else its own.
        """
        flops = (2.0 if direction == "forward" else 5.0) * batch * heads * sequence**2 * head_dim
        rates = self._attention_rates.get((dtype, direction))
        if rates is not None:
            per_dim = min(rates, key=lambda dim: abs(math.log(dim / head_dim)))
            # Points hold the seconds of one sequence and head over s², which they are proportional to in the end.
            seconds = causal_seconds_at(rates[per_dim], sequence) * batch * heads * head_dim / per_dim
            return seconds * self.correction("attention")
        model = self._attention_models.get((dtype, kernel)) or self._attention_models[dtype, ""]
        rate = model.forward_flops_per_second if direction == "forward" else model.backward_flops_per_second
        return max(flops / rate, self.launch_seconds) * self.correction("attention")

    def memory_seconds(self, operation: str, dtype: str, elements: float, direction: str = "forward") -> float:
        """Seconds of a memory-bound operation (a key of EAGER_PASSES) over `elements` elements."""
        part = "optimizer" if operation in ("adamw", "gradient_norm") else "memory"
        points = self._memory_points.get((dtype, operation, direction))
        if points is not None:
            return seconds_at(points, elements) * self.correction(part)
        passes = EAGER_PASSES[operation][DIRECTIONS.index(direction)]
        if passes == 0:
            return 0.0
        moved = passes * elements * DTYPE_BYTES[dtype]
        return max(moved / self.memory_bandwidth_bytes_per_second, self.launch_seconds) * self.correction(part)

    def collective_seconds(self, operation: str, ranks: int, bytes_total: float, stride: int = 1) -> float | None:
        """Measured seconds of a collective (or of what FSDP2 does) over just such a group, None where none was.

        One size alone does not tell latency from bandwidth: it says nothing of messages far larger.
        """
        points = self._collective_points.get((operation, ranks, stride))
        if points is None or (len(points) == 1 and bytes_total > 4 * points[0][0]):
            return None
        return line_at(points, bytes_total)

    def only_collective_point(self, operation: str, ranks: int, stride: int) -> tuple[float, float] | None:
        """(bytes, seconds) of such a group where just one size was measured."""
        points = self._collective_points.get((operation, ranks, stride), [])
        return points[0] if len(points) == 1 else None

    def contention(self, active: float, memory_bytes: float = 0.0) -> float:
        """What a kernel takes with `active` ranks of a node computing, in times of what it takes with one.

        With `memory_bytes` one bound by memory on tensors of so many; where none was measured all take as a GEMM does.
        """
        curves = self._contention_curves
        sizes = [(math.log(size), held_at(curve, active, 1.0)) for size, curve in curves.items() if size]
        if memory_bytes > 0 and sizes:
            return held_at(sizes, math.log(memory_bytes), 1.0)
        return held_at(curves.get(0, []), active, 1.0)

    def wait_seconds(self, compute_seconds: float) -> float:
        """What a collective after so much compute waits for the slowest rank beyond what its own points hold.

        Collectives are measured after as much compute as the first of `waits` has. It never falls with more compute.
        """
        return held_at(self._risen_waits, compute_seconds, 0.0)

    def shard_seconds(self, sequence: bool, linear_bytes: float) -> float:
        """What cutting it over tp adds to a pass of a block one of whose linears reads and writes so many bytes."""
        known = self.sequence_shard_overhead_seconds if sequence else self.shard_overhead_seconds
        points = [(float(p.bytes), p.seconds) for p in self.shard_overheads if p.sequence == sequence]
        return held_at(points, linear_bytes, known)

    def correction(self, part: str) -> float:
        """What measured runs multiply this part's seconds by (`profile --calibrate`); 1 where they say nothing."""
        return self.corrections.get(part, 1.0)

    def exposed_seconds(self, communication_seconds: float, compute_seconds: float) -> float:
        """What a collective adds to the compute that it runs beside, both at their overlapped pace meanwhile.

        With compute c slowed to a·c and communication m to b·m: if the collective ends first, the kernels have
        lost b·m·(1 - 1/a); else the rest of it runs alone. Never more than one after the other.
        """
        c, m = compute_seconds, communication_seconds
        a, b = self.overlap_compute_slowdown, self.overlap_communication_slowdown
        added = b * m * (1.0 - 1.0 / a) if b * m <= a * c else m + c * (a - 1.0 - a / b)
        return min(m, added)

    def knows_memory(self, dtype: str) -> bool:
        """Whether memory-bound seconds of this dtype are measured, or nothing was (then bytes decide)."""
        return not self._memory_points or any(key[0] == dtype for key in self._memory_points)

    # ---- indices over the points -----------------------------------------------------------------------

    @cached_property
    def _risen_waits(self) -> list[tuple[float, float]]:
        """(seconds of compute, seconds waited more than at the least of it), none below one before it."""
        points = sorted((p.compute_seconds, p.wait_seconds) for p in self.waits)
        risen = accumulate((wait for _, wait in points), max)
        return [(compute, wait - points[0][1]) for (compute, _), wait in zip(points, risen, strict=True)]

    @cached_property
    def _gemm_grids(self) -> dict[tuple[str, str], RateGrid]:
        groups: dict[tuple[str, str], list[tuple[int, int, int, float]]] = {}
        for p in self.gemm:
            groups.setdefault((p.dtype, p.operation), []).append((p.m, p.n, p.k, p.seconds))
        return {key: RateGrid(points, self.multiprocessors) for key, points in groups.items()}

    @cached_property
    def _gemm_models(self) -> dict[str, GemmModel]:
        return {model.dtype: model for model in self.gemm_models}

    @cached_property
    def _attention_models(self) -> dict[tuple[str, str], AttentionModel]:
        return {(model.dtype, model.kernel): model for model in self.attention_models}

    @cached_property
    def _attention_rates(self) -> dict[tuple[str, str], dict[int, list[tuple[float, float]]]]:
        groups: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
        for p in self.attention:
            if p.backend != "default" or not p.causal or p.kv_heads:
                continue
            points = groups.setdefault((p.dtype, p.direction), {}).setdefault(p.head_dim, [])
            points.append((p.sequence**2, p.seconds / (p.batch * p.heads)))
        return {key: {dim: sorted(points) for dim, points in dims.items()} for key, dims in groups.items()}

    @cached_property
    def _memory_points(self) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
        groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for p in self.memory:
            groups.setdefault((p.dtype, p.operation, p.direction), []).append((p.elements, p.seconds))
        return {key: sorted(points) for key, points in groups.items()}

    @cached_property
    def _collective_points(self) -> dict[tuple[str, int, int], list[tuple[float, float]]]:
        groups: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        for p in self.collectives:
            if not p.uneven:
                groups.setdefault((p.operation, p.ranks, p.stride), []).append((p.bytes, p.seconds))
        return {key: sorted(points) for key, points in groups.items()}

    @cached_property
    def _contention_curves(self) -> dict[int, list[tuple[float, float]]]:
        """(active, slowdown) by bytes of what is bound by memory, 0 for a GEMM."""
        curves: dict[int, list[tuple[float, float]]] = {}
        for p in self.contention_points:
            curves.setdefault(p.memory_bytes, []).append((float(p.active), p.slowdown))
        return curves

    # ---- files -----------------------------------------------------------------------------------------

    def supports(self, precision: str) -> bool:
        """Whether GEMM and attention seconds, forward and backward, and the peak are known for the precision.

        Where the GEMMs are fp8, attention and all else is bf16.
        """
        around = "bf16" if precision == "fp8" else precision
        gemm = all((precision, operation) in self._gemm_grids for operation in GEMM_OPERATIONS)
        attention = all((around, direction) in self._attention_rates for direction in DIRECTIONS)
        return (
            (gemm or precision in self._gemm_models)
            and (attention or (around, "") in self._attention_models)
            and precision in self.peak_flops_per_second
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **asdict(self),
            **{key: [_short(p) for p in getattr(self, key)] for key in POINT_LISTS},
        }

    @classmethod
    def from_dict(cls, reader: Reader) -> HardwareProfile:
        peaks, corrections = reader.child("peak_flops_per_second"), reader.child("corrections", default={})
        optional: dict[str, Any] = {key: reader.number(key, minimum=0, default=0.0) for key in _OVERHEADS}
        optional |= {key: _number_or_null(reader, key) for key in _HOST_LINK}
        for key, kind in POINT_LISTS.items():
            optional[key] = tuple(read_point(kind, child) for child in reader.children(key, default=[]))
        profile = cls(
            name=reader.text("name"),
            device=reader.text("device"),
            backend=reader.text("backend"),
            memory_bytes=reader.number("memory_bytes", above=0),
            context_bytes=reader.number("context_bytes", minimum=0),
            communicator_bytes=reader.number("communicator_bytes", minimum=0),
            allocator_slack=reader.number("allocator_slack", minimum=0),
            memory_bandwidth_bytes_per_second=reader.number("memory_bandwidth_bytes_per_second", above=0),
            launch_seconds=reader.number("launch_seconds", minimum=0),
            overlap_compute_slowdown=reader.number("overlap_compute_slowdown", minimum=1),
            overlap_communication_slowdown=reader.number("overlap_communication_slowdown", minimum=1),
            straggler_slowdown=reader.number("straggler_slowdown", minimum=1, default=1.0),
            multiprocessors=reader.integer("multiprocessors", default=0),
            devices_per_node=reader.integer("devices_per_node", default=0),
            peak_flops_per_second={key: peaks.number(key, above=0) for key in peaks},
            provenance=reader.plain("provenance"),
            corrections={key: corrections.number(key, above=0) for key in corrections},
            **optional,
        )
        reader.finish()
        for part in profile.corrections:
            if part not in CORRECTED_PARTS:
                raise reader.fail(f"corrections.{part}", "one of " + ", ".join(CORRECTED_PARTS), part)
        if not any(profile.supports(dtype) for dtype in DTYPES):
            raise reader.fail("gemm", "points or a model of GEMM and attention for one dtype at least", "neither")
        return profile


# Seconds that a file may leave out.
_OVERHEADS = tuple(f.name for f in fields(HardwareProfile) if f.type == "float" and f.default == 0.0)
_HOST_LINK = ("host_to_device_bytes_per_second", "device_to_host_bytes_per_second")
# Lists of the file, in its order.
POINT_LISTS: dict[str, type] = {
    "gemm_models": GemmModel,
    "attention_models": AttentionModel,
    "contention_points": ContentionPoint,
    "waits": WaitPoint,
    "shard_overheads": ShardPoint,
    "overlap": OverlapPoint,
    "collectives": CollectivePoint,
    "memory": MemoryPoint,
    "attention": AttentionPoint,
    "gemm": GemmPoint,
    "gemm_checks": GemmPoint,
    "many_gemm": ManyGemmPoint,
}


def _short(point: Any) -> dict[str, Any]:
    """A point as it stands in the file: what is at its default is left out."""
    return {f.name: getattr(point, f.name) for f in fields(point) if getattr(point, f.name) != f.default}


def _number_or_null(reader: Reader, key: str) -> float | None:
    return None if reader.anything(key, default=None) is None else reader.number(key, above=0)


def load_hardware(path: Path) -> HardwareProfile:
    """The profile in `path`; an InputError names file and key path of whatever is wrong."""
    return HardwareProfile.from_dict(load_document(path, schema=SCHEMA, kind="hardware profile"))


def save_hardware(profile: HardwareProfile, path: Path) -> None:
    """Write the profile to `path`, whole or not at all."""
    write_atomically(path, dump_yaml(profile.to_dict()))
