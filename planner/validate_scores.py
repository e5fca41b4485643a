"""How far predictions are from what was measured: errors, bias, the null model, sweeps; values in, values out."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .predict_case import CasePrediction
from .run_case import RunCase

HELD_OUT_OF = 3  # one source in so many is held out
MANY_LAYOUTS = 5  # sweeps of so many rows are reported apart


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row: measured, predicted, or why it is not.

    `skipped` is "" where there is a prediction; `unfit` says why a row that has one is not scored. Memory in the
    row's own unit. `ideal_seconds` is the step at the device's peak, what the null model takes a fraction of;
    `mfu` the measured share of that peak without recomputation.
    `sweep` names the question that rows with other layouts answer too; `layout` tells them apart.
    """

    id: str
    source: str
    gpu: str = ""
    measured_seconds: float | None = None
    predicted_seconds: float | None = None
    measured_memory: float | None = None
    predicted_memory: float | None = None
    skipped: str = ""
    unfit: str = ""
    derived: bool = False
    layout_stated: bool = True
    ideal_seconds: float | None = None
    mfu: float | None = None
    sweep: str = ""
    layout: str = ""
    case: RunCase | None = None
    prediction: CasePrediction | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less 1."""
        return relative_error(self.predicted_seconds, self.measured_seconds)

    @property
    def memory_error(self) -> float | None:
        return relative_error(self.predicted_memory, self.measured_memory)

    @property
    def scored(self) -> bool:
        """Whether the row says something of the model: predicted, measured and fit."""
        return not self.skipped and not self.unfit and (self.error is not None or self.memory_error is not None)


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else predicted / measured - 1.0


def held_out(source: str) -> bool:
    """Whether a source belongs to the third that nobody looks at while the model is made: a hash of its name."""
    return int(hashlib.sha256(source.encode()).hexdigest(), 16) % HELD_OUT_OF == 0


# ---- errors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Errors over some rows, as fractions; None where no row has what they need. `n` counts rows with seconds.

    `bias` is the mean signed error, `null_mape` that of the null model on the same rows.
    """

    n: int
    mape: float | None
    median_ape: float | None
    bias: float | None
    null_mape: float | None
    memory_n: int
    memory_mape: float | None
    memory_bias: float | None


def score(outcomes: Iterable[Outcome], fractions: dict[str, float]) -> Scores:
    """The scores of those rows that are scored; `fractions` of peak per GPU make the null model."""
    rows = [o for o in outcomes if o.scored]
    errors = [o.error for o in rows if o.error is not None]
    memory = [o.memory_error for o in rows if o.memory_error is not None]
    null = [
        o.ideal_seconds / fractions[o.gpu] / o.measured_seconds - 1.0
        for o in rows
        if o.error is not None and o.measured_seconds and o.ideal_seconds is not None and o.gpu in fractions
    ]
    return Scores(
        n=len(errors),
        mape=_mean(map(abs, errors)),
        median_ape=statistics.median(map(abs, errors)) if errors else None,
        bias=_mean(errors),
        null_mape=_mean(map(abs, null)),
        memory_n=len(memory),
        memory_mape=_mean(map(abs, memory)),
        memory_bias=_mean(memory),
    )


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return math.fsum(known) / len(known) if known else None


def null_fractions(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """The fraction of peak per GPU that a constant would have to be for the least mean absolute percentage error.

    With x = ideal / measured seconds of a row, the row's error is |x / f - 1| = x · |1 / f - 1 / x|; so the best
    1 / f is the median of 1 / x weighted by x. The strongest null model there is: it has seen the answers.
    """
    shares: dict[str, list[float]] = defaultdict(list)
    for o in outcomes:
        if o.scored and o.ideal_seconds is not None and o.measured_seconds:
            shares[o.gpu].append(o.ideal_seconds / o.measured_seconds)
    return {gpu: _weighted_median_inverse(sorted(x, reverse=True)) for gpu, x in shares.items()}


def _weighted_median_inverse(falling: Sequence[float]) -> float:
    half, passed = math.fsum(falling) / 2, 0.0
    for x in falling:  # 1 / x rises
        passed += x
        if passed >= half:
            return x
    raise AssertionError("half of a sum of positive numbers is reached")


# ---- sweeps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Layouts of one question, ranked. `spearman` is None where all are alike; `regret` is how much slower than
    the best measured the layout is that the model ranks first; `spread` how much slower the slowest is."""

    name: str
    n: int
    spearman: float | None
    regret: float
    spread: float


def sweeps(outcomes: Iterable[Outcome]) -> tuple[Sweep, ...]:
    """Every sweep of two layouts and more, the longest first."""
    groups: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for o in outcomes:
        if o.scored and o.sweep and o.predicted_seconds is not None and o.measured_seconds is not None:
            groups[o.sweep].append((o.predicted_seconds, o.measured_seconds, o.layout))
    found = []
    for name, rows in groups.items():
        if len({layout for _, _, layout in rows}) < 2:
            continue
        predicted, measured = [row[0] for row in rows], [row[1] for row in rows]
        best = min(measured)
        # Of layouts that the model cannot tell apart the slowest counts: luck is not skill.
        chosen = max(m for p, m in zip(predicted, measured, strict=True) if p == min(predicted))
        found.append(
            Sweep(
                name=name,
                n=len(rows),
                spearman=spearman(predicted, measured),
                regret=chosen / best - 1.0,
                spread=max(measured) / best - 1.0,
            )
        )
    return tuple(sorted(found, key=lambda sweep: (-sweep.n, sweep.name)))


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None where either side has one rank only."""
    x, y = _ranks(a), _ranks(b)
    mean = (len(a) + 1) / 2
    across = math.fsum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    along = math.fsum((i - mean) ** 2 for i in x) * math.fsum((j - mean) ** 2 for j in y)
    return across / math.sqrt(along) if along else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: order.index(value) for value in set(order)}
    return [first[value] + (order.count(value) + 1) / 2 for value in values]
