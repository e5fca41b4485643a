"""Published training runs: a CSV of measured configurations as frozen rows; a blank is what was not stated."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .input_error import InputError
from .store import read_text

RECOMPUTE = ("none", "selective", "full")
_TRUE_OR_FALSE = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One measured configuration, its fields named as the columns; None is what the source did not state.

    Bandwidths are nominal, of one direction, inside a node and per GPU between nodes. `vpp` is model chunks per
    pipeline rank, `recompute` "selective" is the attention core's. `micro_batch` and `global_batch` count
    sequences. Peak memory is the largest over the ranks. `notes` say where the figures are from and what is odd.
    """

    id: str
    source: str
    gpu: str
    num_gpus: int | None
    gpus_per_node: int | None
    intra_bw_GBps: float | None
    inter_bw_GBps_per_gpu: float | None
    model_name: str
    layers: int | None
    hidden: int | None
    ffn: int | None
    heads: int | None
    kv_heads: int | None
    vocab: int | None
    seq: int | None
    experts: int | None
    topk: int | None
    params_B: float | None
    software: str
    precision: str
    tp: int | None
    pp: int | None
    vpp: int | None
    dp: int | None
    ep: int | None
    cp: int | None
    sp: bool | None
    zero_stage: int | None
    dist_opt: bool | None
    recompute: str | None
    micro_batch: int | None
    global_batch: int | None
    measured_iter_s: float | None
    measured_tflops_per_gpu: float | None
    measured_mfu: float | None
    measured_tok_s_gpu: float | None
    measured_peak_mem_GB: float | None
    notes: str

    # ---- what the notes say of the figures -----------------------------------------------------------------

    @property
    def derived(self) -> bool:
        """Whether the seconds were computed from another printed figure."""
        return "derived" in self.notes.lower()

    @property
    def unfit(self) -> str:
        """Why the figures are too weak to score by, "" where they are not."""
        said = self.notes.lower()
        for words, reason in _UNFIT.items():
            if any(word in said for word in words):
                return reason
        return ""

    @property
    def memory_unit_bytes(self) -> float:
        """What one unit of `measured_peak_mem_GB` is: a GiB where the notes say so."""
        return 2.0**30 if "[gib]" in self.notes.lower() else 1e9

    @property
    def measured_seconds(self) -> float | None:
        """Seconds of a step, from tokens per second where only those are stated."""
        if self.measured_iter_s is not None:
            return self.measured_iter_s
        rate = self.measured_tok_s_gpu
        if rate is None or self.global_batch is None or self.seq is None or self.num_gpus is None:
            return None
        return self.global_batch * self.seq / (rate * self.num_gpus)


# Words of the notes -> why a row is predicted and printed but not scored.
_UNFIT = {
    ("from-memory", "from memory"): "from memory",
    ("digitized", "digitised", "read by eye"): "read off a plot",
    ("inconsistent",): "inconsistent",
}


# ---- reading ---------------------------------------------------------------------------------------------------


