"""Tests marked `full` run in `make test-full` alone, so that `make test` keeps its twelve minutes."""

from __future__ import annotations

import pytest

from tests.thinned import FULL

pytest.register_assert_rewrite("tests.distributed.layout_runs")  # so that what differs is shown


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full") is not None and not FULL:
            item.add_marker(pytest.mark.skip(reason="takes long: runs in make test-full"))
