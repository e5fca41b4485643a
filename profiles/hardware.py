"""HardwareProfile: what one device was measured (or published) to do, and the seconds that follow from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from .interpolate import RateGrid, seconds_at
from .store import Reader, dump_yaml, load_document, write_atomically

SCHEMA = "meshwright.hardware/v1"
DTYPES = ("fp32", "bf16", "fp16")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GEMM_OPERATIONS = ("forward", "input_grad", "weight_grad")
DIRECTIONS = ("forward", "backward")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")

# Tensors that cross memory per element, (forward, backward), when each operation is one eager kernel:
# a read or a write of one element each. Counted from what torch's CUDA kernels do.
EAGER_PASSES = {
    "rmsnorm": (2, 3),  # read x, write y; read x and dy, write dx
    "layernorm": (2, 3),
    "rope": (8, 8),  # negate-and-join halves (3), two products (2·2.5), their sum; the same back
    "swiglu": (5, 9),  # silu (2), product (3); two product gradients (6), silu gradient (3)
    "gelu": (2, 3),
    "gelu_tanh": (2, 3),
    "residual": (3, 3),  # sum of two; the gradients of the two branches meet
    "copy": (2, 2),
    "embedding": (2, 3),
    "cross_entropy": (6, 6),  # cast to fp32 (3), log-softmax (2), pick; and back
    "accumulate": (3, 0),  # gradient += new gradient
    "gradient_norm": (3, 0),  # read for the norm, read and write for the scaling
    "adamw": (7, 0),  # read weight, gradient and two moments, write three
}


@dataclass(frozen=True, kw_only=True)
class GemmPoint:
    """Seconds of one product (m × k)·(k × n), measured with every rank computing."""

    dtype: str
    operation: str
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class GemmModel:
    """A GEMM by tiles and waves where nothing was measured: `units` multiprocessors of `achievable` FLOP/s."""

    dtype: str
    achievable_flops_per_second: float
    units: int
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class AttentionPoint:
    """Seconds of causal attention of `batch` sequences."""

    dtype: str
    direction: str
    batch: int
    heads: int
    sequence: int
    head_dim: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AttentionModel:
    """FLOP/s of a flash kernel on the causal half, where nothing was measured."""

    dtype: str
    forward_flops_per_second: float
    backward_flops_per_second: float
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """Seconds of a memory-bound operation on `elements` elements."""

    dtype: str
    operation: str
    direction: str
    elements: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CollectivePoint:
    """Seconds of a collective over `ranks` ranks; `bytes` is the whole tensor (gathered, or before scatter)."""

    operation: str
    ranks: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """One device and its surroundings. Seconds, bytes and FLOPs; every list may be empty but one of a pair.

    `hidden_communication` is the share of a data-parallel collective that can run behind compute: 0 where
    the backend blocks (gloo under FSDP2), up to 1 where it has a stream of its own.
    `context_bytes` is what a rank holds before any tensor of the model; `communicator_bytes` per process
    group with more than one rank; `allocator_slack` the share of tensor bytes lost to the allocator.
    What no kernel and no collective explains: `microbatch_overhead_seconds` for each forward and backward of
    a microbatch; `shard_overhead_seconds` for each forward or backward of one block whose weights are cut
    over tp, `sequence_shard_overhead_seconds` instead under sequence parallelism.
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
    hidden_communication: float
    microbatch_overhead_seconds: float = 0.0
    shard_overhead_seconds: float = 0.0
    sequence_shard_overhead_seconds: float = 0.0
    peak_flops_per_second: dict[str, float]
    provenance: dict[str, Any]
    gemm_models: tuple[GemmModel, ...] = ()
    attention_models: tuple[AttentionModel, ...] = ()
    gemm: tuple[GemmPoint, ...] = ()
    attention: tuple[AttentionPoint, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()
    collectives: tuple[CollectivePoint, ...] = ()

    # ---- seconds ---------------------------------------------------------------------------------------

    def gemm_seconds(self, operation: str, dtype: str, m: int, n: int, k: int) -> float:
        """Seconds of the (m × k)·(k × n) product that `operation` of a linear issues."""
        grid = self._gemm_grids.get((dtype, operation))
        if grid is not None:
            return 2.0 * m * n * k / grid.flops_per_second(m, n, k)
        model = self._gemm_models[dtype]
        compute = min(_tiled_flops(m, n, k, tile, model.units) for tile in _TILES) / model.achievable_flops_per_second
        bytes_moved = DTYPE_BYTES[dtype] * (m * k + k * n + m * n)
        return max(compute, bytes_moved / self.memory_bandwidth_bytes_per_second, self.launch_seconds)

    def attention_seconds(
        self, direction: str, dtype: str, batch: int, heads: int, sequence: int, head_dim: int
    ) -> float:
        """Seconds of causal attention; FLOPs are 4 (forward) or 10 (backward, flash recomputes) · b·a·s²·d / 2."""
        flops = (2.0 if direction == "forward" else 5.0) * batch * heads * sequence**2 * head_dim
        rates = self._attention_rates.get((dtype, direction))
        if rates is not None:
            per_dim = min(rates, key=lambda dim: abs(math.log(dim / head_dim)))
            # Points hold the seconds of one sequence and head, so that s² is inside the interpolation.
            return seconds_at(rates[per_dim], sequence) * batch * heads * head_dim / per_dim
        model = self._attention_models[dtype]
        rate = model.forward_flops_per_second if direction == "forward" else model.backward_flops_per_second
        return max(flops / rate, self.launch_seconds)

    def memory_seconds(self, operation: str, dtype: str, elements: float, direction: str = "forward") -> float:
        """Seconds of a memory-bound operation (a key of EAGER_PASSES) over `elements` elements."""
        points = self._memory_points.get((dtype, operation, direction))
        if points is not None:
            return seconds_at(points, elements)
        passes = EAGER_PASSES[operation][DIRECTIONS.index(direction)]
        if passes == 0:
            return 0.0
        moved = passes * elements * DTYPE_BYTES[dtype]
        return max(moved / self.memory_bandwidth_bytes_per_second, self.launch_seconds)

    def collective_seconds(self, operation: str, ranks: int, bytes_total: float) -> float | None:
        """Measured seconds of a collective, or None where nothing was measured for it.

        Group sizes between or beyond the measured ones take the nearest measured size, scaled by the ring's
        share of the bytes, (n-1)/n, and by its n-1 steps where latency rules.
        """
        groups = self._collective_points.get(operation)
        if not groups:
            return None
        nearest = min(groups, key=lambda n: abs(math.log(n / ranks)))
        seconds = seconds_at(groups[nearest], bytes_total)
        if nearest == ranks or operation == "send_recv":
            return seconds
        latency = min(groups[nearest][0][1], seconds)
        share = ((ranks - 1) / ranks) / ((nearest - 1) / nearest)
        return latency * (ranks - 1) / (nearest - 1) + (seconds - latency) * share

    def knows_memory(self, dtype: str) -> bool:
        """Whether memory-bound seconds of this dtype are measured, or nothing was (then bytes decide)."""
        return not self._memory_points or any(key[0] == dtype for key in self._memory_points)

    # ---- indices over the points -----------------------------------------------------------------------

    @cached_property
    def _gemm_grids(self) -> dict[tuple[str, str], RateGrid]:
        groups: dict[tuple[str, str], list[tuple[int, int, int, float]]] = {}
        for p in self.gemm:
            groups.setdefault((p.dtype, p.operation), []).append((p.m, p.n, p.k, p.seconds))
        return {key: RateGrid(points) for key, points in groups.items()}

    @cached_property
    def _gemm_models(self) -> dict[str, GemmModel]:
        return {model.dtype: model for model in self.gemm_models}

    @cached_property
    def _attention_models(self) -> dict[str, AttentionModel]:
        return {model.dtype: model for model in self.attention_models}

    @cached_property
    def _attention_rates(self) -> dict[tuple[str, str], dict[int, list[tuple[float, float]]]]:
        groups: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
        for p in self.attention:
            points = groups.setdefault((p.dtype, p.direction), {}).setdefault(p.head_dim, [])
            points.append((p.sequence, p.seconds / (p.batch * p.heads)))
        return {key: {dim: sorted(points) for dim, points in dims.items()} for key, dims in groups.items()}

    @cached_property
    def _memory_points(self) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
        groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for p in self.memory:
            groups.setdefault((p.dtype, p.operation, p.direction), []).append((p.elements, p.seconds))
        return {key: sorted(points) for key, points in groups.items()}

    @cached_property
    def _collective_points(self) -> dict[str, dict[int, list[tuple[float, float]]]]:
        groups: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for p in self.collectives:
            groups.setdefault(p.operation, {}).setdefault(p.ranks, []).append((p.bytes, p.seconds))
        return {op: {ranks: sorted(points) for ranks, points in sizes.items()} for op, sizes in groups.items()}

    # ---- files -----------------------------------------------------------------------------------------

    def supports(self, precision: str) -> bool:
        """Whether GEMM and attention seconds, forward and backward, and the peak are known for the precision."""
        gemm = all((precision, operation) in self._gemm_grids for operation in GEMM_OPERATIONS)
        attention = all((precision, direction) in self._attention_rates for direction in DIRECTIONS)
        return (
            (gemm or precision in self._gemm_models)
            and (attention or precision in self._attention_models)
            and precision in self.peak_flops_per_second
        )

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), **{key: [asdict(p) for p in getattr(self, key)] for key in _LISTS}}

    @classmethod
    def from_dict(cls, reader: Reader) -> HardwareProfile:
        peaks = reader.child("peak_flops_per_second")
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
            hidden_communication=reader.number("hidden_communication", minimum=0),
            microbatch_overhead_seconds=reader.number("microbatch_overhead_seconds", minimum=0, default=0.0),
            shard_overhead_seconds=reader.number("shard_overhead_seconds", minimum=0, default=0.0),
            sequence_shard_overhead_seconds=reader.number("sequence_shard_overhead_seconds", minimum=0, default=0.0),
            peak_flops_per_second={key: peaks.number(key, above=0) for key in peaks},
            provenance=dict(reader.anything("provenance", default={})),
            **{
                key: tuple(_point(kind, child) for child in reader.children(key, default=[]))
                for key, kind in _LISTS.items()
            },
        )
        reader.finish()
        if profile.hidden_communication > 1:
            raise reader.fail("hidden_communication", "a share from 0 to 1", profile.hidden_communication)
        if not any(profile.supports(dtype) for dtype in DTYPES):
            raise reader.fail("gemm", "points or a model of GEMM and attention for one dtype at least", "neither")
        return profile


