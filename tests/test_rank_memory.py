"""Which rank a dry run takes, and what it prints of its bytes."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.rank_memory import RankMemory, chosen_rank, rank_memory
from planner.rank_memory_report import rank_memory_report
from profiles.input_error import InputError
from tests.plans import make_plan, tiny_llama

MIB = 2**20


def plan(*totals: float) -> Plan:
    """One with so many MiB of activations on its pipeline ranks."""
    layout = Layout(tp=2, pp=len(totals), dp=3)
    made = make_plan(tiny_llama(), layout, TrainingJob(global_batch=12, sequence=16, precision="fp32"))
    memory = tuple(
        {"weights": 2.0 * MIB, "activations": total * MIB, "context": 5.0 * MIB, "allocator_slack": 1.0 * MIB}
        for total in totals
    )
    return replace(made, prediction=replace(made.prediction, memory_bytes=memory))


def found(gpu: dict[str, Any] | None = None) -> RankMemory:
    live = {"weights": 2 * MIB, "activations": 9 * MIB, "inputs": 10 * MIB, "transient": 19 * MIB, "logits": 1}
    return rank_memory(plan(4.0, 8.0), 7, live, gpu_kernels=True, seconds=2.5, gpu=gpu)


def printed(memory: RankMemory) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(rank_memory_report(memory))
    return console.export_text()


def test_the_heaviest_by_prediction_is_the_default() -> None:
    assert chosen_rank(plan(4.0, 9.0, 8.0), None) == 6
    assert chosen_rank(plan(4.0, 4.0), None) == 0
    assert chosen_rank(plan(4.0, 4.0), 11) == 11


@pytest.mark.parametrize("rank", [-1, 12])
def test_a_rank_that_is_not_there_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=rf"no rank {rank}.*--rank.*0 to 11.*got: {rank}"):
        chosen_rank(plan(4.0, 4.0), rank)


def test_what_is_no_tensor_is_left_out() -> None:
    memory = found()
    assert memory.pipeline_rank == 1
    assert dict(memory.predicted) == {"weights": 2 * MIB, "activations": 8 * MIB}
    assert dict(memory.left_out) == {"context": 5 * MIB, "allocator_slack": MIB}
    assert (memory.predicted_bytes, memory.live_bytes) == (10 * MIB, 40 * MIB + 1)
    assert memory.to_dict()["live"]["inputs"] == 10 * MIB


def test_the_table() -> None:
    text = printed(found())
    rows = [" ".join(line.split()) for line in text.splitlines() if "MiB" in line]
    assert rows == [
        "weights 2.0 MiB 2.0 MiB +0.0 MiB +0.0%",
        "activations 8.0 MiB 9.0 MiB −1.0 MiB -2.5%",
        "passing 0.0 MiB 19.0 MiB −19.0 MiB -47.5%",
        "token ids 0.0 MiB 10.0 MiB −10.0 MiB -25.0%",
        "all tensors 10.0 MiB 40.0 MiB −30.0 MiB -75.0%",
        "left out, since no tensors: context 5.0 MiB, allocator slack 1.0 MiB (predicted)",
    ]
    assert "rank 7 of 12: tiny-llama, tp2 pp2 dp3 zero0 mb1 1f1b, 4 microbatches" in text
    assert "pipeline rank 1, layers 2 H" in text
    assert "in 2.5 s" in text
    assert "RMSNorm keeps what CUDA's does" in text


def test_a_gpu_says_its_peak_and_seconds_or_that_it_is_too_small() -> None:
    device = {
        "device": "NVIDIA X",
        "allocated_bytes": 3 * 2**30,
        "reserved_bytes": 4 * 2**30,
        "step_seconds": 1.5,
        "failed": None,
    }
    text = " ".join(printed(found(device)).split())
    assert "NVIDIA X: peak 3.00 GiB allocated, 4.00 GiB reserved;" in text
    assert "a step takes 1.5 s without communication, 1 s by the plan" in text
    assert "NVIDIA X: it runs out of memory" in printed(found(device | {"failed": "it runs out of memory"}))