class _Cell:
    """One cell under check; errors name file, line and column."""

    def __init__(self, source: str, line: int, column: str, text: str) -> None:
        self._where, self._column, self._text = f"{source}: line {line}, column {column}", column, text

    def fail(self, expected: str) -> InputError:
        shown = self._text if len(self._text) <= 80 else self._text[:77] + "..."
        return InputError(
            f"{self._column} has a value that cannot be used", where=self._where, expected=expected, got=repr(shown)
        )

    def text(self) -> str:
        return self._text

    def name(self) -> str:
        if not self._text:
            raise self.fail("text")
        return self._text

    def number(self) -> float | None:
        if not self._text:
            return None
        try:
            value = float(self._text)
        except ValueError:
            raise self.fail("a finite number > 0, or nothing") from None
        if not math.isfinite(value) or value <= 0:
            raise self.fail("a finite number > 0, or nothing")
        return value

    def _whole(self, minimum: int) -> int | None:
        if not self._text:
            return None
        try:
            value = float(self._text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value != int(value) or not minimum <= value < 2**53:
            raise self.fail(f"a whole number >= {minimum}, or nothing")
        return int(value)

    def count(self) -> int | None:
        return self._whole(1)

    def level(self) -> int | None:
        return self._whole(0)

    def boolean(self) -> bool | None:
        if not self._text:
            return None
        if self._text.lower() not in _TRUE_OR_FALSE:
            raise self.fail("true or false, or nothing")
        return _TRUE_OR_FALSE[self._text.lower()]

    def recompute(self) -> str | None:
        if not self._text:
            return None
        if self._text not in RECOMPUTE:
            raise self.fail("one of " + ", ".join(RECOMPUTE) + ", or nothing")
        return self._text


_READERS: dict[str, Callable[[_Cell], Any]] = {
    "int | None": _Cell.count,
    "float | None": _Cell.number,
    "bool | None": _Cell.boolean,
    "str | None": _Cell.recompute,
    "str": _Cell.text,
}
_COLUMNS: dict[str, Callable[[_Cell], Any]] = {f.name: _READERS[str(f.type)] for f in fields(PublishedRun)} | {
    "id": _Cell.name,
    "source": _Cell.name,
    "zero_stage": _Cell.level,
}


def load_published_runs(path: Path) -> tuple[PublishedRun, ...]:
    """The rows of the CSV file; an InputError names file, line and column of whatever is wrong."""
    source = str(path)
    lines = csv.reader(io.StringIO(read_text(path, "runs CSV")), strict=True)
    try:
        header = next(lines, None)
        _check_header(header or [], source)
        assert header is not None
        return _rows(header, lines, source)
    except csv.Error as error:
        raise InputError(
            f"{source} is not valid CSV", where=f"{source}: line {lines.line_num}", got=str(error), expected="CSV"
        ) from None


def _rows(header: list[str], lines: Any, source: str) -> tuple[PublishedRun, ...]:
    rows: list[PublishedRun] = []
    seen: dict[str, int] = {}
    for cells in lines:
        line = lines.line_num
        if not cells:  # an empty line
            continue
        if len(cells) != len(header):
            raise InputError(
                "a row is not as long as the header",
                where=f"{source}: line {line}",
                expected=f"{len(header)} cells",
                got=f"{len(cells)} cells",
                hint="a comma inside a cell needs quotes around the cell",
            )
        values = {
            column: _COLUMNS[column](_Cell(source, line, column, text.strip()))
            for column, text in zip(header, cells, strict=True)
        }
        row = PublishedRun(**values)
        if row.id in seen:
            raise InputError(
                f"the id {row.id} occurs twice",
                where=f"{source}: line {line}, column id",
                expected="an id that no other row has",
                got=f"that of line {seen[row.id]}",
            )
        seen[row.id] = line
        rows.append(row)
    return tuple(rows)


def _check_header(header: Sequence[str], source: str) -> None:
    """Raise an InputError unless every column is there once and no other is."""
    where = f"{source}: line 1"
    unknown = [column for column in header if column not in _COLUMNS]
    missing = [column for column in _COLUMNS if column not in header]
    twice = [column for column in _COLUMNS if header.count(column) > 1]
    if unknown:
        near = difflib.get_close_matches(unknown[0], missing, 1)
        raise InputError(
            f"unknown column {unknown[0]}",
            where=where,
            expected="columns " + ", ".join(_COLUMNS),
            got=", ".join(unknown),
            hint=f"is {near[0]} meant?" if near else "remove it",
        )
    if missing:
        got = f"{len(header)} columns" if header else "an empty file"
        raise InputError(
            f"the column {missing[0]} is missing",
            where=where,
            expected=", ".join(missing),
            got=got,
            hint="its first line names the columns, separated by commas",
        )
    if twice:
        raise InputError(f"the column {twice[0]} occurs twice", where=where, expected="each column once", got=twice[0])
