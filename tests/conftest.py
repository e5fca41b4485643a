"""Tests marked `full` run in `make test-full` alone, so that `make test` keeps its twelve minutes."""

from __future__ import annotations

import sys

import pytest

from tests.thinned import FULL

pytest.register_assert_rewrite("tests.distributed.layout_runs")  # so that what differs is shown


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full") is not None and not FULL:
            item.add_marker(pytest.mark.skip(reason="takes long: runs in make test-full"))


@pytest.hookimpl(tryfirst=True)  # before the fixtures of modules
def pytest_runtest_setup() -> None:
    """One thread for torch where it is imported: small tensors gain nothing from more, and beside other processes every
    operation would wait for a thread that has no core; a plain loop of experts then takes seventy times as long."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
