"""Validation from file to report: the JSON's keys, records, free constants, and the text at a fixed width."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from planner.free_constants import free_constants
from planner.plan import save
from planner.predict_case import predict
from planner.question import ask
from planner.record import RECORD_FILE, SCHEMA
from planner.run_case import case_of, load_run_facts
from planner.search import search
from planner.validate import Validation, validate
from planner.validate_report import validation_report
from planner.validate_scores import Outcome
from profiles.input_error import InputError
from profiles.published_runs import load_published_runs

from .published import SMALL, write_runs


@pytest.fixture(scope="module")
def small() -> Validation:
    return validate(SMALL)


# ---- the file --------------------------------------------------------------------------------------------------


def test_the_document_has_the_keys_that_were_promised(small: Validation) -> None:
    document = json.loads(json.dumps(small.to_dict(), allow_nan=False))
    assert list(document) == ["rows", "summary", "sweeps"]
    assert [row["id"] for row in document["rows"]] == [run.id for run in load_published_runs(SMALL)]
    for row in document["rows"]:
        assert list(row) == [
            "id",
            "measured_iter_s",
            "predicted_iter_s",
            "error_pct",
            "measured_peak_mem_GB",
            "predicted_peak_mem_GB",
            "skipped",
        ]
        assert (row["predicted_iter_s"] is None) == (row["skipped"] is not None)
    assert list(document["summary"]) == ["n", "skipped", "time_mape", "time_median_ape", "memory_mape", "null_mape"]
    assert {tuple(sweep) for sweep in document["sweeps"]} == {("name", "n", "spearman", "regret_pct")}


def test_the_figures_of_the_document_agree_with_its_rows(small: Validation) -> None:
    document = small.to_dict()
    rows = {row["id"]: row for row in document["rows"]}
    assert {row["skipped"] for row in rows.values() if row["skipped"]} == {
        "tp or pp not stated",
        "schedule zb-2p: none of ours",
    }
    assert document["summary"]["skipped"] == 3
    row = rows["sc21_t1_1.7B"]
    assert row["measured_iter_s"] == 3.52802
    assert row["error_pct"] == pytest.approx(100 * (row["predicted_iter_s"] / 3.52802 - 1))
    counted = [
        abs(row["error_pct"])
        for key, row in rows.items()
        if row["error_pct"] is not None and not key.startswith("simumax")  # read off a plot
    ]
    assert document["summary"]["n"] == len(counted) == 20
    assert document["summary"]["time_mape"] == pytest.approx(sum(counted) / len(counted))
    assert document["sweeps"][0]["n"] == 6


def test_a_prediction_is_the_sum_of_its_parts_and_memory_is_what_the_allocator_sees(small: Validation) -> None:
    """All but the context and the communicators; of a trainer that counts tensors, but blocks' unused bytes too."""
    predicted = [(o.case, o.prediction) for o in small.outcomes if o.prediction is not None]
    assert len(predicted) == 23
    assert {case.software.counts_tensors for case, _ in predicted if case is not None} == {False, True}
    for case, prediction in predicted:
        assert case is not None
        assert sum(prediction.breakdown_seconds.values()) == pytest.approx(prediction.step_seconds)
        items = prediction.memory_bytes
        assert sum(items.values()) == pytest.approx(prediction.peak_memory_bytes)
        outside = items["context"] + items["communicators"]
        if case.software.counts_tensors:
            outside += items["allocator_slack"]
        assert prediction.allocated_bytes == pytest.approx(prediction.peak_memory_bytes - outside)


def test_memory_is_in_the_unit_of_the_row(small: Validation) -> None:
    by_id = {o.id: o for o in small.outcomes}
    for key, unit in (("tt_t1_compile", 2**30), ("zb_1F1B_1.5B_m24", 1e9)):
        o = by_id[key]
        assert o.prediction is not None
        assert o.predicted_memory == pytest.approx(o.prediction.allocated_bytes / unit)


