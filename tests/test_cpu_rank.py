"""What a rank on a CPU does with its memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Torch is imported once; each way is a process of its own, forked before anything is allocated.
_ALLOCATE_AND_FREE = """
import os, sys, torch
from profiles.probes.cpu_rank import prepare_cpu_rank

def resident_bytes():
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

for how in ("prepared", "plain"):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    if how == "prepared":
        prepare_cpu_rank()
        assert torch.get_num_threads() == 1
    before = resident_bytes()
    tensor = torch.ones(7 << 20)
    del tensor
    print(resident_bytes() - before)
    break
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_memory_that_a_step_frees_stays_for_the_next() -> None:
    """Bytes that a process still holds of a tensor of 28 MiB that is gone."""
    ended = subprocess.run([sys.executable, "-c", _ALLOCATE_AND_FREE], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    prepared, plain = map(int, ended.stdout.split())
    assert prepared - plain > 20e6, (prepared, plain)
