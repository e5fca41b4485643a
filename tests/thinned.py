"""Every n-th case of a long list in `make test`, all of them in `make test-full`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(nth: int, cases: Iterable[Any], *, first: int = 0) -> list[Any]:
    """Parameters for pytest, a tuple being several: all cases, but those between every `nth` marked `full`."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if place % nth == first else [pytest.mark.full]
        )
        for place, case in enumerate(cases)
    ]
