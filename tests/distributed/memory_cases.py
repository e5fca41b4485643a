"""Layouts whose memory is predicted and measured, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from planner.assignment import counts_of
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.step_cost import CostModel
from profiles.model import ModelSpec
from runtime.dry_run import DryRun, dry_run
from tests.oracles.small_world import small_hardware
from tests.plans import make_plan, tiny_bert, tiny_gpt2, tiny_llama, tiny_megatron_bert

# Wide enough that the token ids and norms' statistics, which no formula counts, are a fraction of a percent.
_SIZE: dict[str, Any] = {"hidden_size": 256, "heads": 8, "head_dim": 32, "vocab_size": 1024, "max_positions": 256}
LLAMA = tiny_llama(kv_heads=4, ffn_hidden_size=704, **_SIZE)
LLAMA_8 = tiny_llama(kv_heads=4, ffn_hidden_size=704, layers=8, **_SIZE)
WIDE = tiny_llama(kv_heads=4, ffn_hidden_size=2048, layers=8, **_SIZE)  # weights more than activations
GPT2 = tiny_gpt2(kv_heads=8, ffn_hidden_size=1024, **_SIZE)
BERT, MEGATRON_BERT = (make(kv_heads=8, ffn_hidden_size=1024, **_SIZE) for make in (tiny_bert, tiny_megatron_bert))

_SECONDS = 300.0  # for all cases of a call
_NO_TENSORS = ("context", "communicators", "allocator_slack")


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """A layout of a model, and the pipeline rank whose memory is looked at.

    `recompute` and `selective` are blocks a stage that recompute in full and selectively, `reshard` what all stages say
    of their weights.
    """

    model: ModelSpec
    layout: Layout
    precision: str
    pipeline_rank: int
    global_batch: int
    sequence: int
    recompute: tuple[int, ...]
    selective: tuple[int, ...]
    reshard: bool | None = None


@dataclass(frozen=True)
class Compared:
    """Bytes by part at the peak of one rank."""

    predicted: dict[str, float]
    measured: dict[str, int]

    @property
    def predicted_bytes(self) -> float:
        return sum(self.predicted.values())

    @property
    def measured_bytes(self) -> int:
        return sum(self.measured.values())

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def _case(
    model: ModelSpec,
    precision: str,
    at: int = 0,
    batch: int = 16,
    sequence: int = 128,
    recompute: int = 0,
    selective: int = 0,
    reshard: bool | None = None,
    **axes: Any,
) -> MemoryCase:
    defaults: dict[str, Any] = {"micro_batch": 2}
    layout = Layout(**defaults | axes)
    if layout.zero and "dp_shard" not in axes:
        layout = replace(layout, dp_shard=layout.dp)
    return MemoryCase(
        model=model,
        layout=layout,
        precision=precision,
        pipeline_rank=at,
        global_batch=batch,
        sequence=sequence,
        recompute=(recompute,) * layout.stages,
        selective=(selective,) * layout.stages,
        reshard=reshard,
    )


CASES = {
    "llama fp32, one rank": _case(LLAMA, "fp32", micro_batch=4),
    "gpt2 fp32, one rank, recompute": _case(GPT2, "fp32", micro_batch=8, recompute=4),
    "gpt2 bf16, one rank": _case(GPT2, "bf16", micro_batch=4),
    "llama fp32 tp2 sp": _case(LLAMA, "fp32", tp=2, sequence_parallel=True, micro_batch=4),
    "llama fp32 tp4": _case(LLAMA, "fp32", tp=4, micro_batch=4),
    "gpt2 bf16 tp2 sp recompute 2 of 4": _case(GPT2, "bf16", tp=2, sequence_parallel=True, micro_batch=8, recompute=2),
    "llama bf16 dp4 zero0": _case(LLAMA, "bf16", dp=4, micro_batch=2),
    "llama bf16 dp4 zero1": _case(LLAMA, "bf16", dp=4, zero=1, micro_batch=2),
    "llama bf16 dp4 zero2": _case(LLAMA, "bf16", dp=4, zero=2, micro_batch=2),
    "gpt2 fp32 dp8 zero3": _case(GPT2, "fp32", dp=8, zero=3, micro_batch=1),
    "llama bf16 dp4 zero3 recompute": _case(LLAMA, "bf16", dp=4, zero=3, micro_batch=2, recompute=4),
    "llama bf16 dp2 zero1, one microbatch": _case(LLAMA, "bf16", dp=2, zero=1, micro_batch=8),
    "llama fp32 pp2 1f1b, first": _case(LLAMA, "fp32", pp=2),
    "llama fp32 pp2 1f1b, last": _case(LLAMA, "fp32", pp=2, at=1),
    "gpt2 fp32 pp2 gpipe, first": _case(GPT2, "fp32", pp=2, schedule="gpipe", micro_batch=4),
    "gpt2 bf16 pp4 1f1b, second, recompute": _case(GPT2, "bf16", pp=4, at=1, recompute=1),
    "llama bf16 pp2 dp2 zero3 1f1b, first": _case(LLAMA, "bf16", pp=2, dp=2, zero=3),
    "gpt2 bf16 pp2 dp2 tp2 sp zero1 1f1b, last": _case(
        GPT2, "bf16", pp=2, dp=2, tp=2, sequence_parallel=True, zero=1, at=1
    ),
    "llama fp32 pp2 dp2 tp2 sp zero1 gpipe, last": _case(
        LLAMA, "fp32", pp=2, dp=2, tp=2, sequence_parallel=True, zero=1, schedule="gpipe", at=1
    ),
}

CASES |= {
    "llama bf16 pp2·v2 interleaved-1f1b, last": _case(
        LLAMA, "bf16", pp=2, virtual_stages=2, schedule="interleaved-1f1b", at=1
    ),
    "llama bf16 pp2·v4 dp2 zero1 interleaved, last": _case(
        LLAMA_8, "bf16", pp=2, dp=2, zero=1, virtual_stages=4, schedule="interleaved-1f1b", at=1
    ),
    "llama fp32 pp2·v2 looped-bfs, last": _case(LLAMA, "fp32", pp=2, virtual_stages=2, schedule="looped-bfs", at=1),
    "llama fp32 pp2 zb1p, last": _case(LLAMA, "fp32", pp=2, schedule="zb1p", at=1),
    "llama fp32 pp2·v2 zbv, last": _case(LLAMA, "fp32", pp=2, virtual_stages=2, schedule="zbv", at=1),
    "llama fp32 pp2·v2 dualpipev, first": _case(LLAMA, "fp32", pp=2, virtual_stages=2, schedule="dualpipev"),
    "llama fp32 one rank, selective": _case(LLAMA, "fp32", selective=4, micro_batch=4),
    "llama fp32 tp2 sp, selective": _case(LLAMA, "fp32", tp=2, sequence_parallel=True, selective=4, micro_batch=4),
    "llama bf16 dp4 zero2 hsdp2": _case(LLAMA, "bf16", dp=4, zero=2, dp_shard=2),
    "llama fp32 cp4 ring": _case(LLAMA, "fp32", cp=4, cp_style="ring", micro_batch=8),
    "llama bf16 cp2 ring dp2 zero1, selective": _case(
        LLAMA, "bf16", cp=2, cp_style="ring", dp=2, zero=1, micro_batch=4, selective=4
    ),
    "llama fp32 cp2 all-to-all tp2 sp": _case(
        LLAMA, "fp32", cp=2, cp_style="all-to-all", tp=2, sequence_parallel=True, micro_batch=8
    ),
    "gpt2 fp32 cp2 all-to-all, selective": _case(GPT2, "fp32", cp=2, cp_style="all-to-all", micro_batch=8, selective=4),
    "llama fp32 cp2 ring pp2 zb1p, first": _case(LLAMA, "fp32", cp=2, cp_style="ring", pp=2, schedule="zb1p"),
    "llama bf16 pp2 dp2 zero3 1f1b, first, freed": _case(LLAMA, "bf16", pp=2, dp=2, zero=3, reshard=True),
    "llama bf16 pp2 dp2 zero3 gpipe, last": _case(LLAMA, "bf16", pp=2, dp=2, zero=3, schedule="gpipe", at=1),
    "wide bf16 pp2 dp4 zero3 1f1b, last, freed, recompute": _case(
        WIDE, "bf16", pp=2, dp=4, zero=3, reshard=True, recompute=4, batch=32, sequence=64, at=1
    ),
    "wide bf16 pp2 dp4 zero3 1f1b, first, recompute": _case(
        WIDE, "bf16", pp=2, dp=4, zero=3, recompute=4, batch=32, sequence=64
    ),
    "gpt2 fp16 pp2 dp2 zero1 zb1p, last": _case(GPT2, "fp16", pp=2, dp=2, zero=1, schedule="zb1p", at=1),
    "llama fp8 one rank, recompute": _case(LLAMA, "fp8", micro_batch=4, recompute=4),
    "bert fp32, one rank": _case(BERT, "fp32", micro_batch=4),
    "bert bf16 tp2 sp, selective": _case(BERT, "bf16", tp=2, sequence_parallel=True, micro_batch=8, selective=4),
    "megatron-bert fp32 tp2 sp": _case(MEGATRON_BERT, "fp32", tp=2, sequence_parallel=True, micro_batch=4),
    "megatron-bert fp32 pp2 1f1b, last": _case(MEGATRON_BERT, "fp32", pp=2, at=1),
    "llama bf16 tp2, two pieces": _case(LLAMA, "bf16", tp=2, micro_batch=16, batch=32),
    "wide bf16 pp4 dp2 zero3 1f1b, first, four microbatches": _case(WIDE, "bf16", pp=4, dp=2, zero=3),
    "llama bf16 pp2 dp2 zero3 1f1b, first, freed, two microbatches": _case(
        LLAMA_8, "bf16", pp=2, dp=2, zero=3, reshard=True, batch=8
    ),
    "wide bf16 pp4 dp2 zero3 1f1b, last, four microbatches": _case(WIDE, "bf16", pp=4, dp=2, zero=3, at=3),
    "wide bf16 pp2·v4 dp2 tp2 sp zero3 looped-bfs, first": _case(
        WIDE, "bf16", pp=2, dp=2, tp=2, sequence_parallel=True, zero=3, virtual_stages=4, schedule="looped-bfs"
    ),
    "wide bf16 pp2·v2 dp2 zero3 looped-bfs, last, recompute": _case(
        WIDE, "bf16", pp=2, dp=2, zero=3, virtual_stages=2, schedule="looped-bfs", at=1, recompute=2
    ),
    "wide bf16 pp2·v4 dp2 zero3 looped-bfs, last": _case(
        WIDE, "bf16", pp=2, dp=2, zero=3, virtual_stages=4, schedule="looped-bfs", at=1, batch=32
    ),
    "gpt2 fp32 pp2 dp2 gpipe, first, recompute": _case(GPT2, "fp32", pp=2, dp=2, schedule="gpipe", recompute=2),
    "bert bf16 pp2 dp2 zero0 gpipe, last, selective, one microbatch": _case(
        BERT, "bf16", pp=2, dp=2, schedule="gpipe", micro_batch=4, batch=8, at=1, selective=2
    ),
    "llama fp32 pp4 1f1b, third, recompute 1 of 2": _case(LLAMA_8, "fp32", pp=4, micro_batch=4, at=2, recompute=1),
    "llama fp32 pp2·v2 dualpipev, first, four microbatches": _case(
        LLAMA_8, "fp32", pp=2, virtual_stages=2, schedule="dualpipev", micro_batch=4
    ),
}


def in_child(function: Callable[..., Any], cases: Iterable[Any]) -> list[Any]:
    """`function` of each case, in a process of its own: torch remembers process groups.

    Forked from a server that has imported torch and done nothing, since a fork of the tests' own process inherits what
    their threads have left and may crash when it collects garbage. A child that dies is an error, not a wait.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(2, mp_context=context, initializer=_quiet, max_tasks_per_child=1) as pool:
        return list(pool.map(function, cases, timeout=_SECONDS))


