"""Timing where ranks share cores: what a rank waits for its turn is not what it computes."""

from __future__ import annotations

import time

import pytest
import torch

from profiles.probes.timing import Rank, time_alone, time_together


def this_rank(ranks_per_core: float = 1.0) -> Rank:
    return Rank(0, 4, torch.device("cpu"), effort_seconds=0.02, ranks_per_core=ranks_per_core)


def nap() -> None:
    time.sleep(2e-3)


def spin() -> None:
    end = time.process_time() + 1e-3
    while time.process_time() < end:
        pass


def test_what_only_computes_is_timed_by_the_processor() -> None:
    assert time_alone(this_rank(2.0), nap).seconds < 1e-3 < 2e-3 <= time_alone(this_rank(), nap).seconds


def test_ranks_that_share_a_core_take_turns() -> None:
    assert time_alone(this_rank(3.0), spin).seconds == pytest.approx(3e-3, rel=0.05)


def test_what_ranks_do_together_is_timed_by_the_clock() -> None:
    assert time_together(this_rank(2.0), nap).seconds >= 2e-3
