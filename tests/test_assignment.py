"""Stages of a plan and the assignment that was priced are one: in the file, priced again, and read with mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.assignment import counts_of, stages_of
from planner.layout import RECOMPUTE_MODES, Layout
from planner.layout_costs import Blocks
from planner.plan import Plan, Stage, load, save
from planner.question import Question
from planner.reduced_plan import reduce_plan
from planner.search import search, solve_layout
from profiles.input_error import InputError
from profiles.store import Reader
from tests.oracles.small_world import price, small_question
from tests.plans import DEEPSEEK_EXPERTS, tiny_shared_experts

# Two wide dense layers, then three with experts, whose activations are more.
MODEL = tiny_shared_experts(layers=5, ffn_hidden_size=256, experts=replace(DEEPSEEK_EXPERTS, dense_layers=2))
ONE = Layout()


def tight() -> Question:
    """Memory for all but a little of what one rank would keep."""
    question = small_question(MODEL, devices=1, pins={"micro_batch": 1})
    least, most = (solve_layout(question, ONE, mode)[0].peak_memory_bytes for mode in ("full", "none"))
    return replace(question, job=replace(question.job, memory_limit_bytes=least + 0.95 * (most - least)))


@pytest.fixture(scope="module")
def planned() -> tuple[Question, Plan]:
    question = tight()
    return question, search(question)


def test_one_kind_of_layers_recomputes_and_the_file_says_which(planned: tuple[Question, Plan], tmp_path: Path) -> None:
    question, plan = planned
    (stage,) = plan.stages
    assert stage.to_dict()["recompute"] == {"none": 4, "selective": 0, "full": 1}
    assert stage.to_dict()["recompute_layers"] == {"full": [[2, 3]]}
    assert [stage.recompute_mode(block) for block in range(5)] == ["none", "none", "full", "none", "none"]
    save(plan, tmp_path / "plan.yaml")
    assert load(tmp_path / "plan.yaml") == plan
    assert "recompute_layers:\n    full:\n    - [2, 3]\n" in (tmp_path / "plan.yaml").read_text(encoding="utf-8")

    costs = price(plan.layout, question)
    counts = counts_of(plan.model, load(tmp_path / "plan.yaml").stages)
    assert costs.step(counts) == plan.certificate.objective_seconds
    assert costs.rank_memory(0, counts).total == plan.prediction.peak_memory_bytes <= question.limit_bytes
    # With the counts alone the first layer would recompute, which is another plan.
    other = counts_of(plan.model, [replace(stage, recompute_spans=())])
    assert other != counts
    assert costs.rank_memory(0, other).total != plan.prediction.peak_memory_bytes


def test_a_reduced_plan_recomputes_in_the_same_kind_of_layers(planned: tuple[Question, Plan]) -> None:
    small = reduce_plan(planned[1]).plan
    (stage,) = small.stages
    assert [stage.recompute_mode(block) for block in range(stage.end)] == ["none", "full"]
    assert [segment.kind for segment in small.model.segments] == ["dense", "experts"]


@given(st.data())
def test_counts_come_back_from_stages_of_several_kinds(data: st.DataObject) -> None:
    left = [segment.count for segment in MODEL.segments]
    counts = []
    for stage in range(2):
        held = []
        for k, number in enumerate(left):
            # The first stage may take of a segment once those before it are all taken.
            most = number if not any(left[:k]) else 0
            taken = number if stage else data.draw(st.integers(0, most))
            left[k] -= taken
            full = data.draw(st.integers(0, taken))
            selective = data.draw(st.integers(0, taken - full))
            held.append(Blocks(none=taken - full - selective, selective=selective, full=full))
        counts.append(tuple(held))
    stages = stages_of(Layout(pp=2), counts)
    assert counts_of(MODEL, stages) == tuple(counts)
    for stage in stages:
        assert Stage.from_dict(Reader(stage.to_dict(), source="p.yaml", path="stages[0]")) == stage
        modes = [stage.recompute_mode(block) for block in range(stage.first, stage.end)]
        assert {mode: modes.count(mode) for mode in RECOMPUTE_MODES} == stage.to_dict()["recompute"]


# ---- mistakes ------------------------------------------------------------------------------------------------


def read(spans: Any, none: int = 3, selective: int = 0, full: int = 2) -> Stage:
    document = {
        "rank": 0,
        "chunk": 0,
        "layers": [2, 7],
        "embedding": True,
        "head": True,
        "recompute": {"none": none, "selective": selective, "full": full},
        "recompute_layers": spans,
    }
    return Stage.from_dict(Reader(document, source="p.yaml", path="stages[1]"))


def test_spans_that_say_what_the_counts_say_are_not_kept() -> None:
    assert read({"full": [[2, 4]]}).recompute_spans == ()
    assert read({"full": [[3, 4], [2, 3]]}).recompute_spans == ()
    assert read({"full": [[5, 6], [3, 4]]}).recompute_spans == (("full", 3, 4), ("full", 5, 6))
    assert read({}, none=5, full=0).recompute_spans == ()


SPANS = "a list of spans [first, end) of the stage's blocks, 2 <= first < end <= 7"


@pytest.mark.parametrize(
    ("spans", "key", "expected", "got"),
    [
        ([], "", "a mapping of keys to values", "[]"),
        ({"none": [[2, 3]]}, ".none", "keys full, selective", "none"),
        ({"full": 3}, ".full", SPANS, "3"),
        ({"full": [[5, 9]]}, ".full", SPANS, "[5, 9]"),
        ({"full": [[0, 2]]}, ".full", SPANS, "[0, 2]"),
        ({"full": [[4, 4]]}, ".full", SPANS, "[4, 4]"),
        ({"full": [[2, True]]}, ".full", SPANS, "[2, True]"),
        ({"full": [[3, 5], [4, 5]]}, ".full", "spans of which each block is in one", "[4, 5]"),
        ({"full": [[3, 6]]}, ".full", "spans of 2 blocks, as the stage's counts have it", "3"),
        ({}, ".full", "spans of 2 blocks, as the stage's counts have it", "0"),
        (
            {"full": [[3, 5]], "selective": [[5, 6]]},
            ".selective",
            "spans of 0 blocks, as the stage's counts have it",
            "1",
        ),
    ],
)
def test_spans_that_cannot_be_are_refused(spans: Any, key: str, expected: str, got: str) -> None:
    with pytest.raises(InputError) as caught:
        read(spans)
    assert caught.value.where == f"p.yaml: stages[1].recompute_layers{key}"
    assert (caught.value.expected, caught.value.got) == (expected, got)


def test_a_span_of_a_hundred_million_million_layers_takes_no_time() -> None:
    document = read({"full": [[5, 7]]}).to_dict() | {"layers": [2, 10**14]}
    document["recompute"]["none"] = 10**14 - 4
    assert Stage.from_dict(Reader(document, source="p.yaml")).recompute_spans == (("full", 5, 7),)
