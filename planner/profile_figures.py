"""The figures that reports on hardware profiles show: errors held out, best rates, bus bandwidth, and their words."""

from __future__ import annotations

from collections.abc import Sequence

from profiles.alpha_beta import ONE_STEP, PASSES
from profiles.hardware import HardwareProfile
from profiles.points import FSDP_COLLECTIVES, SUM_OF_SCALARS, CollectivePoint


def flops_unit(hardware: HardwareProfile) -> tuple[str, float]:
    """The unit that the device's rates read well in, and what to divide by."""
    return ("TFLOP/s", 1e12) if max(hardware.peak_flops_per_second.values(), default=0) >= 1e12 else ("GFLOP/s", 1e9)


# ---- figures ---------------------------------------------------------------------------------------------


def gemm_errors(hardware: HardwareProfile, dtype: str) -> list[float]:
    """|predicted - measured| / measured of the shapes held out from the grid, in rising order."""
    errors = []
    modelled = any(model.dtype == dtype for model in hardware.gemm_models)
    measured = {p.operation for p in hardware.gemm if p.dtype == dtype}
    for p in hardware.gemm_checks:
        if p.dtype == dtype and (modelled or p.operation in measured):
            predicted = hardware.gemm_seconds(p.operation, p.dtype, p.m, p.n, p.k)
            errors.append(abs(predicted - p.seconds) / p.seconds)
    return sorted(errors)


def best_gemm(hardware: HardwareProfile, dtype: str) -> float | None:
    """FLOP/s of the fastest measured product, else those that the model puts within reach, None without either."""
    measured = [2.0 * p.m * p.n * p.k / p.seconds for p in hardware.gemm if p.dtype == dtype]
    modelled = [model.achievable_flops_per_second for model in hardware.gemm_models if model.dtype == dtype]
    return max(measured or modelled, default=None)


def best_attention(hardware: HardwareProfile, dtype: str, direction: str) -> float | None:
    """FLOP/s of the fastest measured attention, else of the model; FLOPs as in HardwareProfile, twice without mask."""
    per_pair = 2.0 if direction == "forward" else 5.0
    measured = [
        per_pair * (1 if p.causal else 2) * p.batch * p.heads * p.sequence**2 * p.head_dim / p.seconds
        for p in hardware.attention
        if (p.dtype, p.direction) == (dtype, direction)
    ]
    key = f"{direction}_flops_per_second"
    return max(measured or [getattr(m, key) for m in hardware.attention_models if m.dtype == dtype], default=None)


def by_size(hardware: HardwareProfile) -> list[CollectivePoint]:
    """What was measured of messages: all but the sum of a step's two numbers, which has one size and no bandwidth."""
    return [point for point in hardware.collectives if point.operation != SUM_OF_SCALARS]


def bus_bandwidth(point: CollectivePoint) -> float:
    """Bytes per second on the busiest link, as nccl-tests prints it: 2(n-1)/n of the bytes for an all-reduce."""
    operation, n = FSDP_COLLECTIVES.get(point.operation, point.operation), point.ranks
    share = 1.0 if operation in ("broadcast", *ONE_STEP) else PASSES[operation] * (n - 1) / n
    return share * point.bytes / point.seconds


def quantile(rising: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, linear between neighbours."""
    place = share * (len(rising) - 1)
    low = int(place)
    high = min(low + 1, len(rising) - 1)
    return rising[low] + (rising[high] - rising[low]) * (place - low)
