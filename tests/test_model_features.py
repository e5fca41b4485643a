"""What a model has that not every target trains: named, refused, and kept out of plans."""

from __future__ import annotations

import sys

import pytest

import cli
from planner.capabilities import FEATURES, missing_features
from planner.errors import UnsupportedError
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.question import ask
from planner.rules import RuleContext, violations
from planner.search import check_supported, search
from planner.space import enumerate_layouts
from profiles.catalogue import resolve_model
from profiles.input_error import InputError
from profiles.store import Reader
from tests.test_model_catalogue import PARAMETERS

from .plans import make_plan, tiny_llama

UNTRAINED = {name for name in PARAMETERS if resolve_model(name).features}


def test_every_feature_has_its_row_in_the_table() -> None:
    others = {"linearly stretched positions", "dynamically stretched positions", "LongRoPE positions"}
    others |= {"next-sentence head", "a module of its own"}
    used = {feature for name in UNTRAINED for feature in resolve_model(name).features}
    assert used | others == set(FEATURES)  # of the catalogue's models no one uses these
    assert not used & others


def test_what_meshwright_trains_has_no_features() -> None:
    assert {
        *("mistral-7b", "qwen3-8b", "gpt-neox-20b", "mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b"),
        *("qwen3-235b-a22b", "deepseek-v2", "deepseek-v3", "gpt-oss-120b", "bert-large", "megatron-bert-3.9b"),
        *("opt-175b", "bloom-176b"),
    } == UNTRAINED
    assert {name for name in UNTRAINED if missing_features(resolve_model(name), "megatron")} == {
        *("gpt-neox-20b", "opt-175b", "bloom-176b"),
    }


REFUSALS = {
    "opt-175b": (
        "meshwright cannot train ReLU and offset positions yet",
        "nor does Megatron-LM train opt-175b: it lacks ReLU and offset positions",
    ),
    "bloom-176b": (
        "meshwright cannot train ALiBi positions and embedding norm yet",
        "nor does Megatron-LM train bloom-176b: it lacks ALiBi positions and embedding norm",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_search_refuses_what_meshwright_cannot_train(name: str) -> None:
    question = ask(name, "dgx-a100:2", 64, 512)
    for refuse in (search, check_supported):
        with pytest.raises(UnsupportedError) as caught:
            refuse(question)
        assert (caught.value.what, caught.value.lines) == (REFUSALS[name][0], (REFUSALS[name][1],))


@pytest.mark.parametrize("verb", ["plan", "estimate"])
@pytest.mark.parametrize("name", REFUSALS)
def test_the_command_line_refuses_it_with_exit_code_1(
    verb: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [verb, "--model", name, "--cluster", "dgx-a100:2", "--global-batch", "64", "--seq", "512"]
    monkeypatch.setattr(sys, "argv", ["cli.py", *arguments, *(["--layout", "tp=8"] if verb == "estimate" else [])])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.out) == (1, "")
    assert " ".join(captured.err.split()) == " ".join(REFUSALS[name])


def test_no_layout_of_such_a_model_is_legal_and_no_plan_file_of_one_is_read() -> None:
    job = TrainingJob(global_batch=4, sequence=16)
    reason = "tiny-llama: the meshwright runtime does not train partial rotary positions today; megatron can"
    spec = tiny_llama(rotary_fraction=0.5)
    assert violations(Layout(dp=2), RuleContext(spec, job, 2)) == (reason,)
    assert list(enumerate_layouts(RuleContext(spec, job, 2))) == []
    document = make_plan(tiny_llama(), Layout(dp=2), job).to_dict()
    del document["schema"]
    assert Plan.from_dict(Reader(document, source="plan.yaml")).model == tiny_llama()
    document["model"]["rotary_fraction"] = 0.5
    with pytest.raises(InputError) as caught:
        Plan.from_dict(Reader(document, source="plan.yaml"))
    assert (caught.value.where, reason in caught.value.got) == ("plan.yaml: layout", True)
