"""Attention over cp beside torch's own on whole sequences; what the ring sends, and when; which tokens a rank holds."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import runtime.context_parallel
import runtime.ring_attention
from planner.job import TrainingJob
from planner.layout import Layout
from runtime import attention_kernels
from runtime.attention_kernels import Attended, attend, attend_backward
from runtime.context_parallel import SequenceShard, inputs_and_targets, self_attention
from runtime.measure import OperationTimer
from runtime.mesh import build_mesh
from runtime.parallelize import build_chunks
from runtime.pipeline import build_runner
from runtime.ring_attention import ring_attention
from runtime.step import sum_over_ranks
from runtime.whole_attention import Reach
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_tokens, tokens_of
from tests.plans import make_plan, tiny_gpt2, tiny_llama

SEQUENCE = 24
# Heads of queries and of keys, elements of a head of queries and keys and of one of values.
SHAPES = {
    "all alike": (4, 4, 8, 8),
    "grouped": (8, 4, 8, 8),
    "narrow values": (4, 4, 8, 6),
    "wide values": (4, 4, 6, 8),
}
STYLES = ("ring", "all-to-all")
CPU = torch.device("cpu")


def whole_inputs(shape: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values, and the gradient of the outputs, of whole sequences."""
    heads, kv_heads, width, value_width = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    return [2 * torch.randn(2, n, SEQUENCE, d, dtype=torch.float64, generator=generator).to(dtype) for n, d in sizes]


