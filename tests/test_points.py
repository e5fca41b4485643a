"""The measured points: every kind survives its file, defaults stay out of it, and an error names the key."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.cluster import COLLECTIVES
from profiles.hardware import HardwareProfile
from profiles.input_error import InputError
from profiles.points import (
    DATA_PARALLEL,
    DIRECTIONS,
    DTYPE_BYTES,
    DTYPES,
    EAGER_PASSES,
    GEMM_OPERATIONS,
    SUM_OF_SCALARS,
    AttentionModel,
    AttentionPoint,
    CollectivePoint,
    ContentionPoint,
    GemmModel,
    GemmPoint,
    ManyGemmPoint,
    MemoryPoint,
    OverlapPoint,
    ShardPoint,
    WaitPoint,
    read_point,
)
from profiles.store import Reader, dump_yaml, parse_yaml
from tests.oracles.small_world import small_hardware

# One of every list of a profile, every key that has a default at another value, and the keys without one.
FULL: dict[str, Any] = {
    "gemm": GemmPoint(dtype="bf16", operation="input_grad", m=3, n=5, k=7, seconds=1e-6, spread=0.1),
    "gemm_checks": GemmPoint(dtype="fp8", operation="weight_grad", m=11, n=13, k=17, seconds=2e-6, spread=0.2),
    "many_gemm": ManyGemmPoint(kind="grouped", dtype="tf32", count=8, m=1, n=2, k=3, seconds=3e-6, spread=0.3),
    "gemm_models": GemmModel(dtype="fp16", achievable_flops_per_second=1e12, units=132, source="published: here"),
    "attention": AttentionPoint(
        dtype="bf16",
        direction="backward",
        batch=2,
        heads=8,
        sequence=1024,
        head_dim=64,
        kv_heads=2,
        causal=False,
        backend="flash",
        seconds=4e-4,
        spread=0.4,
    ),
    "attention_models": AttentionModel(
        dtype="fp32", kernel="flash", forward_flops_per_second=1e12, backward_flops_per_second=9e11, source="nominal"
    ),
    "memory": MemoryPoint(dtype="fp32", operation="adamw", direction="forward", elements=99, seconds=5e-5, spread=0.5),
    "collectives": CollectivePoint(
        operation="all_to_all", ranks=4, stride=2, bytes=1024, uneven=True, seconds=6e-5, spread=0.6
    ),
    "overlap": OverlapPoint(
        operation="all_reduce", ranks=8, bytes=1 << 20, compute_slowdown=1.1, communication_slowdown=1.7
    ),
    "contention_points": ContentionPoint(active=4, memory_bytes=1 << 20, slowdown=1.3),
    "waits": WaitPoint(compute_seconds=0.005, wait_seconds=0.001),
    "shard_overheads": ShardPoint(sequence=True, bytes=1 << 19, seconds=0.002),
}
NAMES = list(FULL)
REQUIRED = {name: [f.name for f in fields(point) if f.default is MISSING] for name, point in FULL.items()}


def short(name: str) -> dict[str, Any]:
    """The keys of a point that a file must hold."""
    return {key: getattr(FULL[name], key) for key in REQUIRED[name]}


def read(name: str, mapping: object) -> Any:
    return read_point(type(FULL[name]), Reader(mapping, source="h.yaml", path=f"{name}[0]"))


def listed(name: str, point: Any) -> Any:
    """What a profile's file says of a profile with that one point."""
    return parse_yaml(dump_yaml(small_hardware(**{name: (point,)}).to_dict()), "h.yaml")[name]


# ---- round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_point_survives_its_file(name: str) -> None:
    point = FULL[name]
    assert all(getattr(point, f.name) != f.default for f in fields(point))
    assert read(name, asdict(point)) == point
    assert listed(name, point) == [asdict(point)]
    assert read(name, listed(name, point)[0]) == point


@pytest.mark.parametrize("name", NAMES)
def test_what_is_at_its_default_is_left_out_of_the_file(name: str) -> None:
    point = type(FULL[name])(**short(name))
    assert listed(name, point) == [short(name)]
    assert read(name, short(name)) == point
    # One key at another value than its default is all that is added.
    for field in fields(point):
        if field.name not in REQUIRED[name]:
            value = getattr(FULL[name], field.name)
            assert listed(name, replace(point, **{field.name: value})) == [short(name) | {field.name: value}]


