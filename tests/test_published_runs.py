"""Reading published runs: every column, and an error with line and column for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.input_error import InputError
from profiles.published_runs import load_published_runs

from .published import COLUMNS, SMALL, write_runs


def one(tmp_path: Path, **cells: str):
    return load_published_runs(write_runs(tmp_path / "runs.csv", cells))[0]


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as info:
        load_published_runs(path)
    return info.value


def test_each_cell_has_its_kind_and_a_blank_is_none(tmp_path: Path) -> None:
    run = one(tmp_path, sp="TRUE", zero_stage="0", measured_iter_s="1e-1", vpp="", recompute="", sp_="x")
    assert (run.tp, run.sp, run.zero_stage, run.measured_iter_s) == (2, True, 0, 0.1)
    assert (run.vpp, run.recompute, run.measured_mfu) == (None, None, None)
    assert run.notes == ""


def test_the_small_file_is_read_whole() -> None:
    runs = load_published_runs(SMALL)
    assert len(runs) == 26
    by_id = {run.id: run for run in runs}
    assert by_id["sc21_t1_76.1B"].vpp == 3
    assert by_id["sc21_t1_76.1B"].derived
    assert by_id["simumax_a100pcie_deepseekv2_ep8_mbc4"].unfit == "read off a plot"
    assert by_id["tt_t1_compile"].memory_unit_bytes == 2**30
    assert by_id["zb_1F1B_1.5B_m24"].memory_unit_bytes == 1e9


@pytest.mark.parametrize(
    ("notes", "unfit"),
    [
        ("from-memory", "from memory"),
        ("unverified, from memory", "from memory"),
        ("Digitized from figure 3", "read off a plot"),
        ("INCONSISTENT with table 2", "inconsistent"),
        ("peak memory is max over stages", ""),
    ],
)
def test_what_is_too_weak_to_score_by(tmp_path: Path, notes: str, unfit: str) -> None:
    assert one(tmp_path, notes=notes).unfit == unfit


def test_seconds_come_from_tokens_per_second_where_only_those_are_stated(tmp_path: Path) -> None:
    run = one(tmp_path, measured_iter_s="", measured_tok_s_gpu="2048")
    assert run.measured_seconds == 32 * 1024 / (2048 * 8)
    assert one(tmp_path, measured_iter_s="", measured_tok_s_gpu="2048", global_batch="").measured_seconds is None


BAD_CELLS = {
    "no number": ({"layers": "many"}, "column layers", "a whole number >= 1, or nothing", "'many'"),
    "a fraction": ({"tp": "1.5"}, "column tp", "a whole number >= 1, or nothing", "'1.5'"),
    "nothing of it": ({"dp": "0"}, "column dp", "a whole number >= 1, or nothing", "'0'"),
    "a level below zero": ({"zero_stage": "-1"}, "column zero_stage", "a whole number >= 0, or nothing", "'-1'"),
    "not finite": ({"measured_iter_s": "nan"}, "column measured_iter_s", "a finite number > 0, or nothing", "'nan'"),
    "endless": ({"layers": "1e400"}, "column layers", "a whole number >= 1, or nothing", "'1e400'"),
    "negative seconds": ({"measured_iter_s": "-2"}, "column measured_iter_s", "a finite number > 0", "'-2'"),
    "neither true nor false": ({"sp": "maybe"}, "column sp", "true or false, or nothing", "'maybe'"),
    "unknown recompute": ({"recompute": "half"}, "column recompute", "one of none, selective, full", "'half'"),
    "no id": ({"id": ""}, "column id", "text", "''"),
    "no source": ({"source": " "}, "column source", "text", "''"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_bad_cell_is_named_by_line_and_column(tmp_path: Path, name: str) -> None:
    cells, where, expected, got = BAD_CELLS[name]
    path = write_runs(tmp_path / "runs.csv", {}, cells)
    error = refused(path)
    assert error.where == f"{path}: line 3, {where}"
    assert error.expected.startswith(expected)
    assert error.got == got


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    assert "does not exist" in refused(path).what
    path.write_text("")
    assert refused(path).what == "the column id is missing"
    path.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(path).what
    write_runs(path, {}, columns=[c for c in COLUMNS if c != "heads"])
    assert (refused(path).what, refused(path).where) == ("the column heads is missing", f"{path}: line 1")
    write_runs(path, {}, columns=["head" if c == "heads" else c for c in COLUMNS])
    assert (refused(path).what, refused(path).hint) == ("unknown column head", "is heads meant?")
    write_runs(path, {}, columns=[*COLUMNS, "tp"])
    assert refused(path).what == "the column tp occurs twice"
    write_runs(path, {"id": "a"}, {"id": "a"})
    assert (refused(path).what, refused(path).got) == ("the id a occurs twice", "that of line 2")
    path.write_text(write_runs(path, {}).read_text() + "1,2\n")
    assert (refused(path).where, refused(path).got) == (f"{path}: line 3", "2 cells")
    path.write_text(",".join(COLUMNS) + '\n"a,b\n')
    assert "is not valid CSV" in refused(path).what
