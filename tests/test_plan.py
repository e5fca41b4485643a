"""The plan file: load(save(plan)) == plan, and every tampering names the key it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InfeasibleError
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import SCHEMA, Plan, Stage, dumps, load, save
from planner.search import search
from profiles.store import Reader
from tests.oracles.small_world import small_question
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.property.worlds import questions
from tests.thinned import examples


def job(**changes: Any) -> TrainingJob:
    fields: dict[str, Any] = {"global_batch": 8, "sequence": 16}
    return TrainingJob(**(fields | changes))


def read(document: dict[str, Any]) -> Plan:
    body = {key: value for key, value in document.items() if key != "schema"}
    return Plan.from_dict(Reader(body, source="p.yaml"))


# ---- load(save(plan)) == plan ----------------------------------------------------------------------------


@examples(40, 1)
@given(questions(), st.integers(1, 3))
def test_a_plan_from_the_search_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, question: Any, top: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.yaml"
    try:
        plan = search(question, top=top)
    except InfeasibleError:
        return
    save(plan, path)
    assert load(path) == plan
    assert path.read_text(encoding="utf-8") == dumps(plan) == dumps(load(path))


@pytest.mark.parametrize(
    "plan",
    [
        make_plan(tiny_llama(), Layout(), job()),
        make_plan(tiny_llama(name="yes: 1e3"), Layout(pp=2, dp=2, zero=1, dp_shard=2), job(), [3], [1, 0]),
        make_plan(tiny_gpt2(), Layout(tp=4, sequence_parallel=True), job(memory_limit_bytes=1.5e9)),
        make_plan(
            tiny_llama(), Layout(pp=6), job(pins={"pp": 6, "recompute": "full"}, bans=("zero",)), [0, 1, 2, 3, 4]
        ),
    ],
    ids=lambda plan: plan.layout.short(),
)
def test_a_plan_survives_its_file(tmp_path: Path, plan: Plan) -> None:
    save(plan, tmp_path / "plan.yaml")
    assert load(tmp_path / "plan.yaml") == plan


def test_the_file_has_the_keys_the_design_names() -> None:
    document = yaml.safe_load(dumps(search(small_question(devices=4, pins={"pp": 2}))))
    assert list(document) == [
        "schema",
        "model",
        "cluster",
        "job",
        "layout",
        "stages",
        "prediction",
        "certificate",
        "alternatives",
    ]
    assert document["schema"] == SCHEMA == "meshwright.plan/v1"
    keys = {
        "layout": list(document["layout"]),
        "stage": list(document["stages"][0]),
        "recompute": list(document["stages"][0]["recompute"]),
        "prediction": list(document["prediction"]),
        "breakdown": list(document["prediction"]["breakdown_seconds"]),
        "certificate": list(document["certificate"]),
    }
    assert {name: " ".join(found) for name, found in keys.items()} == {
        "layout": ("tp cp cp_style pp dp dp_shard ep etp sequence_parallel zero micro_batch schedule virtual_stages"),
        "stage": "rank chunk layers embedding head recompute",
        "recompute": "none selective full",
        "prediction": (
            "step_seconds tokens_per_second_per_device model_tflops_per_device mfu peak_memory_bytes "
            "breakdown_seconds memory_bytes"
        ),
        "breakdown": "compute recompute tp cp ep pp bubble dp_exposed optimizer",
        "certificate": (
            "objective_seconds bound_seconds gap layouts_legal layouts_pruned_memory layouts_pruned_bound "
            "ilps_solved solver solve_seconds"
        ),
    }


def test_a_person_may_move_a_block_and_its_recomputation() -> None:
    document = make_plan(tiny_llama(), Layout(pp=2), job()).to_dict()
    document["stages"][0] |= {"layers": [0, 3], "recompute": {"none": 1, "selective": 0, "full": 2}}
    document["stages"][1] |= {"layers": [3, 4], "recompute": {"none": 1, "selective": 0, "full": 0}}
    plan = read(document)
    assert [(stage.first, stage.end) for stage in plan.stages] == [(0, 3), (3, 4)]
    assert [plan.stages[0].recompute_mode(block) for block in range(3)] == ["full", "full", "none"]


def test_modes_of_a_stage_come_full_first() -> None:
    stage = Stage(
        rank=1,
        chunk=0,
        first=4,
        end=9,
        embedding=False,
        head=True,
        recompute_none=1,
        recompute_selective=2,
        recompute_full=2,
    )
    assert [stage.recompute_mode(block) for block in range(4, 9)] == ["full", "full", "selective", "selective", "none"]
