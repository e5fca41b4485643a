"""Predictions beside measurements: every row of a CSV of published runs, or every record of our own runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.hardware import HardwareProfile
from profiles.published_runs import PublishedRun, load_published_runs

from .free_constants import free_constants
from .predict_case import predict
from .run_case import RunCase, RunFacts, SkippedRunError, case_of, load_run_facts
from .validate_records import record_outcomes
from .validate_scores import Outcome, Scores, Sweep, null_fractions, score, sweeps


@dataclass(frozen=True)
class Validation:
    """All rows of what was read, and what the scores need besides. Scores and sweeps follow from them.

    `constants` are the free constants that the predictions use; `fractions` the null model's, per GPU. `published`
    is false where the rows are our own runs, which have neither, and no source held out.
    """

    outcomes: tuple[Outcome, ...]
    constants: tuple[str, ...]
    fractions: dict[str, float]
    warnings: tuple[str, ...]
    published: bool = True

    @property
    def total(self) -> Scores:
        return self.score(self.outcomes)

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        return sweeps(self.outcomes)

    def score(self, outcomes: Sequence[Outcome]) -> Scores:
        return score(outcomes, self.fractions)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints: percent, seconds and GB."""
        total = self.total
        return {
            "rows": [
                {
                    "id": o.id,
                    "measured_iter_s": o.measured_seconds,
                    "predicted_iter_s": o.predicted_seconds,
                    "error_pct": _percent(o.error),
                    "measured_peak_mem_GB": o.measured_memory,
                    "predicted_peak_mem_GB": o.predicted_memory,
                    "skipped": o.skipped or None,
                }
                for o in self.outcomes
            ],
            "summary": {
                "n": total.n,
                "skipped": sum(bool(o.skipped) for o in self.outcomes),
                "time_mape": _percent(total.mape),
                "time_median_ape": _percent(total.median_ape),
                "memory_mape": _percent(total.memory_mape),
                "null_mape": _percent(total.null_mape),
            },
            "sweeps": [
                {"name": s.name, "n": s.n, "spearman": s.spearman, "regret_pct": _percent(s.regret)}
                for s in self.sweeps
            ],
        }


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100.0 * fraction


def validate(path: Path) -> Validation:
    """Read and predict what is at `path`: a CSV of published runs, or a folder that is or holds run folders.

    Raises:
        InputError: with file, line and column, or file and key path, of whatever cannot be read.
    """
    if path.is_dir():
        return Validation(record_outcomes(path), (), {}, (), published=False)
    runs = load_published_runs(path)
    facts = load_run_facts()
    outcomes = tuple(outcome_of(run, facts) for run in runs)
    cases = [o.case for o in outcomes if o.case is not None and o.prediction is not None]
    return Validation(
        outcomes=outcomes,
        constants=free_constants(cases, facts.catalogue.hardware),
        fractions=null_fractions(outcomes),
        warnings=tuple(dict.fromkeys(warning for case in cases for warning in case.warnings)),
    )


def outcome_of(run: PublishedRun, facts: RunFacts) -> Outcome:
    """A row, predicted or with the reason why not."""
    known: dict[str, Any] = {
        "id": run.id,
        "source": run.source,
        "gpu": run.gpu,
        "measured_seconds": run.measured_seconds,
        "measured_memory": run.measured_peak_mem_GB,
        "unfit": run.unfit,
        "derived": run.derived,
    }
    case = None
    try:
        case = case_of(run, facts)
        hardware = facts.catalogue.hardware[case.hardware]
        prediction = predict(case, hardware)
    except SkippedRunError as error:
        return Outcome(**known, case=case, skipped=str(error))
    return Outcome(
        **known,
        case=case,
        prediction=prediction,
        predicted_seconds=prediction.step_seconds,
        predicted_memory=prediction.allocated_bytes / max(run.memory_unit_bytes, case.software.memory_unit_bytes),
        layout_stated=case.layout_stated,
        ideal_seconds=_ideal_seconds(case, prediction.recompute, hardware),
        mfu=_ideal_seconds(case, "none", hardware) / run.measured_seconds if run.measured_seconds else None,
        sweep=_sweep_name(run),
        layout=f"{case.layout.short()} vpp{case.layout.virtual_stages} {prediction.recompute}",
    )


def _sweep_name(run: PublishedRun) -> str:
    """The question that a row answers: rows of one source with the same model, GPUs, batch and sequence."""
    parts = (run.model_name, f"{run.num_gpus} GPUs", f"batch {run.global_batch}", f"seq {run.seq}", run.precision)
    return f"{run.source}: {', '.join(part for part in parts if part)}"


def _ideal_seconds(case: RunCase, recompute: str, hardware: HardwareProfile) -> float:
    """The step at the peak of the precision, with the recomputation that the row does.

    Full recomputation runs the layers' forward, a third of their FLOPs, once more, selective that of the attention.
    """
    model, job = case.model, case.job
    flops = model.step_flops(job.global_batch, job.sequence)
    head = 6.0 * job.tokens * model.vocab_size * model.hidden_size
    attention = 6.0 * job.tokens * job.sequence * model.layers * (model.query_width + model.attention_output_width)
    again = {"none": 0.0, "selective": attention / 3, "full": (flops - head) / 3}[recompute]
    return (flops + again) / hardware.peak_flops_per_second[job.precision] / case.layout.world_size
