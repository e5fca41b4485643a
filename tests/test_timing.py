"""Timing where ranks share cores: what a rank waits for its turn is not what it computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from profiles.probes import timing
from profiles.probes.timing import Rank, time_alone, time_host, time_together


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


def test_what_scatters_is_timed_for_as_long_as_patience_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the actions move: a busy machine makes naps uneven."""
    calls: list[float] = []
    now = 0.0

    def uneven() -> None:
        calls.append(1e-2 if len(calls) % 9 == 0 else 2e-4)
        pass_by(calls[-1])

    def even() -> None:
        calls.append(1e-3)
        pass_by(calls[-1])

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    def clock() -> float:
        return now

    def times(action: Callable[[], None], patience_seconds: float) -> int:
        calls.clear()
        time_together(replace(this_rank(), patience_seconds=patience_seconds), action)
        return len(calls)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(timing, "_sample", partial(timing._sample, clock=clock))
    few = times(uneven, 0.0)
    assert times(uneven, 0.5) > 2 * few
    assert times(even, 0.5) == times(even, 0.0)


def test_a_thread_that_waits_takes_no_time_of_its_own() -> None:
    rank = this_rank(2.0)
    start = rank.own_thread()
    for _ in range(20):
        spin()
    spent = rank.own_thread() - start
    nap()
    assert spent == pytest.approx(40e-3, rel=0.1)
    assert rank.own_thread() - start < spent + 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_small_kernel_takes_what_the_device_takes() -> None:
    rank = replace(this_rank(), device=torch.device("cuda", 0))
    small = torch.zeros(8, device=rank.device)
    on_device, from_host = (timed(rank, lambda: small.add_(1.0)).seconds for timed in (time_alone, time_host))
    assert 5e-7 < on_device < 0.7 * from_host
