"""Predicted bytes of a rank beside those that the runtime allocates: the tensors of its peak, within 3 %."""

from __future__ import annotations

from functools import partial

import pytest

from tests.distributed.memory_cases import CASES, Compared, compare, in_child, run
from tests.thinned import FULL, every

TOLERANCE = 0.03
# What nothing but its part is booked under, and the model has to the byte (norms' statistics and scalars aside).
EXACT = 0.001
NAMES = every(2, CASES, first=1)


@pytest.fixture(scope="module")
def results() -> dict[str, Compared]:
    chosen = [str(name.values[0]) for name in NAMES if FULL or not name.marks]
    return dict(zip(chosen, in_child(compare, [CASES[name] for name in chosen]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_what_the_model_says(results: dict[str, Compared], name: str) -> None:
    result = results[name]
    assert result.predicted_bytes == pytest.approx(result.measured_bytes, rel=TOLERANCE)
    for part in ("weights", "optimizer", "pipeline_buffers"):
        assert result.predicted[part] == pytest.approx(result.measured.get(part, 0), rel=EXACT), part


@pytest.mark.parametrize("name", ["gpt2 fp32 dp8 zero3"])
def test_fake_tensors_are_counted_as_real_ones(results: dict[str, Compared], name: str) -> None:
    (real,) = in_child(partial(run, fake=False), [CASES[name]])
    assert real.parts == results[name].measured
