"""Live storages: what appears, shares, resizes and goes, and what it was for at the peak."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.live_bytes import LiveBytes

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_the_peak_is_the_most_that_lived_at_once() -> None:
    with LiveBytes("rest") as live:
        kept = kib(4)
        gone = kib(8)
        view = gone[: 2 * KIB]  # the same storage
        del gone
        with live.during("late"):
            more = kib(1)
        del view
        small = kib(2)
    assert live.peak(0) == {"rest": 12 * KIB, "late": KIB}
    assert (kept.numel(), more.numel(), small.numel()) == (4 * KIB, KIB, 2 * KIB)


def test_only_moments_since_the_mark_count() -> None:
    with LiveBytes("rest") as live:
        first = kib(8)
        del first
        start = live.mark()
        second = kib(3)
    assert live.peak(0) == {"rest": 8 * KIB}
    assert live.peak(start) == {"rest": 3 * KIB}
    assert second.numel() == 3 * KIB


def test_a_storage_that_is_resized_counts_as_it_is() -> None:
    with LiveBytes("rest") as live:
        gathered = kib(6)
        gathered.untyped_storage().resize_(0)
        other = kib(5)
        start = live.mark()
        gathered.untyped_storage().resize_(2 * KIB)
    assert live.peak(start) == {"rest": 7 * KIB}
    assert other.numel() == 5 * KIB


def test_booking_holds_for_the_past_too() -> None:
    with LiveBytes("rest") as live:
        weight, passing = kib(4), kib(2)
        del passing
        live.book(weight, "weights")
    assert live.peak(0) == {"weights": 4 * KIB, "rest": 2 * KIB}


def test_a_number_can_be_read_from_a_fake_tensor() -> None:
    with FakeTensorMode(), LiveBytes("rest"):
        assert torch.ones(3).sum().item() == 1.0
        assert torch.ones(3, dtype=torch.int64).sum().item() == 1
    with LiveBytes("rest"):
        assert torch.ones(3).sum().item() == 3.0


def test_what_a_collective_is_waited_for_is_no_second_tensor() -> None:
    """Fake or real: the wait gives back what it waited for."""
    for fake in (FakeTensorMode(), nullcontext()):
        with fake, LiveBytes("rest") as live:
            waited = torch.ops._c10d_functional.wait_tensor(kib(4))
        assert live.peak(0) == {"rest": 4 * KIB}
        assert waited.numel() == 4 * KIB
