"""The hardware profile as a file: what is written comes back, and every mistake is named with its place."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.hardware import SCHEMA, HardwareProfile, load_hardware, save_hardware
from profiles.input_error import InputError
from profiles.points import (
    EAGER_PASSES,
    CollectivePoint,
)
from profiles.store import Reader
from tests.oracles.small_world import small_hardware
from tests.test_hardware import MODELLED, measured
from tests.test_points import FULL
from tests.test_points import points as any_point

# ---- files -----------------------------------------------------------------------------------------------


# Every key and every list of a profile, none at its default.
FILLED = small_hardware(
    straggler_slowdown=1.07,
    parameter_overhead_seconds=3e-7,
    host_operation_seconds=1e-5,
    operation_overhead_seconds=2e-6,
    split_overhead_seconds=1e-6,
    selective_overhead_seconds=7e-6,
    compiled_operation_seconds=3e-6,
    fsdp_forward_overhead_seconds=1e-4,
    fsdp_backward_overhead_seconds=5e-5,
    message_overhead_seconds=1e-4,
    message_overhead_seconds_per_byte=1e-9,
    host_to_device_bytes_per_second=25e9,
    device_to_host_bytes_per_second=20e9,
    multiprocessors=108,
    devices_per_node=8,
    provenance={"kind": "measured", "date": "today", "versions": {"torch": "2"}, "ranks": [0, 1]},
    corrections={"gemm": 1.1, "memory": 0.9},
    **{name: (point,) for name, point in FULL.items() if name not in ("gemm_models", "attention_models")},
)


def test_a_filled_profile_is_filled() -> None:
    for field in fields(HardwareProfile):
        assert getattr(FILLED, field.name) not in (field.default, ()), field.name


@pytest.mark.parametrize("hardware", [MODELLED, measured(), FILLED, small_hardware(name="1e3", allocator_slack=0.0)])
def test_a_profile_survives_its_file(tmp_path: Path, hardware: HardwareProfile) -> None:
    save_hardware(hardware, tmp_path / "h.yaml")
    assert load_hardware(tmp_path / "h.yaml") == hardware
    assert (tmp_path / "h.yaml").read_text(encoding="utf-8").startswith(f"schema: {SCHEMA}\n")


positives = st.floats(1e-9, 1e15)
zeros = st.just(0.0) | positives
plain_values = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.sampled_from(("", "a: b", "1e3"))
small_profiles = st.builds(
    small_hardware,
    name=st.sampled_from(("h", "", "a b", "yes", "1e5", "\u00b5")),
    memory_bytes=positives,
    context_bytes=zeros,
    launch_seconds=zeros,
    overlap_compute_slowdown=st.floats(1, 9),
    overlap_communication_slowdown=st.floats(1, 9),
    straggler_slowdown=st.floats(1, 9),
    parameter_overhead_seconds=zeros,
    host_to_device_bytes_per_second=st.none() | positives,
    device_to_host_bytes_per_second=st.none() | positives,
    multiprocessors=st.integers(0, 200),
    devices_per_node=st.integers(0, 99),
    provenance=st.dictionaries(st.sampled_from(("kind", "date", "3")), plain_values | st.lists(plain_values)),
    corrections=st.dictionaries(st.sampled_from(("gemm", "memory", "tp")), positives),
    **{
        name: st.lists(point, max_size=2).map(tuple)
        for name, point in any_point.items()
        if name not in ("gemm_models", "attention_models")  # one of each stays: a profile prices something
    },
)


@settings(deadline=None)
@given(small_profiles)
def test_any_profile_survives_its_file(tmp_path_factory: pytest.TempPathFactory, hardware: HardwareProfile) -> None:
    path = tmp_path_factory.getbasetemp() / "hardware.yaml"
    save_hardware(hardware, path)
    assert load_hardware(path) == hardware


def test_a_profile_of_today_s_least_keys() -> None:
    """Files from before a key existed are read with what the key's absence means."""
    needed = [f.name for f in fields(HardwareProfile) if f.default is MISSING and f.default_factory is MISSING]
    models = ["gemm_models", "attention_models"]
    text = small_hardware().to_dict()
    hardware = HardwareProfile.from_dict(Reader({key: text[key] for key in needed + models}, source="h.yaml"))
    expected = {f.name: f.default for f in fields(HardwareProfile) if f.default is not MISSING}
    for key, default in expected.items():
        if key not in models:
            assert getattr(hardware, key) == default, key
    assert hardware.corrections == {}


PARTS = 20  # of the file's bytes, so that a failure says about where


def loaded(path: Path) -> HardwareProfile | InputError:
    try:
        return load_hardware(path)
    except InputError as error:
        return error


