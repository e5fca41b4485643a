"""Facts of trainers: yes/no or one of a list, each with its reason, never a number; strangers get the nearest."""

from __future__ import annotations

from dataclasses import fields

import pytest
import yaml

from profiles.input_error import InputError
from profiles.published_runs import load_published_runs
from profiles.software import FACTS, FOLDER, Software, list_software, load_all_software, load_software, resolve_software
from profiles.store import Reader

from .published import SMALL


@pytest.mark.parametrize("name", list_software())
def test_a_fact_is_yes_or_no_or_one_of_a_list_and_never_a_number(name: str) -> None:
    document = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    named = {"schema", "name", "family", "year", "reasons", "variants"}
    assert set(document) <= named | set(FACTS)
    switched = list(document.get("variants", {}).values())
    for facts in ({key: document[key] for key in FACTS}, *switched):
        for key, value in facts.items():
            if key == "reason":
                continue
            choices = FACTS[key]
            assert type(value) is bool if choices is None else value in choices, (key, value)


@pytest.mark.parametrize("name", list_software())
def test_each_fact_has_a_reason_and_the_name_its_family_and_year(name: str) -> None:
    entry = load_software(name)
    software = entry.software
    assert set(software.reasons) == set(FACTS)
    assert all(len(reason) > 15 for reason in software.reasons.values())
    assert software.name == name
    assert name in (f"{software.family}-{software.year}", "meshwright")
    assert all(variant.facts and len(variant.reason) > 15 for variant in entry.variants)


def test_the_facts_are_all_the_fields_there_are() -> None:
    assert [f.name for f in fields(Software)] == ["name", "family", "year", *FACTS, "reasons"]
    assert {f.name: f.type for f in fields(Software)} == (
        {"name": "str", "family": "str", "year": "int", "reasons": "dict[str, str]"}
        | {fact: "bool" if choices is None else "str" for fact, choices in FACTS.items()}
    )


def test_every_software_of_the_small_file_is_there() -> None:
    assert {run.software for run in load_published_runs(SMALL)} <= set(list_software())


def test_what_trainers_are_known_for() -> None:
    known = {name: entry.software for name, entry in load_all_software().items()}
    for name in ("megatron-2019", "megatron-2020", "megatron-2021", "nemo-megatron-2022"):
        assert known[name].attention in ("unfused", "fused_softmax")
    for name in ("megatron-2021", "nemo-megatron-2022"):  # their pipelines leave torch's DDP behind
        assert known[name].gradient_reduce == "after_backward"
    for name in ("megatron-2019", "megatron-2020", "megatron-core-2024", "fsdp1-2023"):
        assert known[name].gradient_reduce == "overlapped"
    for name in ("megatron-core-2024", "fsdp1-2023"):
        assert known[name].attention.startswith("flash")
    assert {name for name, software in known.items() if software.recomputed == "as_needed"} == {
        *("meshwright", "torchtitan-2024", "fsdp1-2023")
    }
    # Megatron-LM of before 2022 has no asynchronous all-reduce, and DeepSpeed's fork leaves it off.
    for name in ("megatron-2019", "megatron-2020", "megatron-2021", "megatron-deepspeed-2023"):
        assert known[name].tp_overlap == "none"
    for name in ("nemo-megatron-2022", "megatron-2023", "zero-bubble-megatron-2023"):
        assert known[name].tp_overlap == "input_gradient"
    # Before Megatron-LM had torch's kernel over all gradients it read a number of each.
    assert known["megatron-2019"].overflow_check == "tensor_by_tensor"
    assert (known["megatron-2020"].overflow_check, known["megatron-2021"].overflow_check) == ("sums_read", "one_kernel")
    assert {name for name, software in known.items() if not software.mpu_layers} == {
        *("meshwright", "torchtitan-2024", "fsdp1-2023", "nanotron-2024")
    }
    assert known["megatron-2021"].scatter_gather
    assert not known["meshwright"].dropout
    assert [name for name, software in known.items() if software.loss_in_pieces] == ["meshwright"]


@pytest.mark.parametrize(
    ("stranger", "near"),
    [
        ("megatron-2022", "megatron-2021"),  # the earlier of two as near
        ("megatron-core-2026", "megatron-core-2025"),
        ("nemo-2023", "nemo-megatron-2022"),
        ("torchtitan-2025", "torchtitan-2024"),
        ("fsdp-2022", "fsdp1-2023"),
        ("levanter-2020", "megatron-2020"),  # no word in common
        ("unheard-of", "megatron-2023"),
        ("", "megatron-2023"),
    ],
)
def test_a_stranger_gets_the_nearest_family_and_year_and_a_warning(stranger: str, near: str) -> None:
    software, warning = resolve_software(stranger, load_all_software())
    assert software.name == near
    assert f"{near} stands in for it" in warning


def test_switches_that_the_notes_name_change_facts_and_their_reasons() -> None:
    entries = load_all_software()
    plain, _ = resolve_software("torchtitan-2024", entries, "eager")
    compiled, _ = resolve_software("torchtitan-2024", entries, "torch.compile")
    split, warning = resolve_software("torchtitan-2024", entries, "4D, AsyncTP")
    assert (plain.norm, plain.tp_overlap) == ("eager", "none")
    assert (compiled.norm, compiled.tp_overlap) == ("fused", "none")
    assert (compiled.cross_entropy, split.cross_entropy) == ("eager", "fused")
    assert (split.norm, split.tp_overlap) == ("fused", "pieces")
    assert split.reasons["tp_overlap"] != plain.reasons["tp_overlap"]
    assert set(split.reasons) == set(FACTS)
    assert warning == ""


def test_the_zero_bubble_fork_waits_for_messages_where_stages_are_interleaved_alone() -> None:
    known = {name: entry.software for name, entry in load_all_software().items()}
    meanwhile = {
        name: tuple(known[name].computes_meanwhile(split) for split in (False, True))
        for name in ("zero-bubble-megatron-2023", "megatron-2021", "megascale-2023", "torchtitan-2024")
    }
    assert meanwhile == {
        "zero-bubble-megatron-2023": (False, True),
        "megatron-2021": (False, False),
        "megascale-2023": (True, True),
        "torchtitan-2024": (True, True),
    }


def test_peak_memory_is_what_a_trainer_prints() -> None:
    known = {name: entry.software for name, entry in load_all_software().items()}
    printed = {name: (known[name].counts_tensors, known[name].memory_unit_bytes) for name in known}
    assert printed["zero-bubble-megatron-2023"] == (True, 1e9)
    assert printed["nanotron-2024"] == printed["torchtitan-2024"] == (False, 2**30)
    assert printed["megatron-2021"] == (False, 1e9)


def test_a_number_or_a_missing_reason_is_refused() -> None:
    document = yaml.safe_load((FOLDER / "megatron-2021.yaml").read_text(encoding="utf-8"))
    with pytest.raises(InputError) as info:
        Software.from_dict(Reader(document | {"attention": 0.9}, source="s.yaml"))
    assert info.value.where == "s.yaml: attention"
    with pytest.raises(InputError) as info:
        Software.from_dict(Reader(document | {"dropout": 0.1}, source="s.yaml"))
    assert info.value.expected == "true or false"
    reasons = {key: value for key, value in document["reasons"].items() if key != "p2p"}
    with pytest.raises(InputError) as info:
        Software.from_dict(Reader(document | {"reasons": reasons}, source="s.yaml"))
    assert info.value.what == "the key reasons.p2p is missing"
