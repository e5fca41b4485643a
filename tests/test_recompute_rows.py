"""Rows for what a rank's memory makes it recompute: below every point, and through the corners of their hull."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.linear_program import LinearProgram
from planner.recompute_rows import write_recompute


def least_allowed(least: list[float], layers: float, seconds: tuple[float, ...] = (0.0, 1.0)) -> float:
    """Seconds of recomputation that so many layers, or fractions of them, have by the rows and by their modes."""
    linear = LinearProgram()
    number, used = linear.column("layers"), [linear.column(f"mode_{n}") for n in range(len(seconds))]
    write_recompute(linear, "rank", number, dict(zip(used, seconds, strict=True)), least)
    rows, found = linear.rows(), min(seconds) * layers
    for row, start in enumerate(rows.starts):
        end = [*rows.starts, len(rows.columns)][row + 1]
        factors = dict(zip(rows.columns[start:end], rows.factors[start:end], strict=True))
        slope = -factors.pop(number)
        # The row is in units of the dearest mode.
        assert factors == pytest.approx({c: each / max(seconds) for c, each in zip(used, seconds, strict=True) if each})
        found = max(found, (rows.least[row] + slope * layers) * max(seconds))
    return found


def test_a_layer_recomputes_whole_or_not_at_all() -> None:
    """Up to three layers fit, a fourth and a fifth make one recompute each: so does every fraction in between."""
    least = [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]
    for layers in (0.0, 2.5, 3.0, 3.5, 4.0, 5.0):
        assert least_allowed(least, layers) == pytest.approx(max(0.0, layers - 3), abs=1e-8)


def test_where_another_layer_takes_less_the_rows_go_past_it() -> None:
    """A third layer adds 2 s and a fourth nothing: fractions may lie on the line between the second and the fourth."""
    least = [0.0, 0.0, 0.0, 2.0, 2.0]
    assert least_allowed(least, 3.0, (0.0, 2.0)) == pytest.approx(1.0)
    assert least_allowed(least, 4.0, (0.0, 2.0)) == pytest.approx(2.0)


def test_one_mode_needs_no_row() -> None:
    linear = LinearProgram()
    number, used = linear.column("layers"), linear.column("mode")
    write_recompute(linear, "rank", number, {used: 2.0}, [0.0, 2.0, 4.0, 6.0])
    write_recompute(linear, "other", number, {used: 0.0}, [0.0, 0.0])
    assert linear.number_of_rows == 0


@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=12))
def test_no_number_of_layers_is_ruled_out(steps: list[float]) -> None:
    least = [sum(steps[:n]) for n in range(len(steps))]
    for layers, seconds in enumerate(least):
        assert least_allowed(least, float(layers)) <= seconds * (1 + 1e-12) + 1e-12
    # The ends are corners of any hull.
    assert least_allowed(least, float(len(least) - 1)) == pytest.approx(least[-1], abs=1e-7)
