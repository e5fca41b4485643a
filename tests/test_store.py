"""Reader's errors word for word, files that are not documents, and load(save(x)) == x."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import cluster, model
from profiles.cluster import ClusterSpec, LinkOperation, LinkTier
from profiles.input_error import InputError
from profiles.model import ACTIVATIONS, NORMS, POSITIONS, ModelSpec, RopeScaling
from profiles.store import Reader, dump_yaml, load_document, load_json, parse_yaml, read_text, write_atomically


def reader(**mapping: Any) -> Reader:
    return Reader(mapping, source="f.yaml", path="links[1]")


# ---- one value -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected", "got"),
    [
        (lambda r: r.integer("k", minimum=2), "a whole number >= 2", 1),
        (lambda r: r.integer("k"), "a whole number >= 0", 2.0),
        (lambda r: r.integer("k"), "a whole number >= 0", True),
        (lambda r: r.integer("k"), "a whole number >= 0", "3"),
        (lambda r: r.integer("k", default=3), "a whole number >= 0", None),
        (lambda r: r.number("k", above=0), "a finite number > 0", -3),
        (lambda r: r.number("k", above=0), "a finite number > 0", 0),
        (lambda r: r.number("k", minimum=1.5), "a finite number >= 1.5", 1),
        (lambda r: r.number("k"), "a finite number", float("nan")),
        (lambda r: r.number("k"), "a finite number", "inf"),
        (lambda r: r.number("k"), "a finite number", "three"),
        (lambda r: r.number("k"), "a finite number", False),
        (lambda r: r.boolean("k"), "true or false", "yes"),
        (lambda r: r.boolean("k", default=True), "true or false", 0),
        (lambda r: r.text("k"), "text", 3),
        (lambda r: r.text("k", choices=["a", "b"]), "one of a, b", "zz"),
        (lambda r: r.text("k", choices=["a", "b"]), "one of a, b", ["a"]),
        (lambda r: r.child("k"), "a mapping of keys to values", [1]),
        (lambda r: r.plain("k"), "a mapping of keys to values", [1]),
        (lambda r: r.plain("k"), "a mapping of keys to values", "a: 1"),
        (lambda r: r.children("k"), "a list of mappings", {"a": 1}),
        (lambda r: r.integers("k", length=2), "a list of 2 whole numbers >= 0", [1]),
        (lambda r: r.integers("k", length=2), "a list of 2 whole numbers >= 0", [1, -1]),
    ],
)
def test_a_value_that_cannot_be_used_names_file_key_expected_and_got(
    call: Callable[[Reader], object], expected: str, got: object
) -> None:
    with pytest.raises(InputError) as caught:
        call(reader(k=got))
    assert str(caught.value) == (
        "error: links[1].k has a value that cannot be used; where: f.yaml: links[1].k; "
        f"expected: {expected}; got: {got!r}"
    )


def test_values_come_back_as_their_type() -> None:
    r = reader(i=3, n=2, e="1e-5", b=False, t="a", c={"d": 1}, l=[{"e": 2}], p=[3, 4], a=None)
    assert r.integer("i", minimum=3) == 3
    assert isinstance(r.number("n", above=1), float)
    assert r.number("n") == 2.0
    assert r.number("e") == 1e-5  # YAML 1.1 takes it for text
    assert r.boolean("b") is False
    assert r.text("t", choices=["a"]) == "a"
    assert r.child("c").integer("d") == 1
    assert [child.integer("e") for child in r.children("l")] == [2]
    assert r.integers("p", length=2) == (3, 4)
    assert r.anything("a") is None
    r.finish()


def test_a_key_left_out_takes_its_default() -> None:
    r = reader()
    defaults = (r.integer("i", default=7), r.number("n", default=0.5), r.boolean("b", default=True))
    assert defaults == (7, 0.5, True)
    assert (r.text("t", default="x"), r.anything("a", default=None), r.children("l", default=[])) == ("x", None, [])
    assert r.plain("p") == {}


def test_a_missing_key_names_what_is_there_and_the_near_match() -> None:
    with pytest.raises(InputError) as caught:
        reader(bandwith=3, span=8).number("bandwidth", above=0)
    assert caught.value.lines() == [
        ("error", "the key links[1].bandwidth is missing"),
        ("where", "f.yaml: links[1]"),
        ("expected", "bandwidth: a finite number > 0"),
        ("got", "keys bandwith, span"),
        ("try", "is 'bandwith' meant to be 'bandwidth'?"),
    ]


def test_a_missing_key_of_an_empty_document() -> None:
    with pytest.raises(InputError) as caught:
        Reader({}, source="f.yaml").text("schema")
    assert caught.value.lines() == [
        ("error", "the key schema is missing"),
        ("where", "f.yaml: top level"),
        ("expected", "schema: text"),
        ("got", "no keys"),
    ]


def test_a_file_without_a_schema_is_told_which(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    for text, got in (("name: x\n", "keys name"), ("schema: 3\n", "3")):
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            load_document(path, schema="meshwright.model/v1", kind="model")
        assert caught.value.expected.removeprefix("schema: ") == "meshwright.model/v1"
        assert caught.value.got == got


def test_finish_refuses_keys_that_nobody_asked_for() -> None:
    r = reader(span=8, latencyseconds=1)
    r.integer("span")
    r.number("latency_seconds", default=0.0)
    with pytest.raises(InputError) as caught:
        r.finish()
    assert caught.value.lines() == [
        ("error", "unknown key links[1].latencyseconds"),
        ("where", "f.yaml: links[1].latencyseconds"),
        ("expected", "keys latency_seconds, span"),
        ("got", "latencyseconds"),
        ("try", "is 'latency_seconds' meant?"),
    ]


def test_the_near_choice_is_suggested() -> None:
    with pytest.raises(InputError) as caught:
        reader(schedule="1f1").text("schedule", choices=["gpipe", "1f1b"])
    assert caught.value.hint == "is '1f1b' meant?"


def test_paths_grow_with_depth() -> None:
    document = {"links": [{"span": 1}, {"span": {"x": -1}}]}
    inner = Reader(document, source="f.yaml").children("links")[1].child("span")
    with pytest.raises(InputError) as caught:
        inner.integer("x")
    assert caught.value.where == "f.yaml: links[1].span.x"


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(InputError) as caught:
        reader(k="x" * 500).integer("k")
    assert caught.value.got == "'" + "x" * 116 + "..."


# ---- files -----------------------------------------------------------------------------------------------


def test_a_document_of_another_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("schema: meshwright.model/v0\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_document(path, schema="meshwright.model/v1", kind="model")
    assert caught.value.lines() == [
        ("error", "schema has a value that cannot be used"),
        ("where", f"{path}: schema"),
        ("expected", "meshwright.model/v1"),
        ("got", "'meshwright.model/v0'"),
        ("try", "this file was written for another version than v1"),
    ]


@pytest.mark.parametrize("text", ["", "3", "- a", "just words"])
def test_a_document_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="the document has a value that cannot be used"):
        load_document(path, schema="meshwright.model/v1", kind="model")


def test_yaml_that_is_none_names_line_and_column() -> None:
    with pytest.raises(InputError) as caught:
        parse_yaml("a: 1\nb: [1, 2\n", "f.yaml")
    assert caught.value.what == "f.yaml is not valid YAML"
    assert caught.value.where == "f.yaml: line 3, column 1"


@pytest.mark.parametrize("text", ["a: \0", "a: !!python/object:os.system x", "a: 1\n---\nb: 2", "<<: 3", "{[1]: 2}"])
def test_yaml_that_cannot_be_used_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=r"f\.yaml is not valid YAML"):
        parse_yaml(text, "f.yaml")


@pytest.mark.parametrize("text", ["a: 2001-99-99", "a: 0b_", "a: " + "9" * 5000])
def test_yaml_with_a_scalar_that_python_refuses_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=r"f\.yaml is not valid YAML"):
        parse_yaml(text, "f.yaml")


def test_yaml_nested_without_end_is_an_input_error_and_no_crash() -> None:
    code = (
        "from profiles.input_error import InputError\nfrom profiles.store import parse_yaml\n"
        "try:\n    parse_yaml('[' * 100000 + ']' * 100000, 'f.yaml')\n"
        "except InputError as error:\n    print(error.what)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "f.yaml is not valid YAML\n")


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, "9" * 5000])
def test_json_with_a_number_or_a_depth_that_python_refuses_is_an_input_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="is not valid JSON"):
        load_json(path, "test")


def test_a_whole_number_beyond_floats_is_an_input_error() -> None:
    with pytest.raises(InputError, match="a finite number"):
        reader(k=10**400).number("k")


def test_json_that_is_none_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": 1,\n}', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_json(path, "test")
    assert caught.value.where.startswith(f"{path}: line ")


def test_what_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (binary, tmp_path):
        with pytest.raises(InputError, match=f"{path} cannot be read"):
            read_text(path, "model")


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").touch()
    with pytest.raises(InputError) as caught:
        read_text(tmp_path / "clutser.yaml", "cluster")
    assert caught.value.hint == f"is {tmp_path / 'cluster.yaml'} meant?"


def test_a_document_keeps_the_order_of_its_keys_and_has_leaves_on_one_line() -> None:
    assert dump_yaml({"schema": "s/v1", "b": {"y": 1, "x": [2, 3]}, "a": 1e-5}) == (
        "schema: s/v1\nb:\n  y: 1\n  x: [2, 3]\na: 1.0e-05\n"
    )


def test_writing_replaces_the_file_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "f.yaml"
    write_atomically(path, "one")
    write_atomically(path, "two\n")
    assert path.read_text(encoding="utf-8") == "two\n"
    assert os.listdir(path.parent) == ["f.yaml"]


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "f.yaml", tmp_path / "folder"):
        with pytest.raises(InputError, match=f"{path} cannot be written"):
            write_atomically(path, "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# ---- load(save(x)) == x ----------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=12)
counts = st.integers(1, 10**6)
positives = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    head_dim = 2 * draw(st.integers(1, 128))
    low, high = sorted(draw(st.lists(positives, min_size=2, max_size=2, unique=True)))
    scaling = st.builds(
        RopeScaling,
        factor=positives,
        low_frequency_factor=st.just(low),
        high_frequency_factor=st.just(high),
        original_max_positions=counts,
    )
    return ModelSpec(
        name=draw(texts),
        family=draw(texts),
        layers=draw(counts),
        hidden_size=kv_heads * group * head_dim,
        ffn_hidden_size=draw(counts),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(2, 10**6)),
        max_positions=draw(counts),
        norm=draw(st.sampled_from(NORMS)),
        norm_epsilon=draw(positives),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        positions=draw(st.sampled_from(POSITIONS)),
        rope_theta=draw(positives),
        rope_scaling=draw(st.none() | scaling),
        qkv_bias=draw(st.booleans()),
        attention_output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def link_operations(draw: st.DrawFn) -> LinkOperation:
    return LinkOperation(
        operation=draw(st.sampled_from(cluster.COLLECTIVES)),
        ranks=draw(st.integers(0, 99)),
        bandwidth_bytes_per_second=draw(positives),
        latency_seconds=draw(st.just(0.0) | positives),
        fixed_latency_seconds=draw(st.just(0.0) | positives),
        ramp_bytes=draw(st.just(0.0) | positives),
        source=draw(texts),
    )


@st.composite
def cluster_specs(draw: st.DrawFn) -> ClusterSpec:
    factors = draw(st.lists(st.integers(2, 8), min_size=1, max_size=3))
    # A node is whole tiers, or a part of the narrowest: the product of the first few factors or a divisor of one.
    per_node = math.prod(factors[: draw(st.integers(1, len(factors)))])
    if draw(st.booleans()):
        per_node = draw(st.sampled_from([d for d in range(1, factors[0] + 1) if factors[0] % d == 0]))
    links, span = [], 1
    for factor in factors:
        span *= factor
        links.append(
            LinkTier(
                tier=draw(texts),
                span=span,
                bandwidth_bytes_per_second=draw(positives),
                latency_seconds=draw(st.just(0.0) | positives),
                fixed_latency_seconds=draw(st.just(0.0) | positives),
                operations=tuple(draw(st.lists(link_operations(), max_size=2))),
                source=draw(texts),
            )
        )
    return ClusterSpec(
        name=draw(texts),
        hardware=draw(texts),
        nodes=draw(st.integers(1, span // per_node)),
        devices_per_node=per_node,
        memory_bytes=draw(positives),
        links=tuple(links),
    )


@given(model_specs())
def test_a_model_survives_its_file(tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec) -> None:
    path = tmp_path_factory.getbasetemp() / "model.yaml"
    write_atomically(path, dump_yaml({"schema": model.SCHEMA, **spec.to_dict()}))
    assert model.load_model_file(path) == spec


@given(cluster_specs())
def test_a_cluster_survives_its_file(tmp_path_factory: pytest.TempPathFactory, spec: ClusterSpec) -> None:
    path = tmp_path_factory.getbasetemp() / "cluster.yaml"
    write_atomically(path, dump_yaml({"schema": cluster.SCHEMA, **spec.to_dict()}))
    assert cluster.load_cluster_file(path) == spec
