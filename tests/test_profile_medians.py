"""Several profiles of one machine as one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.profile_medians import merge_profiles
from profiles.points import ContentionPoint, GemmPoint, WaitPoint
from tests.oracles.small_world import small_hardware


def gemm(m: int, seconds: float) -> GemmPoint:
    return GemmPoint(dtype="fp32", operation="forward", m=m, n=8, k=8, seconds=seconds, spread=seconds / 10)


def test_each_point_is_its_median_over_the_profiles_that_have_it() -> None:
    first, second, third = (
        small_hardware(
            gemm=(gemm(8, seconds), *((gemm(16, 9.0),) if seconds == 3.0 else ())),
            contention_points=(ContentionPoint(active=1, slowdown=1.0), ContentionPoint(active=2, slowdown=seconds)),
            waits=(
                WaitPoint(compute_seconds=seconds / 10, wait_seconds=seconds / 100),
                WaitPoint(compute_seconds=seconds, wait_seconds=seconds / 5),
            ),
            launch_seconds=seconds,
            peak_flops_per_second={"fp32": 1e9 * seconds},
        )
        for seconds in (1.0, 3.0, 2.0)
    )
    merged = merge_profiles([first, second, third])
    assert merged.gemm == (gemm(8, 2.0), gemm(16, 9.0))
    assert [p.slowdown for p in merged.contention_points] == [1.0, 2.0]
    assert [p.compute_seconds for p in merged.waits] == [0.2, 2.0]
    assert [p.wait_seconds for p in merged.waits] == [0.02, 0.4]
    assert (merged.launch_seconds, merged.peak_flops_per_second) == (2.0, {"fp32": 2e9})
    assert merged.memory_bytes == first.memory_bytes


def test_the_pace_is_that_of_all_sessions() -> None:
    def paced(median: float) -> dict[str, float]:
        return {"median_seconds": median, "fastest_seconds": median - 1, "slowest_seconds": median + 1}

    plain = small_hardware()
    profiles = [replace(plain, provenance={"date": str(m), "pace": paced(m)}) for m in (4.0, 6.0, 5.0)]
    merged = merge_profiles(profiles)
    pace = merged.provenance["pace"]
    assert pace == {"median_seconds": 5.0, "fastest_seconds": 3.0, "slowest_seconds": 7.0}
    assert [session["date"] for session in merged.provenance["sessions"]] == ["4.0", "6.0", "5.0"]
    assert merge_profiles([plain]).provenance["pace"] is None


def test_one_profile_is_itself_but_for_its_sessions() -> None:
    alone = small_hardware(gemm=(gemm(8, 1.0),))
    merged = merge_profiles([alone])
    assert replace(merged, provenance=alone.provenance) == alone
    with pytest.raises(IndexError):
        merge_profiles([])
