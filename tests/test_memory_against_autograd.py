"""Predicted activation bytes beside what autograd really keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.memory_cost import MemoryModel
from planner.plan import Stage
from profiles.catalogue import CATALOG, resolve_model
from profiles.hardware import load_hardware
from profiles.model import ModelSpec
from runtime.live_bytes import LiveBytes
from runtime.transformer import Chunk, build_chunk
from tests.oracles.small_world import our_software

MICRO_BATCH, SEQUENCE = 2, 128


def kept_bytes(chunk: Chunk, forward: Callable[[], torch.Tensor]) -> float:
    """Bytes of the distinct storages saved for backward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return float(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))


def head_chunk(model: ModelSpec) -> Chunk:
    """One layer with the embedding before it and the head after."""
    stage = Stage(
        rank=0,
        chunk=0,
        first=0,
        end=1,
        embedding=True,
        head=True,
        recompute_none=1,
        recompute_selective=0,
        recompute_full=0,
    )
    chunk = build_chunk(replace(model, layers=1), stage).to_empty(device="cpu")
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return chunk


def memory_model(model: ModelSpec, sequence: int) -> MemoryModel:
    """On a CPU, whose rms_norm keeps one tensor more than the CUDA kernel; two microbatches."""
    hardware = replace(load_hardware(CATALOG / "hardware" / "a100-sxm-80gb.yaml"), backend="gloo")
    job = TrainingJob(global_batch=2 * MICRO_BATCH, sequence=sequence, precision="fp32")
    return MemoryModel(model, hardware, job, our_software())


@pytest.mark.parametrize("name", ["demo", "gpt2", "qwen2.5-7b"])
def test_a_block_keeps_what_the_model_says(name: str) -> None:
    model = replace(resolve_model(name), layers=1)
    if name == "qwen2.5-7b":  # its shape, at a size that a test can hold
        model = replace(model, hidden_size=448, ffn_hidden_size=2368, head_dim=16, vocab_size=512)
    chunk = head_chunk(model)
    memory, layout = memory_model(model, SEQUENCE), Layout(micro_batch=MICRO_BATCH)
    x = torch.randn(MICRO_BATCH, SEQUENCE, model.hidden_size, requires_grad=True)

    kept = kept_bytes(chunk, lambda: chunk.blocks["0"](x))
    assert memory.block(layout).held.activations == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("name", ["demo", "gpt2"])
@pytest.mark.parametrize("sequence", [SEQUENCE, 640])  # one piece, and one and a quarter
def test_a_heads_forward_allocates_what_the_model_says(name: str, sequence: int) -> None:
    model = replace(resolve_model(name), vocab_size=3000, tied_embeddings=False)
    chunk = head_chunk(model)
    norm, head = chunk.norm, chunk.head
    assert norm is not None
    assert head is not None
    x = torch.randn(MICRO_BATCH, sequence, model.hidden_size, requires_grad=True)
    targets = torch.zeros(MICRO_BATCH, sequence, dtype=torch.int64)
    live, parameters = LiveBytes("head"), [*norm.parameters(), *head.parameters()]
    with live:
        for tensor in (x, *parameters):
            tensor.detach()  # to be seen, so that it counts in any case
        start = live.mark()
        head(norm(x), targets)
    part = memory_model(model, sequence).head(Layout(micro_batch=MICRO_BATCH))
    allocated = live.peak(start)["head"] - sum(parameter.nbytes for parameter in parameters)
    assert part.held.total + part.transient == pytest.approx(allocated, rel=0.01)
