"""What `plan`, `estimate` and `explain` are asked for, and their answers: for a person, and as one JSON document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.catalogue import resolve_model
from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.store import require_writable
from profiles.traced_model import TracedModel, names_a_factory

from .answer import answer
from .assignment import stages_of
from .parse import parse_layout
from .plan import Plan, load, save
from .question import Question, ask, question_of
from .rules import require_legal
from .search import check_supported, predict, search, solve_layout

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class PlanAnswer:
    """`report` is what a person reads, made only when it is asked for; `plan` what `train` would obey."""

    document: dict[str, Any]
    report: Callable[[], RenderableType]
    plan: Plan | None = None


def make(
    question: Question,
    *,
    top: int = 1,
    time_limit_seconds: float = 60.0,
    price: float | None = None,
    allow_idle: bool = False,
    pareto: str | None = None,
    output: Path | None = None,
) -> PlanAnswer:
    """The fastest plan, written to `output` if there is one; or with `pareto` a front of plans."""
    if pareto is not None:
        return _front(question, pareto, time_limit_seconds, output, allow_idle)
    if output is not None:
        require_writable(output)
    if allow_idle:
        from .pareto import plan_with_idle

        plan = plan_with_idle(question, top, time_limit_seconds)
    else:
        plan = search(question, top, time_limit_seconds)
    if output is not None:
        save(plan, output)

    def report() -> RenderableType:
        from .plan_report import plan_report

        asked = Question(plan.model, plan.cluster, question.hardware, plan.job)
        found = answer(asked, plan.layout, plan.stages, plan.prediction, price)
        return plan_report(plan, found, idle=question.cluster.devices - plan.cluster.devices)

    return PlanAnswer(plan.to_dict(), report, plan)


def _front(
    question: Question, kind: str, time_limit_seconds: float, output: Path | None, allow_idle: bool
) -> PlanAnswer:
    from .pareto import KINDS, front

    if kind not in KINDS:
        raise InputError(f"{kind!r} is not known", where="--pareto", expected=" or ".join(KINDS), got=kind)
    for flag, given in (("-o", output is not None), ("--allow-idle", allow_idle)):
        if given:
            raise InputError(
                f"--pareto and {flag} do not go together",
                where="--pareto",
                expected="one of the two",
                got=f"--pareto and {flag}",
            )
    found = front(question, kind, time_limit_seconds)

    def report() -> RenderableType:
        from .pareto_report import front_report

        return front_report(found)

    return PlanAnswer(found.to_dict(), report)


def estimate(question: Question, text: str, price: float | None = None) -> PlanAnswer:
    """The layout that a person wrote, priced whether it fits or not.

    Raises:
        InputError: the layout is not legal; every rule that forbids it is named.
    """
    check_supported(question)
    layout, recompute, reshard = parse_layout(text, question.cluster.devices)
    require_legal(layout, recompute, question.rules, reshard=reshard)
    if reshard is not None:
        pins = {**question.job.pins, "reshard": reshard}
        question = replace(question, job=replace(question.job, pins=pins))
    solved, fits = solve_layout(question, layout, recompute)
    prediction, stages = predict(question, solved), stages_of(layout, solved.counts, solved.costs.reshard)
    document = {
        "layout": layout.to_dict(),
        "fits": fits,
        "prediction": prediction.to_dict(),
        "stages": [stage.to_dict() for stage in stages],
    }

    def report() -> RenderableType:
        from .plan_report import estimate_report

        return estimate_report(answer(question, layout, stages, prediction, price), fits)

    return PlanAnswer(document, report)


def explain_plan(path: Path, against: str | None, time_limit_seconds: float) -> PlanAnswer:
    """Why the plan in the file is as it is, or, `against` some settings, what they would give."""
    from . import explain, explain_report

    plan = load(path)
    question = question_of(plan)
    check_supported(question)
    if against is None:
        found = explain.explain(question, plan, time_limit_seconds)
        return PlanAnswer(found.to_dict(), lambda: explain_report.explain_report(found), plan)
    prediction, rival = explain.compare(question, plan, against, time_limit_seconds)
    document = {"layout": plan.layout.to_dict(), "prediction": prediction.to_dict(), "against": rival.to_dict()}
    return PlanAnswer(document, lambda: explain_report.against_report(plan, prediction, rival), plan)


def plan_to_train(
    plan_file: Path | None,
    model: str | ModelSpec | None,
    run_dir: Path | None,
    resume: bool,
    global_batch: int,
    sequence: int,
    command: str,
    document_length: float | None = None,
) -> PlanAnswer | Plan:
    """The plan in the file or of the run that is resumed; else a new one for this machine, measured briefly first.

    Raises:
        InputError: nothing to resume, or the plan is for another model.
    """
    if plan_file is None and resume:
        if run_dir is None:
            raise InputError(
                "nothing to resume", where="--resume", expected="--run-dir FOLDER of the run", got="no --run-dir"
            )
        plan_file = run_dir / "plan.yaml"
    if plan_file is None:
        from profiles.probes.session import measure

        measure(None, "quick", None, command)
        return make(ask(model or "demo", "local", global_batch, sequence, document_length=document_length))
    return plan_of_file(plan_file, model)


def plan_of_file(plan_file: Path, model: str | ModelSpec | None) -> Plan:
    """The plan in the file; an InputError where it is for another model than `model`, if that is given."""
    found = load(plan_file)
    if model is not None and not _is_model(found.model, model):
        raise InputError(
            "the plan is for another model",
            where=f"{plan_file}: model",
            expected=f"{model}, as --model says",
            got=found.model.name,
            hint="plan again with this --model, or leave --model out",
        )
    return found


def _is_model(planned: ModelSpec, wanted: str | ModelSpec) -> bool:
    """Whether it is the model of a name; a traced one is known by its factory alone."""
    if isinstance(wanted, str) and names_a_factory(wanted):
        return isinstance(planned, TracedModel) and planned.factory == wanted
    return (resolve_model(wanted) if isinstance(wanted, str) else wanted) == planned