def plan_of(case: MemoryCase) -> Plan:
    job = TrainingJob(global_batch=case.global_batch, sequence=case.sequence, precision=case.precision)
    plan = make_plan(case.model, case.layout, job, recompute=case.recompute, selective=case.selective)
    return replace(plan, stages=tuple(replace(stage, reshard=case.reshard) for stage in plan.stages))


def run(case: MemoryCase, *, fake: bool = True) -> DryRun:
    """The case's rank, in this process, which must run no other."""
    layout = case.layout
    return dry_run(plan_of(case), case.pipeline_rank * (layout.world_size // layout.pp), fake=fake)


def parts_of(plan_and_rank: tuple[Plan, int], **options: Any) -> dict[str, int]:
    """Bytes by part of a plan's rank, and how many forwards there were; in this process, which must run no other."""
    plan, rank = plan_and_rank
    told: list[None] = []
    parts = dry_run(plan, rank, on_forward=lambda: told.append(None), **options).parts
    return parts | {"forwards": len(told)}


def predicted_parts(plan: Plan, pipeline_rank: int) -> dict[str, float]:
    """Bytes of a rank's tensors by part, as the planner has them."""
    hardware = small_hardware(backend="gloo", halves=("bf16", "fp16", "fp8"))
    prices = CostModel(plan.model, plan.cluster, hardware, plan.job)
    costs = prices.price(plan.layout, [stage.reshard for stage in plan.stages])
    items = costs.rank_memory(pipeline_rank, counts_of(plan.model, plan.stages)).items()
    return {part: size for part, size in items.items() if part not in _NO_TENSORS}


def compare(case: MemoryCase, *, fake: bool = True) -> Compared:
    """Predict and run a case in this process, which must run no other."""
    return Compared(predicted_parts(plan_of(case), case.pipeline_rank), run(case, fake=fake).parts)


def _quiet() -> None:
    warnings.simplefilter("ignore")  # torch's own, of the fake group
    torch.set_num_threads(1)
