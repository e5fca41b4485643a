"""The verbs `estimate` and `explain`, and how a plan's answer is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli_data import DocumentLength, document_length
from cli_parts import (
    Cluster,
    Devices,
    GlobalBatch,
    Imbalance,
    Json,
    MemoryLimit,
    Model,
    Offload,
    Precision,
    Price,
    SequenceLength,
    Target,
    described,
    print_json,
    print_report,
)

if TYPE_CHECKING:
    from planner.planning import PlanAnswer
    from planner.question import Question


def print_answer(answer: PlanAnswer, as_json: bool) -> None:
    print_json(answer.document) if as_json else print_report(answer.report())


def question_of(
    model: str, cluster: str, global_batch: int, sequence: int, documents: str | None, **settings: Any
) -> Question:
    """The question of `plan` and `estimate`; `settings` are those of `ask`, under their names there."""
    from planner.question import ask

    length = document_length(documents, sequence)
    return ask(described(model, sequence), cluster, global_batch, sequence, document_length=length, **settings)


def estimate(
    model: Model,
    cluster: Cluster,
    global_batch: GlobalBatch,
    sequence: SequenceLength,
    layout: Annotated[str, typer.Option("--layout", help="As tp=8,pp=8,zero=1,recompute=full; dp follows.")],
    devices: Devices = None,
    precision: Precision = None,
    memory_limit: MemoryLimit = None,
    target: Target = "meshwright",
    price: Price = None,
    expert_imbalance: Imbalance = 1.0,
    offload: Offload = "none",
    documents: DocumentLength = None,
    as_json: Json = False,
) -> None:
    """Price your own layout: does it fit, and how fast is it?"""
    from planner.planning import estimate as price_layout

    question = question_of(
        model,
        cluster,
        global_batch,
        sequence,
        documents,
        devices=devices,
        precision=precision,
        memory_limit=memory_limit,
        target=target,
        expert_imbalance=expert_imbalance,
        offload=offload,
    )
    print_answer(price_layout(question, layout, price), as_json)


def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.YAML", help="A plan that `plan -o` has written.")],
    against: Annotated[str | None, typer.Option("--against", help="Settings to lay beside it, as tp=4,pp=8.")] = None,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds for all that is solved.")] = 120.0,
    as_json: Json = False,
) -> None:
    """Say why this plan: what binds, what comes next on each axis, what would help."""
    from planner.planning import explain_plan

    print_answer(explain_plan(plan_file, against, time_limit), as_json)