def test_the_defaults() -> None:
    defaults = {f.name: f.default for point in FULL.values() for f in fields(point) if f.default is not MISSING}
    assert defaults == {
        "spread": 0.0,
        "source": "",
        "kv_heads": 0,
        "causal": True,
        "backend": "default",
        "stride": 1,
        "uneven": False,
        "kernel": "",
        "memory_bytes": 0,
        "sequence": False,
    }


counts, seconds = st.integers(1, 1 << 40), st.floats(1e-12, 1e6)
spreads = st.just(0.0) | st.floats(0, 10)
dtypes, directions = st.sampled_from(DTYPES), st.sampled_from(DIRECTIONS)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8)
points: dict[str, st.SearchStrategy[Any]] = {
    "gemm": st.builds(
        GemmPoint,
        dtype=dtypes,
        operation=st.sampled_from(GEMM_OPERATIONS),
        m=counts,
        n=counts,
        k=counts,
        seconds=seconds,
        spread=spreads,
    ),
    "many_gemm": st.builds(
        ManyGemmPoint,
        kind=st.sampled_from(("batched", "grouped")),
        dtype=dtypes,
        count=counts,
        m=counts,
        n=counts,
        k=counts,
        seconds=seconds,
        spread=spreads,
    ),
    "gemm_models": st.builds(GemmModel, dtype=dtypes, achievable_flops_per_second=seconds, units=counts, source=texts),
    "attention": st.builds(
        AttentionPoint,
        dtype=dtypes,
        direction=directions,
        batch=counts,
        heads=counts,
        sequence=counts,
        head_dim=counts,
        kv_heads=st.just(0) | counts,
        causal=st.booleans(),
        backend=st.just("default") | texts,
        seconds=seconds,
        spread=spreads,
    ),
    "attention_models": st.builds(
        AttentionModel, dtype=dtypes, forward_flops_per_second=seconds, backward_flops_per_second=seconds, source=texts
    ),
    "memory": st.builds(
        MemoryPoint,
        dtype=dtypes,
        operation=st.sampled_from(list(EAGER_PASSES)),
        direction=directions,
        elements=counts,
        seconds=seconds,
        spread=spreads,
    ),
    "collectives": st.builds(
        CollectivePoint,
        operation=st.sampled_from((*COLLECTIVES, *DATA_PARALLEL, SUM_OF_SCALARS)),
        ranks=st.integers(2, 1 << 20),
        stride=counts,
        bytes=counts,
        uneven=st.booleans(),
        seconds=seconds,
        spread=spreads,
    ),
    "overlap": st.builds(
        OverlapPoint,
        operation=st.sampled_from(COLLECTIVES),
        ranks=st.integers(2, 1 << 20),
        bytes=counts,
        compute_slowdown=seconds,
        communication_slowdown=seconds,
    ),
    "contention_points": st.builds(ContentionPoint, active=counts, memory_bytes=st.just(0) | counts, slowdown=seconds),
    "waits": st.builds(WaitPoint, compute_seconds=seconds, wait_seconds=seconds),
    "shard_overheads": st.builds(ShardPoint, sequence=st.booleans(), bytes=counts, seconds=seconds),
}
points["gemm_checks"] = points["gemm"]


@given(st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), points[name])))
def test_any_point_survives_its_file(named: tuple[str, Any]) -> None:
    name, point = named
    document = listed(name, point)
    assert read(name, document[0]) == point
    assert set(REQUIRED[name]) <= set(document[0])


# ---- what a point cannot be ------------------------------------------------------------------------------

