"""RunRecord: what a training run measured, part by part, read back from its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from profiles.input_error import InputError
from profiles.store import Reader, load_document, read_text

from .plan import Plan, dumps, load, save

SCHEMA = "meshwright.record/v1"
RECORD_FILE = "record.yaml"
PLAN_FILE = "plan.yaml"
KERNELS = ("gemm", "attention", "memory")
PARTS = ("compute", "tp", "cp", "ep", "pp_bubble", "dp_exposed", "optimizer", "other")


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class RunRecord:
    """Seconds of a step on rank `rank`, the busiest; `kernels` and communication with nothing hidden."""

    folder: Path
    plan: Plan
    host: str
    date: str
    rank: int
    step_seconds: float
    parts: dict[str, float]
    kernels: dict[str, float]

    @property
    def stages(self) -> tuple[int, ...]:
        """The pipeline stages of `rank`, one for each of its chunks; pp is the slowest axis."""
        layout = self.plan.layout
        return layout.stages_of(self.rank // (layout.world_size // layout.pp))


def load_record(folder: Path) -> RunRecord:
    """The record in a run folder; an InputError names the file and key path of whatever is wrong."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a run folder",
            where=str(folder),
            expected="the folder of a finished run",
            got="no folder",
            hint="name the folder that `train` said at its end, as runs/20261121-072001",
        )
    plan = load(folder / PLAN_FILE)
    reader = load_document(folder / RECORD_FILE, schema=SCHEMA, kind="run record")
    measured = reader.child("measured")
    parts, kernels = measured.child("parts"), measured.child("kernels", default={})
    return RunRecord(
        folder=folder,
        plan=plan,
        host=reader.text("host"),
        date=reader.text("date"),
        rank=_rank(measured, plan),
        step_seconds=measured.number("step_seconds", above=0),
        parts={part: parts.number(part, **({"default": 0.0} if part in ("cp", "ep") else {})) for part in PARTS},
        kernels={kind: kernels.number(kind, minimum=0) for kind in kernels if kind in KERNELS},
    )


def _rank(measured: Reader, plan: Plan) -> int:
    rank = measured.integer("rank")
    if rank >= plan.layout.world_size:
        raise measured.fail("rank", f"a rank below {plan.layout.world_size}, the plan's world", rank)
    return rank


def put_plan(run_dir: Path, plan: Plan, step: int) -> Path | None:
    """Make `plan` the plan of the run from after `step` on. Another one that was there stays, in the file returned.

    Its name says until where it was followed; of several plans of the same step only the first has been.
    """
    path, kept = run_dir / PLAN_FILE, run_dir / f"plan_until_step_{step}.yaml"
    if path.exists():
        if read_text(path, "plan") == dumps(plan):
            return None
        if not kept.exists():
            path.rename(kept)
    save(plan, path)
    return kept if kept.exists() else None
