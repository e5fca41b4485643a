"""What stages do with gathered weights under zero 3: chosen as brute force would, in the file, priced, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.assignment import counts_of
from planner.errors import InfeasibleError
from planner.explain import compare
from planner.layout import Layout
from planner.plan import Plan, load, save
from planner.planning import estimate
from planner.question import Question
from planner.reduced_plan import reduce_plan
from planner.search import search
from planner.step_cost import CostModel
from profiles.input_error import InputError
from profiles.store import Reader
from tests.oracles.brute_force import candidates, fastest
from tests.oracles.small_world import counts, small_question
from tests.plans import make_plan, tiny_llama

LAYOUT = Layout(pp=2, dp=2, dp_shard=2, zero=3, micro_batch=1)
PINNED = small_question(tiny_llama(ffn_hidden_size=256), pins={"pp": 2, "dp": 2, "zero": 3, "schedule": "1f1b"})


def limited(question: Question, limit_bytes: float) -> Question:
    return replace(question, job=replace(question.job, memory_limit_bytes=limit_bytes))


def test_stages_choose_as_trying_everything_does(tmp_path: Path) -> None:
    tried = [candidate for of_layout in candidates(PINNED).values() for candidate in of_layout]
    least, most = min(c.peak_bytes for c in tried), max(c.peak_bytes for c in tried)
    found = set()
    for share in (0.0, 0.1, 0.2, 0.3, 0.45, 1.0):
        question = limited(PINNED, least + share * (most - least))
        best, plan = fastest(tried, question.limit_bytes), search(question)
        assert best is not None
        assert plan.certificate.objective_seconds == pytest.approx(best.step_seconds, rel=1e-6)
        assert plan.certificate.gap == 0.0
        found.add(tuple(stage.reshard for stage in plan.stages))
        save(plan, tmp_path / "plan.yaml")
        again = load(tmp_path / "plan.yaml")
        assert again == plan
        prices = CostModel(question.model, question.cluster, question.hardware, question.job)
        costs = prices.price(again.layout, [stage.reshard for stage in again.stages])
        assert costs.step(counts_of(again.model, again.stages)) == plan.prediction.step_seconds
        held = [memory.total for memory in costs.memory(counts_of(again.model, again.stages))]
        assert max(held) == plan.prediction.peak_memory_bytes <= question.limit_bytes * (1 + 1e-9)
    # Not all as one: a stage keeps its weights where the other must free its own, from the last backward on or always.
    assert any(False in choices and set(choices) != {False} for choices in found), found
    assert (False, False) not in found  # that is zero 1


@pytest.mark.parametrize("pin", [True, False, (True, False)])
def test_a_pinned_choice_is_planned_as_trying_everything_does(pin: Any) -> None:
    pins = {"pp": 2, "dp": 2, "schedule": ("1f1b", "zb1p"), "reshard": pin}  # zero and schedule follow
    question = replace(PINNED, job=replace(PINNED.job, pins=pins))
    tried = [candidate for of_layout in candidates(question).values() for candidate in of_layout]
    assert {candidate.layout.zero for candidate in tried} == {3}
    least, most = min(c.peak_bytes for c in tried), max(c.peak_bytes for c in tried)
    for share in (0.0, 0.2, 1.0):
        limit = least + share * (most - least)
        best, plan = fastest(tried, limit), search(limited(question, limit))
        assert best is not None
        assert plan.certificate.objective_seconds == pytest.approx(best.step_seconds, rel=1e-6)
        assert plan.certificate.gap == 0.0
        allowed = pin if isinstance(pin, tuple) else (pin,)
        assert {stage.reshard for stage in plan.stages} <= set(allowed)


def test_a_pinned_choice_costs_what_it_holds() -> None:
    def step(**pins: Any) -> float:
        question = replace(PINNED, job=replace(PINNED.job, pins=PINNED.job.pins | pins))
        return search(question).prediction.step_seconds

    assert step(reshard=False) == step(zero=1) < step() < step(reshard=True)


@pytest.mark.parametrize(
    ("pins", "reason"),
    [
        (
            {"zero": 1},
            "pp2 dp2 zero1 mb1 1f1b: reshard=true: zero=1 keeps gathered weights, so only stages of zero=3 have",
        ),
        (
            {"pp": 1, "dp": 4},
            "dp4 zero3 mb1: reshard=true: pp=1 has one stage, which zero=3 reshards and zero=2 does not",
        ),
    ],
)
def test_a_pin_where_no_stage_has_the_choice(pins: dict[str, Any], reason: str) -> None:
    question = replace(PINNED, job=replace(PINNED.job, pins=PINNED.job.pins | {"reshard": True} | pins))
    assert not candidates(question)
    with pytest.raises(InfeasibleError) as caught:
        search(question)
    assert any(line.startswith(reason) for line in caught.value.lines), caught.value.lines


def test_estimate_holds_the_choice_of_its_layout() -> None:
    for value in (True, False):
        text = f"pp=2,zero=3,schedule=1f1b,reshard={str(value).lower()}"
        stages = estimate(limited(PINNED, 1e9), text).document["stages"]
        assert [stage["reshard"] for stage in stages] == [value, value]
    with pytest.raises(InputError) as caught:
        estimate(PINNED, "pp=2,zero=1,reshard=true")
    assert caught.value.got == "reshard=true: zero=1 keeps gathered weights, so only stages of zero=3 have a choice"


def test_what_each_choice_costs_and_saves() -> None:
    prices = CostModel(tiny_llama(layers=8, ffn_hidden_size=256), PINNED.cluster, PINNED.hardware, PINNED.job)
    held = counts((4, 0), (4, 0))  # of fewer each holds two gathered at once anyway
    kept, after, freed = (prices.price(LAYOUT, (choice, choice)) for choice in (False, None, True))
    assert kept.step(held) < after.step(held) < freed.step(held)
    # A layer's weights are more than the activations of a microbatch: once freed less is there, freed always least.
    peaks = [[memory.total for memory in costs.memory(held)] for costs in (kept, after, freed)]
    for most, middle, least in zip(*peaks, strict=True):
        assert most > middle > least
    zero1 = prices.price(replace(LAYOUT, zero=1))
    assert kept.step(held) == zero1.step(held)
    assert [m.total for m in kept.memory(held)] == [m.total for m in zero1.memory(held)]
    # Without a choice of its own a layout is priced as its stages free always, which fits where anything does.
    assert prices.price(LAYOUT) == freed


def test_a_comparison_prices_the_stages_as_they_are() -> None:
    question = limited(PINNED, 1e9)
    plan = search(question)
    slower = replace(plan, stages=tuple(replace(stage, reshard=True) for stage in plan.stages))
    (now, _), (then, _) = (compare(question, each, "zero=3") for each in (plan, slower))
    assert then.step_seconds > now.step_seconds
    assert then.peak_memory_bytes < now.peak_memory_bytes


def test_a_reduced_plan_keeps_the_choices() -> None:
    plan = make_plan(PINNED.model, LAYOUT, PINNED.job)
    chosen = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], reshard=True)))
    assert [stage.reshard for stage in reduce_plan(chosen).plan.stages] == [None, True]


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"zero": 1}, "zero=1 keeps gathered weights, so only stages of zero=3 have a choice"),
        ({"pp": 1, "dp": 4, "dp_shard": 4}, "pp=1 has one stage, which zero=3 reshards and zero=2 does not"),
        (
            {"schedule": "interleaved-1f1b", "virtual_stages": 2},
            "under interleaved-1f1b torch's pipeline gathers all weights of a chunk before its turn; gpipe and 1f1b "
            "leave that to each layer",
        ),
    ],
)
def test_where_stages_have_no_choice(layout: dict[str, Any], reason: str) -> None:
    document = make_plan(PINNED.model, replace(LAYOUT, **layout), PINNED.job).to_dict()
    del document["schema"]
    for value in (True, False):
        document["stages"][-1]["reshard"] = value
        with pytest.raises(InputError) as caught:
            Plan.from_dict(Reader(document, source="p.yaml"))
        place = f"p.yaml: stages[{len(document['stages']) - 1}].reshard"
        assert (caught.value.where, caught.value.expected) == (place, f"no such key: {reason}")
        assert caught.value.got == str(value)


def test_a_choice_that_is_none() -> None:
    document = make_plan(PINNED.model, LAYOUT, PINNED.job).to_dict()
    del document["schema"]
    document["stages"][0]["reshard"] = "sometimes"
    with pytest.raises(InputError) as caught:
        Plan.from_dict(Reader(document, source="p.yaml"))
    assert caught.value.where == "p.yaml: stages[0].reshard"
    assert (caught.value.expected, caught.value.got) == ("true or false", "'sometimes'")