DTYPE = "one of fp32, tf32, bf16, fp16, fp8"
PLAIN = "all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send_recv, exchange"
FSDP = "fsdp_all_gather, fsdp_reduce_scatter, replicate_all_reduce, scalar_all_reduce"


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        *((name, "dtype", "fp64", DTYPE) for name in NAMES if "dtype" in REQUIRED[name]),
        *((name, "dtype", 16, DTYPE) for name in NAMES if "dtype" in REQUIRED[name]),
        *((name, "seconds", 0, "a finite number > 0") for name in NAMES if "seconds" in REQUIRED[name]),
        *((name, "spread", -0.1, "a finite number >= 0") for name in NAMES if hasattr(FULL[name], "spread")),
        *((name, "source", 3, "text") for name in ("gemm_models", "attention_models")),
        ("gemm", "operation", "backward", "one of forward, input_grad, weight_grad"),
        ("gemm", "m", 0, "a whole number >= 1"),
        ("gemm", "k", 1.5, "a whole number >= 1"),
        ("gemm", "n", True, "a whole number >= 1"),
        ("gemm", "seconds", float("nan"), "a finite number > 0"),
        ("gemm", "seconds", None, "a finite number > 0"),
        ("gemm", "seconds", "soon", "a finite number > 0"),
        ("many_gemm", "kind", "many", "one of batched, grouped"),
        ("many_gemm", "count", 0, "a whole number >= 1"),
        ("gemm_models", "units", 0, "a whole number >= 1"),
        ("gemm_models", "achievable_flops_per_second", -1e12, "a finite number > 0"),
        ("attention", "direction", "sideways", "one of forward, backward"),
        ("attention", "kv_heads", -1, "a whole number >= 0"),
        ("attention", "causal", "yes", "true or false"),
        ("attention", "causal", 1, "true or false"),
        ("attention", "backend", 3, "text"),
        ("attention_models", "backward_flops_per_second", 0, "a finite number > 0"),
        ("memory", "operation", "sort", "one of " + ", ".join(EAGER_PASSES)),
        ("memory", "elements", "many", "a whole number >= 1"),
        ("collectives", "operation", "gossip", f"one of {PLAIN}, {FSDP}"),
        ("collectives", "ranks", 1, "a whole number >= 2"),
        ("collectives", "stride", 0, "a whole number >= 1"),
        ("collectives", "bytes", 0, "a whole number >= 1"),
        ("collectives", "uneven", None, "true or false"),
        ("overlap", "operation", "fsdp_all_gather", f"one of {PLAIN}"),
        ("overlap", "ranks", 1, "a whole number >= 2"),
        ("overlap", "communication_slowdown", 0, "a finite number > 0"),
        ("contention_points", "active", 0, "a whole number >= 1"),
        ("contention_points", "slowdown", -1, "a finite number > 0"),
    ],
)
def test_a_value_that_cannot_be_names_its_key(name: str, key: str, value: object, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read(name, asdict(FULL[name]) | {key: value})
    error = caught.value
    assert (error.where, error.expected, error.got) == (f"h.yaml: {name}[0].{key}", expected, repr(value))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_named(name: str) -> None:
    with pytest.raises(InputError) as caught:
        read(name, asdict(FULL[name]) | {"speed": 3})
    assert caught.value.what == f"unknown key {name}[0].speed"
    assert caught.value.where == f"h.yaml: {name}[0].speed"


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in REQUIRED[name]])
def test_a_missing_key_is_named(name: str, key: str) -> None:
    mapping = asdict(FULL[name])
    del mapping[key]
    with pytest.raises(InputError) as caught:
        read(name, mapping)
    assert caught.value.what == f"the key {name}[0].{key} is missing"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "place", "expected"),
    [
        (None, "", "a list of mappings"),
        ({"m": 3}, "", "a list of mappings"),
        (["fast"], "[0]", "a mapping of keys to values"),
    ],
)
def test_what_is_no_list_of_points(name: str, value: object, place: str, expected: str) -> None:
    document = {k: v for k, v in small_hardware().to_dict().items() if k != "schema"} | {name: value}
    with pytest.raises(InputError) as caught:
        HardwareProfile.from_dict(Reader(document, source="h.yaml"))
    assert (caught.value.where, caught.value.expected) == (f"h.yaml: {name}{place}", expected)


# ---- the tables ------------------------------------------------------------------------------------------


def test_every_dtype_has_its_bytes() -> None:
    assert {dtype: DTYPE_BYTES[dtype] for dtype in DTYPES} == {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    assert set(DTYPE_BYTES) == set(DTYPES)
