"""What the profiler measures and in what order."""

from __future__ import annotations

import torch

from profiles.points import GEMM_OPERATIONS
from profiles.probes.cases import QUICK, all_cases
from profiles.probes.timing import Rank


def test_however_short_the_time_each_product_of_a_linear_is_measured_in_each_precision() -> None:
    cases = all_cases(Rank(0, 1, torch.device("cpu")), {}, ("fp32", "bf16"))
    needed = [case for case in cases if case.needed]
    assert all(case.level == QUICK for case in needed)
    assert sorted(case.name.split()[1:3] for case in needed) == sorted(
        [dtype, operation] for dtype in ("fp32", "bf16") for operation in GEMM_OPERATIONS
    )
