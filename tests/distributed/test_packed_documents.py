"""Packed documents: loss and gradient norm are those of the documents run alone, one by one, under every layout."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan, Stage
from profiles.model import ModelSpec
from runtime import plain_loop
from runtime.compilation import Compilation
from runtime.data.packing import Packing
from runtime.packed_rows import documents_of, own_tensors
from runtime.parameters import initialise
from runtime.step import build_state, sum_over_ranks
from runtime.transformer import Chunk, build_chunk
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import (
    OF_DOCUMENTS,
    SEED,
    Trajectory,
    own_samples,
    packed_tokens_of,
    run_plain,
    run_plan,
    run_plan_in,
)
from tests.distributed.pairwise import pairwise_settings
from tests.plans import make_plan, tiny_experts, tiny_gpt2, tiny_latent, tiny_llama
from tests.thinned import every

STEPS = 2
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative
JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
END = 0
PACKINGS = {"": Packing(end=END), "masked": Packing(end=END, mask_loss=True)}


def plan_of(model: ModelSpec, recompute: Any = None, selective: Any = None, **layout: Any) -> Plan:
    layout.setdefault("micro_batch", 2)
    if layout.get("zero"):
        layout.setdefault("dp_shard", layout["dp"])
    return make_plan(model, Layout(**layout), JOB, None, recompute, selective)


# What the generated layouts do not reach: experts, latent attention, rings of more ranks than two.
CASES = {
    "one rank, selective": plan_of(tiny_llama(), selective=(4,)),
    "experts ep2 zero1": plan_of(tiny_experts(), dp=2, ep=2, zero=1),
    "latent tp2 sp ep2": plan_of(tiny_latent(), tp=2, sequence_parallel=True, ep=2),
    "latent cp2 ring": plan_of(tiny_latent(), cp=2, cp_style="ring"),
    "cp4 ring": plan_of(tiny_llama(), cp=4, cp_style="ring"),
    "experts pp2 dp2 interleaved": plan_of(
        tiny_experts(), pp=2, dp=2, ep=2, zero=1, schedule="interleaved-1f1b", virtual_stages=2
    ),
    "latent pp2 zb1p": plan_of(tiny_latent(), pp=2, schedule="zb1p"),
    "gpt2 cp4 all-to-all": plan_of(tiny_gpt2(), cp=4, cp_style="all-to-all"),
}
GENERATED = {str(setting): setting.plan() for setting in pairwise_settings()}
PLANS = CASES | GENERATED
# Every other layout masks the loss besides.
KINDS = {name: ("", "masked")[place % 2] for place, name in enumerate(PLANS)}


@cache
def alone(model: ModelSpec, kind: str) -> Trajectory:
    """Each document alone, in plain torch and one process, in float64."""
    return run_plain(make_plan(model, Layout(), JOB), STEPS, torch.float64, packing=PACKINGS[kind])


def same(found: Trajectory, expected: Trajectory, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance)


@pytest.mark.parametrize("name", [*every(4, CASES, first=3), *every(20, GENERATED, first=3)])
def test_a_row_is_its_documents_run_alone(name: str) -> None:
    plan, kind = PLANS[name], KINDS[name]
    steps = dict.fromkeys(TOLERANCE, STEPS)
    ranks = run_ranks(run_plan_in, plan.layout.world_size, plan, steps, PACKINGS[kind], timeout_seconds=180)
    for dtype, tolerance in TOLERANCE.items():
        for rank in (ranks[0], ranks[-1]):
            same(rank[dtype], alone(plan.model, kind), tolerance)


def test_that_documents_do_not_see_each_other_is_seen() -> None:
    """The tolerances tell packed from not packed, and masked from not masked."""
    plan = make_plan(tiny_llama(), Layout(), JOB)
    packed, masked = (alone(plan.model, kind) for kind in ("", "masked"))
    tokens = [packed_tokens_of(plan, 0, END)]
    seen = plain_loop.run_plain(
        plan.model, tokens, dtype=torch.float64, learning_rate=0.0, weight_decay=0.0, seed=SEED, balance=OF_DOCUMENTS
    )
    assert abs(packed.losses[0] / masked.losses[0] - 1) > 1e-4
    assert abs(packed.norms[0] / masked.norms[0] - 1) > 1e-3
    assert abs(packed.norms[0] / seen.norms[0] - 1) > 1e-3


COMPILED = {
    "selective": (plan_of(tiny_llama(), recompute=(1,), selective=(2,)), ""),
    "gpt2 cp2 ring": (plan_of(tiny_gpt2(), cp=2, cp_style="ring", selective=(2,)), "masked"),
    "tp2 sp": (plan_of(tiny_llama(), tp=2, sequence_parallel=True), "masked"),
    "pp2 gpipe": (plan_of(tiny_llama(), pp=2, schedule="gpipe"), ""),
}


@pytest.mark.parametrize("name", every(4, COMPILED, first=1))
def test_compiled(name: str) -> None:
    plan, kind = COMPILED[name]
    how = Compilation(backend="aot_eager")
    arguments = (plan, STEPS, torch.float64, None, how, PACKINGS[kind])
    for found in run_ranks(run_plan, plan.layout.world_size, *arguments, timeout_seconds=180):
        same(found, alone(plan.model, kind), 1e-9)


def validation_loss(plan: Plan, packing: Packing) -> float:
    """Of the first batch, before any update."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float64, seed=SEED, weight_decay=0.0)
    here = state.mesh.coordinate
    own = own_samples(plan, packed_tokens_of(plan, 0, END), here.dp).numpy()
    return sum_over_ranks(state.runner.evaluate(*own_tensors(own, packing, plan.layout, here.cp, state.device)))


