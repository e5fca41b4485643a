"""Plan files that somebody has changed: what cannot be is refused by its key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.layout import Layout
from planner.plan import dumps, load
from profiles.input_error import InputError
from tests.plans import make_plan, tiny_llama
from tests.test_plan import job, read

Change = Callable[[dict[str, Any]], None]


def at(*path: Any, value: Any) -> Change:
    """Set the value at the path of keys and indices."""

    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value

    return change


def stages(*layers: tuple[int, int]) -> Change:
    """Give the stages these layers, none recomputed."""

    def change(document: dict[str, Any]) -> None:
        for stage, (first, end) in zip(document["stages"], layers, strict=True):
            stage |= {"layers": [first, end], "recompute": {"none": end - first, "selective": 0, "full": 0}}

    return change


# A plan of 4 blocks over 3 stages: [0, 1), [1, 2), [2, 4).
TAMPERED: dict[str, tuple[Change, str, str, str]] = {
    "layers lost at the end": (
        stages((0, 1), (1, 2), (2, 3)),
        "stages[2].layers",
        "stages that end at the model's 4 layers",
        "'3: layers are lost'",
    ),
    "a layer invented": (
        stages((0, 1), (1, 2), (2, 5)),
        "stages[2].layers",
        "stages that end at the model's 4 layers",
        "'5: layers are doubled or invented'",
    ),
    "a gap": (
        stages((0, 1), (2, 3), (3, 4)),
        "stages[1].layers",
        "a stage that starts at layer 1, where the one before it ends",
        "'2: layers 1 to 1 are lost'",
    ),
    "a gap at the start": (
        stages((1, 2), (2, 3), (3, 4)),
        "stages[0].layers",
        "a stage that starts at layer 0, where the one before it ends",
        "'1: layers 0 to 0 are lost'",
    ),
    "layers doubled": (
        stages((0, 3), (1, 2), (2, 4)),
        "stages[1].layers",
        "a stage that starts at layer 3, where the one before it ends",
        "'1: layers 1 to 2 are doubled'",
    ),
    "a stage between the ends without a layer": (
        stages((0, 2), (2, 2), (2, 4)),
        "stages[1].layers",
        "at least one layer on a stage between first and last",
        "0",
    ),
    "a range backwards": (
        at("stages", 1, "layers", value=[2, 1]),
        "stages[1].layers",
        "[first, end) with first <= end",
        "[2, 1]",
    ),
    "a range of three": (
        at("stages", 1, "layers", value=[1, 2, 3]),
        "stages[1].layers",
        "a list of 2 whole numbers >= 0",
        "[1, 2, 3]",
    ),
    "recompute counts that do not add up": (
        at("stages", 2, "recompute", value={"none": 1, "selective": 0, "full": 0}),
        "stages[2].recompute",
        "counts that add up to the stage's 2 layers",
        "1",
    ),
    "a negative recompute count": (
        at("stages", 2, "recompute", value={"none": 3, "selective": 0, "full": -1}),
        "stages[2].recompute.full",
        "a whole number >= 0",
        "-1",
    ),
    "a recompute mode that is none": (
        at("stages", 2, "recompute", value={"none": 2, "selective": 0, "full": 0, "half": 0}),
        "stages[2].recompute.half",
        "keys full, none, selective",
        "half",
    ),
    "the head on the first stage": (
        at("stages", 0, "head", value=True),
        "stages[0]",
        "the embedding on the first stage and the head on the last",
        "{'rank': 0, ",
    ),
    "stages out of order": (
        at("stages", 0, "rank", value=1),
        "stages",
        "one stage for each of the 3 pipeline ranks, in order, chunk 0",
        "[(1, 0), (1, 0), (2, 0)]",
    ),
    "a second chunk": (
        at("stages", 2, "chunk", value=1),
        "stages",
        "one stage for each of the 3 pipeline ranks, in order, chunk 0",
        "[(0, 0), (1, 0), (2, 1)]",
    ),
    "a stage too few": (
        lambda document: document["stages"].pop(),
        "stages",
        "one stage for each of the 3 pipeline ranks, in order, chunk 0",
        "[(0, 0), (1, 0)]",
    ),
    "stages that are no list": (at("stages", value={}), "stages", "a list of mappings", "{}"),
    "a step of no seconds": (
        at("prediction", "step_seconds", value=0),
        "prediction.step_seconds",
        "a finite number > 0",
        "0",
    ),
    "a part of a step below zero": (
        at("prediction", "breakdown_seconds", "tp", value=-1e-3),
        "prediction.breakdown_seconds.tp",
        "a finite number >= 0",
        "-0.001",
    ),
    "memory that is no number": (
        at("prediction", "memory_bytes", 1, "weights", value="much"),
        "prediction.memory_bytes[1].weights",
        "a finite number >= 0",
        "'much'",
    ),
    "a gap below zero": (at("certificate", "gap", value=-0.1), "certificate.gap", "a finite number >= 0", "-0.1"),
    "no bound": (
        at("certificate", "bound_seconds", value=float("nan")),
        "certificate.bound_seconds",
        "a finite number >= 0",
        "nan",
    ),
    "half an ILP": (
        at("certificate", "ilps_solved", value=0.5),
        "certificate.ilps_solved",
        "a whole number >= 0",
        "0.5",
    ),
    "a batch of nothing": (at("job", "global_batch", value=0), "job.global_batch", "a whole number >= 1", "0"),
    "a precision that is none": (
        at("job", "precision", value="bf61"),
        "job.precision",
        "one of fp32, bf16, fp16, fp8",
        "'bf61'",
    ),
    "a limit of no bytes": (
        at("job", "memory_limit_bytes", value=0),
        "job.memory_limit_bytes",
        "a finite number > 0",
        "0",
    ),
    "pins that are a list": (at("job", "pins", value=["tp"]), "job.pins", "a mapping of layout key to value", "['tp']"),
    "a ban that is a number": (at("job", "bans", value=[3]), "job.bans", "a list of layout keys", "[3]"),
    "a layout for another world": (
        at("layout", "tp", value=2),
        "layout",
        "a layout that is legal for this model, job and cluster",
        "tp·cp·pp·dp = 2·1·3·1 = 6 and 3 devices: a layout uses every device once",
    ),
    "a layout for another batch": (
        at("layout", "micro_batch", value=3),
        "layout",
        "a layout that is legal for this model, job and cluster",
        "global batch 8 is not a multiple of micro_batch·dp = 3·1 = 3; ",
    ),
    "another model": (
        at("model", "positions", value="learned"),
        "layout",
        "a layout that is legal for this model, job and cluster",
        "sequence of 16 tokens and 8 learned positions",
    ),
    "another cluster": (
        at("cluster", "devices_per_node", value=1),
        "layout",
        "a layout that is legal for this model, job and cluster",
        "tp·cp·pp·dp = 1·1·3·1 = 3 and 1 devices: a layout uses every device once",
    ),
    "a link without bandwidth": (
        at("cluster", "links", 0, "bandwidth_bytes_per_second", value=-1),
        "cluster.links[0].bandwidth_bytes_per_second",
        "a finite number > 0",
        "-1",
    ),
    "heads that do not divide": (at("model", "kv_heads", value=3), "model.kv_heads", "a divisor of heads = 4", "3"),
}


def document() -> dict[str, Any]:
    plan = make_plan(tiny_llama(max_positions=8), Layout(pp=3), job(), [1, 2])
    return copy.deepcopy(plan.to_dict())


def test_the_untampered_plan_is_read() -> None:
    assert read(document()).to_dict() == document()


@pytest.mark.parametrize("name", list(TAMPERED))
def test_tampering_names_the_key(name: str) -> None:
    change, place, expected, got = TAMPERED[name]
    tampered = document()
    change(tampered)
    with pytest.raises(InputError) as caught:
        read(tampered)
    assert caught.value.where == f"p.yaml: {place}"
    assert caught.value.expected == expected
    assert caught.value.got.startswith(got)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every mapping in a document whose keys are fixed."""
    found = []
    if isinstance(node, dict):
        if path[-1:] != ("pins",) and path[-2:-1] != ("memory_bytes",):
            found.append(path)
        for key, value in node.items():
            found += places(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            found += places(value, (*path, index))
    return found


def shown(path: tuple[Any, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


@pytest.mark.parametrize("path", places(document()), ids=lambda path: shown(path) or "top level")
def test_an_unknown_key_is_refused_everywhere(path: tuple[Any, ...]) -> None:
    tampered = document()
    at(*path, "colour", value=3)(tampered)
    with pytest.raises(InputError) as caught:
        read(tampered)
    assert caught.value.what == f"unknown key {shown((*path, 'colour'))}"
    assert caught.value.where == f"p.yaml: {shown((*path, 'colour'))}"


# Keys that may be left out, because they have one plain default.
OPTIONAL = {
    "model": {*tiny_llama().to_dict()}
    - {"name", "layers", "hidden_size", "ffn_hidden_size", "heads", "vocab_size", "max_positions"},
    "cluster": {"nodes"},
    "cluster.links[0]": {"source", "fixed_latency_seconds", "operations", "shared"},
    "job": {
        "optimizer",
        "target",
        "memory_limit_bytes",
        "pins",
        "bans",
        "expert_imbalance",
        "expert_capacity",
    },
    "": {"alternatives", "schema"},
}


@pytest.mark.parametrize("path", places(document()), ids=lambda path: shown(path) or "top level")
def test_a_missing_key_is_named_everywhere(path: tuple[Any, ...]) -> None:
    inner: Any = document()
    for step in path:
        inner = inner[step]
    needed = set(inner) - OPTIONAL.get(shown(path), set())
    assert needed
    for key in needed:
        tampered = document()
        inner = tampered
        for step in path:
            inner = inner[step]
        del inner[key]
        with pytest.raises(InputError) as caught:
            read(tampered)
        assert caught.value.what == f"the key {shown((*path, key))} is missing"
        assert caught.value.where == f"p.yaml: {shown(path) or 'top level'}"


def test_a_link_may_leave_out_what_a_plain_ring_does_without() -> None:
    short = document()
    for key in OPTIONAL["cluster.links[0]"]:
        del short["cluster"]["links"][0][key]
    (link,) = read(short).cluster.links
    assert (link.fixed_latency_seconds, link.operations, link.source) == (0.0, (), "")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("schema: meshwright.plan/v2", "this file was written for another version than v1"),
        ("schema: meshwright.cluster/v1", "is this a plan file?"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, line: str, hint: str) -> None:
    path = tmp_path / "plan.yaml"
    text = dumps(make_plan(tiny_llama(), Layout(), job()))
    path.write_text(text.replace("schema: meshwright.plan/v1", line), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(path)
    assert (caught.value.where, caught.value.expected) == (f"{path}: schema", "meshwright.plan/v1")
    assert caught.value.hint == hint


# ---- what a file could once say ------------------------------------------------------------------------------


def test_a_recompute_mode_that_the_runtime_does_not_run() -> None:
    tampered = document()
    at("layout", "schedule", value="zb1p")(tampered)
    at("stages", 2, "recompute", value={"none": 1, "selective": 1, "full": 0})(tampered)
    with pytest.raises(InputError):
        read(tampered)


def test_a_precision_that_the_runtime_does_not_train() -> None:
    tampered = document()
    at("job", "target", value="torchtitan")(tampered)
    at("job", "precision", value="fp16")(tampered)
    with pytest.raises(InputError, match=r"job\.precision"):
        read(tampered)


def test_memory_of_more_ranks_than_there_are() -> None:
    tampered = document()
    tampered["prediction"]["memory_bytes"].append({"weights": 1.0})
    with pytest.raises(InputError):
        read(tampered)


@pytest.mark.parametrize("change", [at("job", "pins", value={"colour": 3}), at("job", "bans", value=["colour"])])
def test_a_pin_or_a_ban_of_a_key_that_is_none(change: Change) -> None:
    tampered = document()
    change(tampered)
    with pytest.raises(InputError):
        read(tampered)
