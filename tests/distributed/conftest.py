"""One thread for torch from the start: some of these tests train while they are collected (see tests/conftest.py)."""

from __future__ import annotations

import gc

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What imports have left stays to the end: set aside, no collection looks through it again, which would take 0.2 s
    before each fork (`harness.fork`) and copy its pages in each rank."""
    gc.collect()
    gc.freeze()
