"""Bytes that a plan predicts for a module of another package, beside what a rank of it holds."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest

from planner.layout import Layout
from profiles.traced_model import TracedModel
from runtime.foreign.trace_module import trace
from tests.distributed.memory_cases import MemoryCase, compare, in_child

LLAMA, VIT = "tests.module_factories:small_hf_llama", "tests.module_factories:small_vit"
SEQUENCE = {LLAMA: 128, VIT: 17}
MOST = 0.05  # relative error of a rank's peak; CONTRIBUTING's figures for models of our own are closer


@cache
def traced(factory: str) -> TracedModel:
    return trace(factory, SEQUENCE[factory])


def case(factory: str, precision: str, at: int = 0, batch: int = 16, recompute: int = 0, **axes: Any) -> MemoryCase:
    layout = Layout(**{"micro_batch": 2} | axes | ({"dp_shard": axes["dp"]} if axes.get("zero") else {}))
    return MemoryCase(
        model=traced(factory),
        layout=layout,
        precision=precision,
        pipeline_rank=at,
        global_batch=batch,
        sequence=SEQUENCE[factory],
        recompute=(recompute,) * layout.stages,
        selective=(0,) * layout.stages,
    )


def check(cases: dict[str, MemoryCase]) -> None:
    # With real tensors: of fake ones transformers makes masks that it does without otherwise.
    found = in_child(partial(compare, fake=False), cases.values())
    wrong = {name: f"{each.error:+.1%}" for name, each in zip(cases, found, strict=True) if abs(each.error) > MOST}
    assert not wrong


def test_a_rank_of_a_vision_transformer_holds_what_its_plan_says() -> None:
    check(
        {
            "bf16 dp4 zero1": case(VIT, "bf16", micro_batch=16, batch=128, dp=4, zero=1),
            "fp32 pp2, first": case(VIT, "fp32", micro_batch=16, batch=128, pp=2),
        }
    )


@pytest.mark.full
def test_ranks_of_many_layouts_hold_what_their_plans_say() -> None:
    check(
        {
            "one rank": case(LLAMA, "fp32", micro_batch=4),
            "bf16": case(LLAMA, "bf16", micro_batch=4),
            "recompute": case(LLAMA, "fp32", micro_batch=4, recompute=4),
            "bf16 dp4 zero0": case(LLAMA, "bf16", dp=4),
            "bf16 dp4 zero2": case(LLAMA, "bf16", dp=4, zero=2),
            "bf16 dp4 zero3 recompute": case(LLAMA, "bf16", dp=4, zero=3, recompute=4),
            "pp2, first": case(LLAMA, "fp32", pp=2),
            "pp2, last": case(LLAMA, "fp32", pp=2, at=1),
            "gpipe, last": case(LLAMA, "fp32", pp=2, at=1, schedule="gpipe"),
            "bf16 pp2 dp2 zero3": case(LLAMA, "bf16", pp=2, dp=2, zero=3),
            "tp2": case(LLAMA, "fp32", tp=2, micro_batch=4),
            "bf16 interleaved, last": case(LLAMA, "bf16", pp=2, virtual_stages=2, schedule="interleaved-1f1b", at=1),
            "vit": case(VIT, "fp32", micro_batch=16, batch=64),
            "vit, last": case(VIT, "fp32", micro_batch=16, batch=128, pp=2, at=1),
        }
    )
