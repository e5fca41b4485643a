"""The host reads one thing of a step, at its end: on a GPU each read would wait for all that is under way."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from runtime.loss_scale import LossScaling
from runtime.step import TrainState, build_state, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of
from tests.plans import make_plan, tiny_llama

JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
RUNTIME = str(Path(training_step.__code__.co_filename).parent)
# The loss's own backward looks at a number where it is on a CPU, and asks for that first.
ONLY_ON_CPU = {"backward"}


def our_caller() -> str:
    """The innermost function of the runtime that is being run."""
    frame: Any = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(RUNTIME):
        frame = frame.f_back
    return frame.f_code.co_name if frame is not None else "none of ours"


class Reads(TorchDispatchMode):
    """Notes who reads a number of a tensor: `item`, `float`, `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented
        # A mesh, whose ranks are no floats, lives on the CPU.
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.readers.append(our_caller())
        return func(*args, **(kwargs or {}))


@contextmanager
def whole_reads(readers: list[str]) -> Iterator[None]:
    """Notes who turns a tensor into a list or an array, which no dispatch shows."""
    patches = []
    for name in ("tolist", "numpy"):
        plain = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, *arguments: Any, plain: Any = plain, **options: Any) -> Any:
            if tensor.is_floating_point():
                readers.append(our_caller())
            return plain(tensor, *arguments, **options)

        patches.append(mock.patch.object(torch.Tensor, name, noted))
    for patch in patches:
        patch.start()
    yield
    for patch in patches:
        patch.stop()


def a_step(plan: Plan, state: TrainState) -> None:
    tokens = own_samples(plan, tokens_of(plan, 0), state.mesh.coordinate.dp).to(state.device)
    training_step(state, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), learning_rate=1e-3, clip_norm=0.01)


def readers_of_a_step(plan: Plan, scaling: LossScaling | None) -> tuple[list[str], list[str]]:
    """Of the second step: who reads a number, and who reads a whole tensor."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.1, scaling=scaling)
    a_step(plan, state)
    whole: list[str] = []
    with Reads() as reads, whole_reads(whole):
        a_step(plan, state)
    return reads.readers, whole


@pytest.mark.parametrize(
    ("layout", "scaling"),
    [
        ({}, LossScaling()),
        ({"dp": 2, "zero": 3, "dp_shard": 2}, None),
        ({"tp": 2, "sequence_parallel": True}, None),
        ({"pp": 2, "schedule": "gpipe"}, LossScaling()),
        ({"pp": 2, "schedule": "zbv", "virtual_stages": 2}, None),
    ],
    ids=str,
)
def test_a_step_is_read_once_at_its_end(layout: dict[str, Any], scaling: LossScaling | None) -> None:
    plan = make_plan(tiny_llama(), Layout(**{"micro_batch": 2} | layout), JOB)
    ranks = run_ranks(readers_of_a_step, plan.layout.world_size, plan, scaling)
    for _, whole in ranks:
        assert whole == ["training_step"]
    assert {name for numbers, _ in ranks for name in numbers} == ONLY_ON_CPU  # and so the counting works


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_once(tmp_path: Path) -> None:
    plan, device = make_plan(tiny_llama(), Layout(micro_batch=2), JOB), torch.device("cuda", 0)
    dist.init_process_group("nccl", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1, device_id=device)
    try:
        state = build_state(plan, device, dtype=torch.float32, seed=0, weight_decay=0.1)
        tokens = tokens_of(plan, 0).to(device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        training_step(state, inputs, targets, learning_rate=1e-3, clip_norm=0.01)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            training_step(state, inputs, targets, learning_rate=1e-3, clip_norm=0.01)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        dist.destroy_process_group()
    assert len([warning for warning in said if "synchronizing CUDA operation" in str(warning.message)]) == 1
