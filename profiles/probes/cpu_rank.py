"""A process that is one rank of several on a CPU, while it trains and while it is measured."""

from __future__ import annotations

import ctypes
import platform

import torch

# glibc's mallopt: how much free memory at the heap's end goes back to the kernel, and from which size on a block is
# mapped on its own, 32 MiB at most.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST = 2**31 - 1, 2**25


def prepare_cpu_rank() -> None:
    """One thread, since the ranks share the cores, and an allocator that keeps what tensors have given back.

    What a step frees the next one wants again; given to the kernel in between, every page of it would fault anew.
    """
    torch.set_num_threads(1)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