def test_recomputation_that_is_not_stated_is_the_least_that_fits(tmp_path: Path) -> None:
    facts = load_run_facts()
    cells = {"recompute": "", "tp": "1", "pp": "1", "dp": "8", "micro_batch": "4", "layers": "24"}
    case = case_of(load_published_runs(write_runs(tmp_path / "runs.csv", cells))[0], facts)
    hardware = facts.catalogue.hardware[case.hardware]
    peaks = {mode: predict(replace(case, recompute=mode), hardware).peak_memory_bytes for mode in ("none", "full")}
    assert peaks["full"] < peaks["none"]
    for room, mode in ((peaks["none"], "none"), (peaks["full"], "full"), (1.0, "full")):
        tight = replace(case, cluster=replace(case.cluster, memory_bytes=room * (1 + 1e-9)))
        assert predict(tight, hardware).recompute == mode


def test_the_null_model_knows_of_recomputation(tmp_path: Path) -> None:
    """At peak: 24 layers of 12 h² and 4 s h a token, three times forward's FLOPs and one more for what recomputes."""
    cells = [{"recompute": mode} for mode in ("none", "selective", "full")]
    plain, selective, full = validate(write_runs(tmp_path / "runs.csv", *cells)).outcomes
    tokens, h, s, rate = 32 * 1024, 2048, 1024, 8 * 312e12
    layers, attention, head = 24 * 24.0 * h * h, 24 * 4.0 * s * h, 2.0 * 51200 * h
    forward = tokens * (layers + attention + head) / rate
    assert plain.ideal_seconds == pytest.approx(3 * forward)
    assert selective.ideal_seconds == pytest.approx(3 * forward + tokens * attention / rate)
    assert full.ideal_seconds == pytest.approx(3 * forward + tokens * (layers + attention) / rate)
    assert full.mfu == plain.mfu == pytest.approx(3 * forward / 1.5)


