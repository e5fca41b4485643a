"""What `make test` runs of what `make test-full` runs: every n-th case, fewer random examples."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

FULL = os.environ.get("MESHWRIGHT_FULL_TESTS") == "1"
HEALTH_CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
HEALTH_CHECKS += [HealthCheck.large_base_example, HealthCheck.function_scoped_fixture]


def examples(number: int, full_share: int, *, shrink: bool = True) -> settings:
    """The same `number` of random questions every time, slow or not, and `full_share` times as many in the full run.

    Without `shrink` what fails is shrunk in the full run alone.
    """
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=number * (full_share if FULL else 1),
        suppress_health_check=HEALTH_CHECKS,
        phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if FULL or shrink else [])),
    )


def every(nth: int, cases: Iterable[Any], *, first: int = 0) -> list[Any]:
    """Parameters for pytest, a tuple being several: all cases, but those between every `nth` marked `full`."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if place % nth == first else [pytest.mark.full]
        )
        for place, case in enumerate(cases)
    ]
