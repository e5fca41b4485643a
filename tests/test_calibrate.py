"""Measured runs correct a profile part by part: the factors by hand, points untouched, bad records named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.calibrate import calibrate, predicted_parts
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import save
from planner.record import RunRecord, load_record
from profiles.input_error import InputError
from tests.oracles.small_world import small_hardware
from tests.plans import make_plan, tiny_llama

HARDWARE = small_hardware(microbatch_overhead_seconds=0.0)
PARTS = dict.fromkeys(("compute", "tp", "pp_bubble", "dp_exposed", "optimizer", "other"), 0.0)


def record(layout: Layout, slower: dict[str, float], step_seconds: float = 1e-9) -> RunRecord:
    """A run of `layout` in which each part took `slower` times (1 by default) what HARDWARE says."""
    plan = make_plan(tiny_llama(), layout, TrainingJob(global_batch=8, sequence=16, precision="fp32"))
    empty = RunRecord(Path("runs/x"), plan, "host", "2026-01-01", 0, step_seconds, {}, {})
    found = {part: seconds * slower.get(part, 1.0) for part, seconds in predicted_parts(HARDWARE, empty).items()}
    parts = PARTS | {"tp": found["tp"], "dp_exposed": found["dp"], "optimizer": found["optimizer"]}
    return replace(empty, parts=parts, kernels={kind: found[kind] for kind in ("gemm", "attention", "memory")})


def test_each_part_gets_the_factor_it_was_slower_by() -> None:
    corrected, rows = calibrate(HARDWARE, [record(Layout(tp=2, dp=2), {"gemm": 1.5, "tp": 3.0, "optimizer": 0.5})])
    assert corrected.corrections == pytest.approx(
        {"gemm": 1.5, "attention": 1.0, "memory": 1.0, "tp": 3.0, "dp": 1.0, "optimizer": 0.5}
    )
    assert [row.part for row in rows] == list(corrected.corrections)
    assert rows[0].measured_seconds == pytest.approx(1.5 * rows[0].predicted_seconds)
    shape = ("forward", "fp32", 64, 64, 64)
    assert corrected.gemm_seconds(*shape) == pytest.approx(1.5 * HARDWARE.gemm_seconds(*shape))


def test_the_prediction_of_the_run_becomes_what_it_measured() -> None:
    run = record(Layout(tp=2, dp=2), {"gemm": 1.3, "dp": 2.0, "memory": 1.7})
    corrected, _ = calibrate(HARDWARE, [run])
    after = predicted_parts(corrected, run)
    assert after["gemm"] == pytest.approx(run.kernels["gemm"], rel=1e-3)
    assert after["memory"] == pytest.approx(run.kernels["memory"], rel=1e-3)
    assert after["dp"] == pytest.approx(run.parts["dp_exposed"], rel=1e-3)


def test_several_runs_count_by_their_median_and_a_second_time_changes_nothing() -> None:
    runs = [record(Layout(dp=2), {"gemm": factor}) for factor in (1.1, 1.2, 2.0)]
    once, _ = calibrate(HARDWARE, runs)
    assert once.corrections["gemm"] == pytest.approx(1.2)
    twice, rows = calibrate(once, runs)
    assert twice.corrections == once.corrections
    assert (rows[0].before, rows[0].after) == (once.corrections["gemm"], once.corrections["gemm"])
    assert twice.gemm == HARDWARE.gemm
    assert [note["before"] for note in twice.provenance["calibrations"]] == [{}, once.corrections]


def test_a_part_that_the_run_hardly_has_is_left_alone() -> None:
    long_step = sum(predicted_parts(HARDWARE, record(Layout(dp=2), {})).values()) * 1000
    corrected, rows = calibrate(HARDWARE, [record(Layout(dp=2), {"gemm": 2.0}, step_seconds=long_step)])
    assert (corrected.corrections, rows) == ({}, [])


def test_a_pipeline_stage_is_priced_as_its_own() -> None:
    """Rank 1 of pp=2 is the last stage: its head's products are in, the embedding is not."""
    plan = make_plan(tiny_llama(), Layout(pp=2), TrainingJob(global_batch=8, sequence=16, precision="fp32"))
    first = RunRecord(Path(), plan, "", "", 0, 1.0, PARTS, {})
    last = replace(first, rank=1)
    assert (first.stages, last.stages) == ((0,), (1,))
    assert predicted_parts(HARDWARE, last)["gemm"] > predicted_parts(HARDWARE, first)["gemm"]


def test_all_chunks_of_a_rank_are_its_parts() -> None:
    """pp=2 with two chunks: both ranks together have what one device has."""
    job = TrainingJob(global_batch=8, sequence=16, precision="fp32")
    chunked = make_plan(tiny_llama(), Layout(pp=2, schedule="interleaved-1f1b", virtual_stages=2), job)
    alone = make_plan(tiny_llama(), Layout(), job)
    ranks = [predicted_parts(HARDWARE, RunRecord(Path(), chunked, "", "", rank, 1.0, PARTS, {})) for rank in (0, 1)]
    whole = predicted_parts(HARDWARE, RunRecord(Path(), alone, "", "", 0, 1.0, PARTS, {}))
    for kernel in ("gemm", "attention", "memory"):
        assert sum(parts[kernel] for parts in ranks) == pytest.approx(whole[kernel])


# ---- records ---------------------------------------------------------------------------------------------------


def written(folder: Path, **measured: Any) -> Path:
    run = record(Layout(dp=2), {})
    save(run.plan, folder / "plan.yaml")
    fields = {"step_seconds": 1.0, "rank": 1, "parts": PARTS, "kernels": {"gemm": 0.5}}
    document = {"schema": "meshwright.record/v1", "host": "h", "date": "d", "measured": fields | measured}
    (folder / "record.yaml").write_text(yaml.safe_dump(document))
    return folder


def test_a_record_is_read_back(tmp_path: Path) -> None:
    found = load_record(written(tmp_path))
    assert (found.rank, found.stages, found.kernels) == (1, (0,), {"gemm": 0.5})


@pytest.mark.parametrize(
    ("measured", "where"),
    [
        ({"rank": 2}, "measured.rank"),
        ({"step_seconds": 0}, "measured.step_seconds"),
        ({"parts": {"compute": 1.0}}, "measured.parts"),
        ({"kernels": {"gemm": -1.0}}, "measured.kernels.gemm"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_key(tmp_path: Path, measured: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        load_record(written(tmp_path, **measured))
    assert f"{tmp_path}/record.yaml: {where}" in dict(caught.value.lines())["where"]


def test_runs_that_cannot_calibrate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        load_record(tmp_path / "nowhere")
    with pytest.raises(InputError, match="did not time its kernels"):
        calibrate(HARDWARE, [replace(record(Layout(dp=2), {}), kernels={})])
    with pytest.raises(InputError, match="no runs"):
        calibrate(HARDWARE, [])