def test_warnings_name_what_stands_in(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv", {"software": "ours-2022"}, {"software": "ours-2022"}, {})
    assert validate(path).warnings == ("software ours-2022 is not in the catalogue: megatron-2021 stands in for it",)


def test_nothing_but_a_header_is_no_rows(tmp_path: Path) -> None:
    document = validate(write_runs(tmp_path / "runs.csv")).to_dict()
    assert document["rows"] == []
    assert document["summary"]["time_mape"] is None


# ---- free constants ----------------------------------------------------------------------------------------------


def test_free_constants_are_the_nominal_figures_that_a_case_uses(tmp_path: Path) -> None:
    facts = load_run_facts()
    run = load_published_runs(write_runs(tmp_path / "runs.csv", {}))[0]
    found = free_constants([case_of(run, facts)], facts.catalogue.hardware)
    profile = facts.catalogue.hardware["a100-sxm-80gb"]
    assert "a100-sxm-80gb: memory_bandwidth_bytes_per_second" in found
    assert not any("overlap" in name for name in found)  # published
    assert "a100-sxm-80gb: fp16 attention forward" in found
    assert not any("bf16" in name for name in found)  # the case is fp16
    named = {name.partition(": ")[2] for name in found if name.startswith("a100")}
    assert {name for name in named if "attention" not in name} == {
        name
        for name, source in profile.provenance.items()
        if str(source).startswith("nominal") and name != "host_link"  # nothing that was published offloads
    }
    assert free_constants([case_of(run, facts)] * 2, facts.catalogue.hardware) == found


# ---- our own runs ------------------------------------------------------------------------------------------------


def run_folder(folder: Path, step_seconds: float = 2.0) -> Path:
    folder.mkdir(parents=True)
    pins = ("tp=1", "pp=1", "dp=1", "micro_batch=1", "recompute=full")
    question = ask("gpt2", "dgx-a100:1", 1, 256, devices=1, precision="bf16", pins=pins)
    save(search(question), folder / "plan.yaml")
    record = {
        "schema": SCHEMA,
        "host": "here",
        "date": "2026-11-24",
        "predicted": {"step_seconds": 1.5, "peak_memory_bytes": 3e9},
        "measured": {
            "rank": 0,
            "step_seconds": step_seconds,
            "peak_memory_bytes": 4e9,
            "parts": dict.fromkeys(("compute", "tp", "pp_bubble", "dp_exposed", "optimizer", "other"), 0.1),
        },
    }
    (folder / RECORD_FILE).write_text(yaml.safe_dump(record))
    return folder


def test_a_run_folder_is_a_row_and_so_is_each_folder_in_a_folder(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "runs" / "a")
    run_folder(tmp_path / "runs" / "b", step_seconds=3.0)
    (tmp_path / "runs" / "unfinished").mkdir()
    (row,) = validate(one).to_dict()["rows"]
    assert row == {
        "id": "a",
        "measured_iter_s": 2.0,
        "predicted_iter_s": 1.5,
        "error_pct": -25.0,
        "measured_peak_mem_GB": 4.0,
        "predicted_peak_mem_GB": 3.0,
        "skipped": None,
    }
    both = validate(tmp_path / "runs").to_dict()
    assert [row["id"] for row in both["rows"]] == ["a", "b"]
    assert both["summary"] == {
        "n": 2,
        "skipped": 0,
        "time_mape": pytest.approx(37.5),
        "time_median_ape": pytest.approx(37.5),
        "memory_mape": pytest.approx(25.0),
        "null_mape": None,
    }


def test_a_folder_without_runs_and_a_broken_record_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as info:
        validate(tmp_path)
    assert info.value.what == f"no finished run in {tmp_path}"
    folder = run_folder(tmp_path / "a")
    document = yaml.safe_load((folder / RECORD_FILE).read_text())
    del document["predicted"]["step_seconds"]
    (folder / RECORD_FILE).write_text(yaml.safe_dump(document))
    with pytest.raises(InputError) as info:
        validate(folder)
    assert info.value.what == "the key predicted.step_seconds is missing"
    shutil.rmtree(folder)


# ---- the report --------------------------------------------------------------------------------------------------


def text(validation: Validation, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    console.print(validation_report(validation))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_the_report_as_text() -> None:
    base = Outcome(id="", source="arXiv:2104.04473 Table 2", gpu="A100", ideal_seconds=0.9, mfu=0.4)
    q = {"sweep": "a question", "derived": True}
    rows = [
        replace(base, id="r0", measured_seconds=2.0, predicted_seconds=1.9, layout="tp2", **q),
        replace(base, id="r1", measured_seconds=2.5, predicted_seconds=2.0, layout="tp4", **q),
        replace(base, id="r2", measured_seconds=3.0, predicted_seconds=3.3, layout="tp8", **q),
        replace(base, id="r3", measured_seconds=3.5, predicted_seconds=4.2, layout="pp2", mfu=0.05, **q),
        replace(base, id="r4", measured_seconds=1.8, predicted_seconds=2.1, layout="pp4", layout_stated=False, **q),
        replace(
            base,
            id="r5",
            source="SimuMax assets/A100-Pcie.png",
            measured_memory=40.0,
            predicted_memory=44.0,
            measured_seconds=4.0,
            predicted_seconds=4.0,
        ),
        replace(base, id="r6", measured_seconds=1.0, predicted_seconds=9.0, unfit="from memory"),
        replace(base, id="r7", skipped="tp or pp not stated", measured_seconds=1.0),
        replace(base, id="r8", predicted_seconds=1.0),
    ]
    constants = ("a100: launch_seconds", "a100: context_bytes", "dgx: network latency")
    found = Validation(tuple(rows), constants, {"A100": 0.45}, ("software x-2020 is not known",))
    assert text(found) == (Path(__file__).parent / "data" / "published_runs" / "report.txt").read_text().rstrip("\n")


def test_a_report_of_records_says_nothing_of_groups_and_constants(tmp_path: Path) -> None:
    shown = text(validate(run_folder(tmp_path / "a")))
    assert "a          2        1.5  -25.0%       4          3  -25.0%" in shown
    assert "here, our own runs     1  25.0%" in shown
    assert "free constants" not in shown
    assert "held out" not in shown


def test_no_figure_of_the_small_file_is_cut(small: Validation) -> None:
    for width in (80, 120):
        shown = text(small, width)
        assert "…" not in shown
        assert "free constants in the whole model" in " ".join(shown.split())