def with_gradients(attention: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, and the gradients of queries, keys and values; the last of `inputs` is that of the outputs."""
    *qkv, of_outputs = (tensor.clone().requires_grad_() for tensor in inputs)
    outputs = attention(*qkv)
    outputs.backward(of_outputs.detach())
    gradients = [tensor.grad for tensor in qkv]
    return [outputs.detach(), *(gradient for gradient in gradients if gradient is not None)]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def differences() -> dict[tuple[str, str, torch.dtype, bool], list[float]]:
    """The largest differences of outputs and gradients, here, by style, shape, dtype and whether it is causal: in
    float64 as they are, else by those of torch's own attention in that dtype."""
    group, found = dist.group.WORLD, {}
    assert group is not None
    for style, causal in itertools.product(STYLES, (True, False)):
        shard = SequenceShard(group.rank(), group.size(), style, group)
        positions = [p for start, end in shard.spans(SEQUENCE // group.size()) for p in range(start, end)]
        for shape in SHAPES:
            if style == "all-to-all" and SHAPES[shape][1] % group.size():
                continue
            for dtype in (torch.float64, torch.bfloat16):
                whole = whole_inputs(shape, dtype)
                by_torch = partial(plain, causal=causal)
                expected = with_gradients(by_torch, *(tensor.double() for tensor in whole))
                local = with_gradients(
                    partial(self_attention, shard=shard, reach=Reach(causal)), *(t[:, :, positions] for t in whole)
                )
                alone = with_gradients(by_torch, *whole)
                found[style, shape, dtype, causal] = [
                    _most(ours.double() - right[:, :, positions])
                    / (1.0 if dtype == torch.float64 else _most(theirs.double() - right))
                    for ours, theirs, right in zip(local, alone, expected, strict=True)
                ]
    return found


def _most(differences: torch.Tensor) -> float:
    return differences.abs().max().item()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_attention_over_cp_is_attention_to_whole_sequences(ranks: int) -> None:
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 6.0}  # what steps give is rounded, and torch's own but once
    for rank in run_ranks(differences, ranks):
        assert len(rank) == (16 if ranks == 3 else 32)
        for (style, shape, dtype, causal), errors in rank.items():
            assert max(errors) < tolerance[dtype], (style, shape, causal, errors)


# ---- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_products_written_out_are_the_kernel(shape: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, gradient = whole_inputs(shape, torch.float64)
    if not causal:
        k, v = k[:, :, :8], v[:, :, :8]

    def run() -> list[torch.Tensor]:
        found = attend(q, k, v, causal=causal)
        others = Attended(0.5 * found.outputs, found.logarithms + 0.25)  # as if merged with some of other keys
        return [found.outputs, found.logarithms, *attend_backward(gradient, q, k, v, others, causal=causal)]

    fused = run()
    monkeypatch.setattr(attention_kernels, "_kernel", lambda _q: "composed")
    for ours, theirs in zip(run(), fused, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


# ---- what the ring sends -----------------------------------------------------------------------------------


def ring_traffic() -> list[tuple[str, int]]:
    """In the order of things: kernels of attention, and elements that are sent to the next rank."""
    group, seen = dist.group.WORLD, []
    assert group is not None
    send, forward, backward = dist.batch_isend_irecv, attend, attend_backward

    def sending(operations: list[dist.P2POp]) -> Any:
        (sent,) = [each for each in operations if each.op is dist.isend]
        assert sent.peer == (group.rank() + 1) % group.size()
        seen.append(("send", sent.tensor.numel()))
        return send(operations)

    def attending(kernel: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            queries, keys = arguments[1:3] if kernel is backward else arguments[:2]
            seen.append(("attend", queries.shape[2] * keys.shape[2]))
            return kernel(*arguments, **options)

        return call

    local = [tensor[:, :, : SEQUENCE // group.size()] for tensor in whole_inputs("grouped", torch.float64)]
    with (
        mock.patch.object(dist, "batch_isend_irecv", sending),
        mock.patch.object(runtime.ring_attention, "attend", attending(forward)),
        mock.patch.object(runtime.ring_attention, "attend_backward", attending(backward)),
    ):
        with_gradients(lambda q, k, v: ring_attention(q, k, v, group, causal=True), *local)
    return seen


def test_keys_go_round_beside_the_kernels_and_their_gradients_come_home() -> None:
    """What planner/axis_cost.py prices: cp - 1 messages forward, twice as many backward, the last behind nothing."""
    heads, width, tokens = 4, 16, SEQUENCE // 4
    message = ("send", 2 * heads * width * tokens)
    own, part = ("attend", tokens**2), ("attend", tokens * tokens // 2)  # of the own square the causal half counts
    for seen in run_ranks(ring_traffic, 4):
        assert seen[:7] == [message, own, message, part, message, part, part]
        assert seen[7:] == [message, own, message, part, message, message, part, message, part, message]


def kept_and_sent(style: str, recompute: str) -> dict[str, int]:
    """Collectives of cp, and messages of the ring, of a step of one microbatch of the tiny llama."""
    layers = (4,)
    layout = Layout(cp=2, cp_style=style, micro_batch=2)
    job = TrainingJob(global_batch=2, sequence=SEQUENCE, precision="fp32")
    full, selective = (layers if recompute == mode else None for mode in ("full", "selective"))
    plan = make_plan(tiny_llama(), layout, job, recompute=full, selective=selective)
    mesh = build_mesh(layout, "cpu", tied_embeddings=False)
    chunks = build_chunks(plan, mesh, CPU, dtype=torch.float32, seed=0)
    runner = build_runner(plan, chunks, mesh, CPU, torch.float32)
    inputs, targets = own_tokens(plan, tokens_of(plan, 0), 0, mesh.coordinate.cp)
    runner.step(inputs, targets)
    runner.clock.read()
    calls, send = [], dist.batch_isend_irecv
    counted = mock.patch.object(dist, "batch_isend_irecv", lambda operations: calls.append(1) or send(operations))
    with counted, OperationTimer(mesh, runner.clock) as timer:
        runner.step(inputs, targets)
    spans = runner.clock.read()
    assert 0 < spans["communication_cp"] < spans["schedule"]
    assert 0 < spans["kernel_attention"] < spans["schedule"]
    return {"messages": len(calls), **{name: count for name, count in timer.counts.items() if name.startswith("cp:")}}


def test_what_recomputation_sends_again() -> None:
    for ring in run_ranks(lambda: {mode: kept_and_sent("ring", mode) for mode in ("none", "selective", "full")}, 2):
        # One message forward and two backward, in each of four layers; what comes of the ring is kept.
        assert ring == {"none": {"messages": 12}, "selective": {"messages": 12}, "full": {"messages": 16}}
    exchange = "cp:all_to_all_single"
    for found in run_ranks(lambda: {mode: kept_and_sent("all-to-all", mode) for mode in ("none", "selective")}, 2):
        assert found == {"none": {"messages": 0, exchange: 24}, "selective": {"messages": 0, exchange: 36}}


# ---- tokens of a rank --------------------------------------------------------------------------------------


def test_the_worked_examples() -> None:
    assert doctest.testmod(runtime.context_parallel) == doctest.TestResults(failed=0, attempted=1)
    assert doctest.testmod(runtime.ring_attention) == doctest.TestResults(failed=0, attempted=1)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_is_some_ranks_and_the_ring_is_balanced(style: str, ranks: int) -> None:
    style = style if ranks > 1 else "none"
    held = [
        [p for start, end in SequenceShard(rank, ranks, style).spans(SEQUENCE // ranks) for p in range(start, end)]
        for rank in range(ranks)
    ]
    assert sorted(position for positions in held for position in positions) == list(range(SEQUENCE))
    if style == "ring":
        assert len({sum(position + 1 for position in positions) for positions in held}) == 1
    samples = torch.arange(2 * (SEQUENCE + 1)).view(2, SEQUENCE + 1)
    layout = Layout(cp=ranks, cp_style=style)
    for rank, positions in enumerate(held):
        inputs, targets = inputs_and_targets(samples, layout, rank)
        assert inputs.tolist() == samples[:, positions].tolist()
        assert targets.tolist() == samples[:, [position + 1 for position in positions]].tolist()


def validation_loss(layout: Layout) -> float:
    plan = make_plan(tiny_gpt2(), layout, TrainingJob(global_batch=4, sequence=SEQUENCE, precision="fp32"))
    mesh = build_mesh(layout, "cpu", tied_embeddings=True)
    chunks = build_chunks(plan, mesh, CPU, dtype=torch.float64, seed=0)
    runner = build_runner(plan, chunks, mesh, CPU, torch.float64)
    here = mesh.coordinate
    return sum_over_ranks(runner.evaluate(*own_tokens(plan, tokens_of(plan, 0), here.dp, here.cp)))


def test_the_validation_pass() -> None:
    layout = Layout(cp=2, cp_style="ring", pp=2, micro_batch=2)
    (expected,) = run_ranks(validation_loss, 1, Layout(micro_batch=2))
    for changed in (layout, replace(layout, pp=1, dp=2, dp_shard=2, zero=3, cp_style="all-to-all")):
        assert run_ranks(validation_loss, 4, changed) == pytest.approx([expected] * 4, rel=1e-12)