@pytest.mark.parametrize("part", range(PARTS))
def test_a_file_that_ends_anywhere_is_an_error_or_a_profile_with_fewer_points(tmp_path: Path, part: int) -> None:
    """A full disk or a broken copy: never a traceback, never another figure."""
    whole = replace(FILLED, name="NAME")
    path = tmp_path / "h.yaml"
    save_hardware(whole, path)
    # A letter of two bytes, which a cut can halve.
    data = path.read_bytes().replace(b"name: NAME", "name: \u00b5".encode(), 1)
    path.write_bytes(data)
    whole = replace(whole, name="\u00b5")
    assert load_hardware(path) == whole
    for end in range(part * len(data) // PARTS, (part + 1) * len(data) // PARTS):
        path.write_bytes(data[:end])
        read = loaded(path)
        if isinstance(read, InputError):
            assert str(path) in read.where
            continue
        # What is left of a file that can be read lacks points at its end and nothing else.
        for field in fields(HardwareProfile):
            before, after = getattr(whole, field.name), getattr(read, field.name)
            assert after == before or (field.name in FULL and after == before[: len(after)]), (end, field.name)


def test_a_file_that_ends_before_its_models_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "h.yaml"
    save_hardware(small_hardware(), path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("attention_models:")], encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_hardware(path)
    assert caught.value.expected == "points or a model of GEMM and attention for one dtype at least"
    path.write_text(text[: text.index("peak_flops")], encoding="utf-8")
    with pytest.raises(InputError, match="the key peak_flops_per_second is missing"):
        load_hardware(path)


def document() -> dict[str, Any]:
    text = measured().to_dict()
    del text["schema"]
    return text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("memory_bytes",), 0, "a finite number > 0"),
        (("overlap_compute_slowdown",), 0.9, "a finite number >= 1"),
        (("overlap_communication_slowdown",), 0, "a finite number >= 1"),
        (("straggler_slowdown",), 0.99, "a finite number >= 1"),
        (("microbatch_overhead_seconds",), -1e-9, "a finite number >= 0"),
        (("shard_overhead_seconds",), -1e-9, "a finite number >= 0"),
        (("sequence_shard_overhead_seconds",), -1e-9, "a finite number >= 0"),
        (("parameter_overhead_seconds",), "none", "a finite number >= 0"),
        (("host_to_device_bytes_per_second",), 0, "a finite number > 0"),
        (("device_to_host_bytes_per_second",), "fast", "a finite number > 0"),
        (("multiprocessors",), -1, "a whole number >= 0"),
        (("devices_per_node",), 8.0, "a whole number >= 0"),
        (("corrections",), [], "a mapping of keys to values"),
        (("corrections", "gemm"), 0, "a finite number > 0"),
        (("corrections", "tp"), -1.5, "a finite number > 0"),
        (("provenance",), "measured here", "a mapping of keys to values"),
        (("provenance",), ["measured"], "a mapping of keys to values"),
        (("provenance",), None, "a mapping of keys to values"),
        (("peak_flops_per_second", "fp32"), "fast", "a finite number > 0"),
        (("gemm", 1, "seconds"), 0, "a finite number > 0"),
        (("gemm", 0, "m"), 1.5, "a whole number >= 1"),
        (("gemm", 0, "dtype"), "fp64", "one of fp32, tf32, bf16, fp16, fp8"),
        (("gemm", 0, "operation"), "backward", "one of forward, input_grad, weight_grad"),
        (("attention", 0, "direction"), "sideways", "one of forward, backward"),
        (("memory", 0, "operation"), "sort", "one of " + ", ".join(EAGER_PASSES)),
        (("collectives", 0, "ranks"), 0, "a whole number >= 2"),
        (("gemm_models", 0, "units"), 0, "a whole number >= 1"),
    ],
)
def test_a_figure_that_cannot_be_names_its_place(path: tuple[Any, ...], value: object, expected: str) -> None:
    text = document() | {"corrections": {}}
    at: Any = text
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    with pytest.raises(InputError) as caught:
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))
    assert (caught.value.where, caught.value.expected) == (f"h.yaml: {place}", expected)


def test_a_profile_without_gemm_or_attention_is_none() -> None:
    text = document() | {"gemm": [], "gemm_models": []}
    with pytest.raises(InputError) as caught:
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))
    assert caught.value.where == "h.yaml: gemm"
    assert caught.value.expected == "points or a model of GEMM and attention for one dtype at least"


def test_an_unknown_key_of_a_point_is_named() -> None:
    text = document()
    text["gemm"][0]["speed"] = 3
    with pytest.raises(InputError, match=r"unknown key gemm\[0\]\.speed"):
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))


# ---- what a file could once say ------------------------------------------------------------------------------


def test_the_share_that_is_hidden_is_no_key_any_more() -> None:
    with pytest.raises(InputError, match="unknown key hidden_communication"):
        HardwareProfile.from_dict(Reader(document() | {"hidden_communication": 0.5}, source="h.yaml"))


def test_a_precision_is_supported_only_with_all_its_operations() -> None:
    assert not measured(gemm_models=(), attention_models=()).supports("fp32")


def test_a_collective_of_one_rank_is_refused() -> None:
    points = (CollectivePoint(operation="all_reduce", ranks=1, bytes=1000, seconds=1e-4),)
    text = replace(measured(), collectives=points).to_dict()
    del text["schema"]
    with pytest.raises(InputError) as caught:
        HardwareProfile.from_dict(Reader(text, source="h.yaml"))
    assert caught.value.where == "h.yaml: collectives[0].ranks"
