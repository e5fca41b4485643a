"""The α-β model of collectives with a bandwidth ramp: the formula, and its fit to measured points.

[Note: Alpha-beta with a ramp]
A ring over n ranks passes the tensor once (all-gather, reduce-scatter, all-to-all, broadcast) or twice (all-reduce),
each pass in n-1 steps of 1/n of the bytes s (Thakur, Rabenseifner, Gropp 2005; the bus bandwidth of nccl-tests):

    seconds = fixed + passes·(n-1)·step + passes·(n-1)/n · s/B · √(1 + r/s)

`fixed` (launch, rendezvous) comes once, `step` is the latency of one message, B the bus bandwidth. The root is the
ramp: far above r bytes the full B, far below it bandwidth that falls with √s. The ramp rises with the
bytes more slowly than B does, which a latency cannot express.

The same formula, fitted to the groups that were measured, prices the groups that were not: other sizes, other
strides, more nodes. That is the rule for going beyond what was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1}
PASSES |= {"send_recv": 1, "exchange": 1}
# One step of all its bytes: a message, and a message from each rank of a ring to the next, all at once.
ONE_STEP = ("send_recv", "exchange")


@dataclass(frozen=True, kw_only=True)
class AlphaBeta:
    """The figures of the formula, in seconds, bytes per second and bytes."""

    fixed_seconds: float
    step_seconds: float
    bandwidth_bytes_per_second: float
    ramp_bytes: float = 0.0

    def seconds(self, operation: str, ranks: int, size_bytes: float) -> float:
        """Seconds of the collective over `ranks` ranks; a send or an exchange is one step of all its bytes."""
        steps, moved = _work(operation, ranks, size_bytes)
        ramp = math.sqrt(1.0 + self.ramp_bytes / size_bytes)
        return self.fixed_seconds + steps * self.step_seconds + moved * ramp / self.bandwidth_bytes_per_second


@dataclass(frozen=True)
class Sample:
    """A measured collective. `sharing` is how many times the tier's bandwidth per device the group has."""

    operation: str
    ranks: int
    size_bytes: float
    seconds: float
    sharing: float = 1.0


@dataclass(frozen=True)
class Fit:
    """Figures with their relative residuals, (fitted - measured) / measured, in the order of the samples."""

    figures: AlphaBeta
    residuals: tuple[float, ...]

    @property
    def summary(self) -> str:
        """How many points, and how far off the fit is, in words."""
        sizes = sorted(abs(residual) for residual in self.residuals)
        return (
            f"fit of {len(sizes)} points, residual {statistics.median(sizes):.0%} in the median, {sizes[-1]:.0%} worst"
        )


def _work(operation: str, ranks: int, size_bytes: float) -> tuple[float, float]:
    """(steps, bytes on the wire per rank)."""
    if operation in ONE_STEP:
        return 1.0, size_bytes
    steps = PASSES[operation] * (ranks - 1)
    return float(steps), steps / ranks * size_bytes


def fit(samples: Sequence[Sample]) -> Fit | None:
    """The figures with the least squared relative residuals; None without two sizes to tell α from β.

    For each of a ladder of ramps the formula is linear in fixed, step and 1/B, none of which may be negative:
    of the few subsets of them each is solved exactly and the best kept.
    """
    if len({sample.size_bytes for sample in samples}) < 2:
        return None
    largest = max(sample.size_bytes for sample in samples)
    ladder = [0.0] + [largest * 4.0**-power for power in range(8)]
    one_size = len({sample.ranks for sample in samples}) == 1  # then fixed and steps cannot be told apart
    columns = (1, 2) if one_size else (0, 1, 2)
    best: tuple[float, AlphaBeta] | None = None
    for ramp in ladder:
        rows = []
        for s in samples:
            steps, moved = _work(s.operation, s.ranks, s.size_bytes)
            wire = moved * math.sqrt(1.0 + ramp / s.size_bytes) / s.sharing
            rows.append((1.0 / s.seconds, steps / s.seconds, wire / s.seconds))
        for count in range(1, len(columns) + 1):
            for chosen in combinations(columns, count):
                if 2 not in chosen:
                    continue  # a link without bandwidth prices large messages at nothing
                solved = _least_squares([[row[c] for c in chosen] for row in rows])
                if solved is None or min(solved) < 0 or solved[chosen.index(2)] <= 0:
                    continue
                values = dict(zip(chosen, solved, strict=True))
                error = sum((sum(row[c] * v for c, v in values.items()) - 1.0) ** 2 for row in rows)
                if best is None or error < best[0] * (1 - 1e-6) - 1e-18:
                    figures = AlphaBeta(
                        fixed_seconds=values.get(0, 0.0),
                        step_seconds=values.get(1, 0.0),
                        bandwidth_bytes_per_second=1.0 / values[2],
                        ramp_bytes=ramp,
                    )
                    best = (error, figures)
    if best is None:
        return None
    figures = best[1]
    residuals = []
    for s in samples:
        alone = figures.seconds(s.operation, s.ranks, s.size_bytes)
        wire = alone - figures.fixed_seconds - _work(s.operation, s.ranks, s.size_bytes)[0] * figures.step_seconds
        residuals.append((alone - wire + wire / s.sharing) / s.seconds - 1.0)
    return Fit(figures, tuple(residuals))


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """x that minimises Σ (row·x - 1)², by the normal equations; None where they are singular."""
    width = len(rows[0])
    matrix = [[sum(row[i] * row[j] for row in rows) for j in range(width)] for i in range(width)]
    right = [sum(row[i] for row in rows) for i in range(width)]
    scale = [math.sqrt(matrix[i][i]) or 1.0 for i in range(width)]
    system = [[matrix[i][j] / scale[i] / scale[j] for j in range(width)] + [right[i] / scale[i]] for i in range(width)]
    for i in range(width):
        pivot = max(range(i, width), key=lambda r: abs(system[r][i]))
        if abs(system[pivot][i]) < 1e-12:
            return None
        system[i], system[pivot] = system[pivot], system[i]
        for other in range(width):
            if other != i:
                factor = system[other][i] / system[i][i]
                system[other] = [a - factor * b for a, b in zip(system[other], system[i], strict=True)]
    return [system[i][width] / system[i][i] / scale[i] for i in range(width)]
