"""Our own runs as rows of a validation: what each run folder's record predicted beside what it measured."""

from __future__ import annotations

from pathlib import Path

from profiles.input_error import InputError
from profiles.store import load_document

from .record import RECORD_FILE, SCHEMA, load_record
from .validate_scores import Outcome


def record_outcomes(folder: Path) -> tuple[Outcome, ...]:
    """A row for each finished run in `folder`, which is a run folder itself or holds some; memory in GB.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if (folder / RECORD_FILE).exists():
        runs = [folder]
    else:
        runs = sorted(path.parent for path in folder.glob(f"*/{RECORD_FILE}"))
    if not runs:
        raise InputError(
            f"no finished run in {folder}",
            where=str(folder),
            expected=f"a run folder with {RECORD_FILE}, or a folder of such",
            got="neither",
            hint="a run writes its record when it ends; published runs are a CSV file",
        )
    return tuple(_outcome(run) for run in runs)


def _outcome(folder: Path) -> Outcome:
    record = load_record(folder)  # checks the plan and what was measured
    reader = load_document(folder / RECORD_FILE, schema=SCHEMA, kind="run record")
    predicted, measured = reader.child("predicted"), reader.child("measured")
    job, plan = record.plan.job, record.plan
    return Outcome(
        id=folder.name,
        source=f"{record.host}, our own runs",
        gpu=plan.cluster.hardware,
        measured_seconds=record.step_seconds,
        predicted_seconds=predicted.number("step_seconds", above=0),
        measured_memory=measured.number("peak_memory_bytes", above=0) / 1e9,
        predicted_memory=predicted.number("peak_memory_bytes", above=0) / 1e9,
        sweep=f"{plan.model.name}, {plan.cluster.devices} devices, batch {job.global_batch}, seq {job.sequence}",
        layout=plan.layout.short(),
    )
