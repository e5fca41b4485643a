"""Capabilities: the table says nothing that a plan file cannot."""

from __future__ import annotations

from planner.capabilities import CAPABILITIES
from planner.layout import SCHEDULES


def test_the_capabilities_are_words_of_the_plan_file() -> None:
    for capabilities in CAPABILITIES.values():
        assert set(capabilities.schedules) <= set(SCHEDULES)