def test_validation() -> None:
    plan = plan_of(tiny_llama(), pp=2, cp=2, cp_style="ring")
    expected = alone(plan.model, "masked").losses[0]
    assert run_ranks(validation_loss, 4, plan, PACKINGS["masked"]) == pytest.approx([expected] * 4, rel=1e-12)


# ---- one switch without the other --------------------------------------------------------------------------


def gpt2_chunk() -> Chunk:
    model = tiny_gpt2()
    chunk = build_chunk(model, Stage.whole(model)).to(torch.float64).to_empty(device="cpu")
    chunk.tie()
    initialise([chunk], layers=model.layers, seed=SEED)
    return chunk


def packed_logits(chunk: Chunk, ids: torch.Tensor, **switches: bool) -> torch.Tensor:
    whole = torch.cat((ids, ids[:, :1]), dim=1).numpy()
    packing = Packing(end=END, **{"reset_positions": False, "reset_attention": False} | switches)
    return chunk(ids, **documents_of(whole, packing, Layout(), 0).named())


IDS = torch.from_numpy(np.array([[3, 9, END, 4, 4, 5, END, END, 8], [7] * 9]))
POSITIONS = [[0, 1, 2, 0, 1, 2, 3, 0, 0], list(range(9))]
PARTS = (slice(0, 3), slice(3, 7), slice(7, 8), slice(8, 9))


def test_positions_alone() -> None:
    chunk = gpt2_chunk()
    assert chunk.embedding is not None
    assert chunk.embedding.positions is not None
    x = chunk.embedding.tokens(IDS) + chunk.embedding.positions.weight[torch.tensor(POSITIONS)]
    for block in chunk.blocks.values():
        x = block(x)
    assert chunk.norm is not None
    assert chunk.head is not None
    expected = chunk.head(chunk.norm(x))
    assert torch.equal(packed_logits(chunk, IDS, reset_positions=True), expected)
    assert not torch.allclose(expected, chunk(IDS))


def test_attention_alone() -> None:
    chunk, places = gpt2_chunk(), torch.arange(9).expand(1, -1)
    found = packed_logits(chunk, IDS, reset_attention=True)
    for part in PARTS:
        alone = chunk(IDS[:1, part], positions=places[:, part])
        torch.testing.assert_close(found[:1, part], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1:], chunk(IDS[1:]), rtol=0, atol=1e-12)
