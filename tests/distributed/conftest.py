"""One thread for torch from the start: some of these tests train while they are collected (see tests/conftest.py)."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