_TILES = ((256, 128), (128, 128), (128, 64))


def _tiled_flops(m: int, n: int, k: int, tile: tuple[int, int], units: int) -> float:
    """FLOPs that a grid of tiles spends, the last wave and the ragged edges counted whole.

    A wave is `units` tiles at once (Nvidia, Matrix Multiplication Background: tile and wave quantization).
    """
    tiles = -(-m // tile[0]) * -(-n // tile[1])
    waves = -(-tiles // units)
    return 2.0 * waves * units * tile[0] * tile[1] * k


_LISTS: dict[str, Any] = {
    "gemm_models": GemmModel,
    "attention_models": AttentionModel,
    "gemm": GemmPoint,
    "attention": AttentionPoint,
    "memory": MemoryPoint,
    "collectives": CollectivePoint,
}
_CHOICES = {"dtype": DTYPES, "direction": DIRECTIONS}


def _points(key: str, reader: Reader) -> tuple[Any, ...]:
    return tuple(_point(_LISTS[key], child) for child in reader.children(key, default=[]))


def _point(kind: Any, reader: Reader) -> Any:
    """One measured point or model of class `kind`, read field by field."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == "source":
            values[field.name] = reader.text("source", default="")
        elif field.type == "str":
            values[field.name] = reader.text(field.name, choices=_CHOICES.get(field.name) or _operations(kind))
        elif field.type == "int":
            values[field.name] = reader.integer(field.name, minimum=2 if field.name == "ranks" else 1)
        else:
            values[field.name] = reader.number(field.name, above=0)
    reader.finish()
    return kind(**values)


def _operations(kind: Any) -> tuple[str, ...]:
    return {GemmPoint: GEMM_OPERATIONS, MemoryPoint: tuple(EAGER_PASSES), CollectivePoint: COLLECTIVES}[kind]


def load_hardware(path: Path) -> HardwareProfile:
    """The profile in `path`; an InputError names file and key path of whatever is wrong."""
    return HardwareProfile.from_dict(load_document(path, schema=SCHEMA, kind="hardware profile"))


def save_hardware(profile: HardwareProfile, path: Path) -> None:
    """Write the profile to `path`, whole or not at all."""
    write_atomically(path, dump_yaml(profile.to_dict()))
