"""Every n-th case of a long list in `make test`, all of them in `make test-full`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(nth: int, cases: Iterable[Any]) -> list[Any]:
    """Parameters for pytest: all cases, but those between every `nth` marked `full`."""
    return [pytest.param(case, marks=[pytest.mark.full] if place % nth else []) for place, case in enumerate(cases)]
