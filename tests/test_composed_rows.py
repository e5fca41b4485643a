"""Seconds that lie on a line in the microbatches to the last digit were put together, not measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.composed_rows import linearity
from profiles.published_runs import load_published_runs

from .published import write_runs


def rows(source: str, seconds: tuple[float, ...]) -> list[dict[str, str]]:
    """FULL with 2, 4, 8 and so on microbatches of 2 sequences over dp 2."""
    return [
        {"id": f"{source}{n}", "source": source, "global_batch": str(8 * 2**n), "measured_iter_s": str(each)}
        for n, each in enumerate(seconds)
    ]


def test_rows_on_a_line_were_composed(tmp_path: Path) -> None:
    line = tuple(0.1 + 0.25 * 2**n for n in range(4))
    noisy = (line[0], line[1] * 1.004, line[2], line[3])
    path = write_runs(tmp_path / "runs.csv", *rows("line", line), *rows("clock", noisy), *rows("short", line[:2]))
    found = {each.source: each for each in linearity(load_published_runs(path))}
    assert set(found) == {"line", "clock"}  # two points are always on a line
    assert (found["line"].rows, found["line"].groups, found["line"].composed) == (4, 1, True)
    assert not found["clock"].composed
    assert found["clock"].deviation == pytest.approx(1 - 1 / 1.004)


def test_rows_of_other_layouts_are_no_group(tmp_path: Path) -> None:
    apart = [
        row | {"tp": tp, "num_gpus": str(4 * int(tp))} for tp, row in zip("124", rows("a", (1, 2, 3)), strict=True)
    ]
    assert linearity(load_published_runs(write_runs(tmp_path / "runs.csv", *apart))) == ()
