"""What a rank on a CPU does with its memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_ALLOCATE_AND_FREE = """
import os, sys, torch
from profiles.probes.cpu_rank import prepare_cpu_rank

def resident_bytes():
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "prepared":
    prepare_cpu_rank()
    assert torch.get_num_threads() == 1
before = resident_bytes()
tensor = torch.ones(7 << 20)
del tensor
print(resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_memory_that_a_step_frees_stays_for_the_next() -> None:
    prepared, plain = (_kept_bytes(how) for how in ("prepared", "plain"))
    assert prepared - plain > 20e6, (prepared, plain)


def _kept_bytes(how: str) -> int:
    """Bytes that the process still holds of a tensor of 28 MiB that is gone."""
    ended = subprocess.run([sys.executable, "-c", _ALLOCATE_AND_FREE, how], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)
