"""What torch runs wrongly and our rules forbid: each test fails on the day on which torch has mended it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed._composable.replicate import replicate as ddp_replicate
from torch.torch_version import TorchVersion

from planner.layout import Layout
from planner.plan import Plan
from planner.rules import RuleContext, violations, why_no_recompute
from runtime import parallelize
from runtime.mesh import RankMesh
from runtime.step import build_state, training_step
from runtime.transformer import Block, Chunk
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.layout_runs import own_samples, run_plain, run_plan, tokens_of
from tests.distributed.pairwise import JOB
from tests.plans import make_plan, tiny_latent, tiny_llama

MODEL = tiny_llama()
SPLIT = {"zb1p": 1, "zbv": 2, "dualpipev": 2}  # schedule -> chunks a rank
MENDED = "torch has mended this: lift the rule, and let the layouts of pairwise.py have it"


def plan_of(recompute: str = "none", model: Any = MODEL, **layout: Any) -> Plan:
    sharded = {"dp_shard": layout["dp"]} if layout.get("zero") else {}
    chosen = Layout(pp=2, **layout, **sharded)
    each = [model.layers // chosen.stages] * chosen.stages
    counts = {"full": (each, None), "selective": (None, each), "none": (None, None)}[recompute]
    return make_plan(model, chosen, JOB, None, *counts, check=False)


def is_right(plan: Plan, run: Any = run_plan) -> bool:
    """Whether loss and gradient norm of two steps are those of a plain loop; a run that raises is not right."""
    expected = run_plain(make_plan(plan.model, Layout(), JOB), 2, torch.float64)
    try:
        found = run_ranks(run, plan.layout.world_size, plan, 2, torch.float64)[0]
    except RankError:
        return False
    return found.losses == pytest.approx(expected.losses, rel=1e-9) and found.norms == pytest.approx(
        expected.norms, rel=1e-9
    )


@pytest.mark.parametrize("schedule", SPLIT)
def test_split_backward_loses_gradients_of_weights_that_are_freed(schedule: str) -> None:
    plan = plan_of(schedule=schedule, virtual_stages=SPLIT[schedule], dp=2, zero=3, micro_batch=1)
    assert any("loses gradients" in reason for reason in violations(plan.layout, RuleContext(MODEL, JOB, 4)))
    # What is lost depends on whose memory is given out again, and now and then nothing is.
    assert not all(is_right(plan) for _ in range(4)), MENDED


def block_forwards(plan: Plan) -> int:
    """How often a block's forward runs on this rank in a step."""
    state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.0)
    runs = []
    for module in (module for chunk in state.chunks for module in chunk.modules()):
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    tokens = own_samples(plan, tokens_of(plan, 0), state.mesh.coordinate.dp)
    training_step(state, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), learning_rate=1e-3, clip_norm=None)
    return len(runs)


@pytest.mark.parametrize("schedule", SPLIT)
def test_split_backward_recomputes_several_times_over(schedule: str) -> None:
    plan = plan_of("full", schedule=schedule, virtual_stages=SPLIT[schedule], micro_batch=1)
    assert why_no_recompute("full", plan.layout, RuleContext(MODEL, JOB, 2)) is not None
    once_again = 2 * MODEL.layers * plan.microbatches
    assert sum(run_ranks(block_forwards, 2, plan)) > 1.2 * once_again, MENDED


def test_recomputation_runs_once_where_it_is_allowed() -> None:
    plan = plan_of("full", schedule="interleaved-1f1b", virtual_stages=2, micro_batch=1)
    assert sum(run_ranks(block_forwards, 2, plan)) == 2 * MODEL.layers * plan.microbatches


@pytest.mark.parametrize("schedule", SPLIT)
def test_split_backward_does_not_run_selective_recomputation(schedule: str) -> None:
    plan = plan_of("selective", schedule=schedule, virtual_stages=SPLIT[schedule], micro_batch=1)
    assert why_no_recompute("selective", plan.layout, RuleContext(MODEL, JOB, 2)) is not None
    assert not is_right(plan), MENDED


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="torch 2.11 and 2.12 run it")
def test_selective_recomputation_around_a_part_of_fsdp_raises() -> None:
    # Of some models and grids only; which, and why, is not known.
    model = tiny_latent()
    layout = Layout(tp=2, dp=2, etp=2, sequence_parallel=True, zero=1, dp_shard=2)
    assert why_no_recompute("selective", layout, RuleContext(model, JOB, 4)) is not None
    assert not is_right(make_plan(model, layout, JOB, None, None, [model.layers])), MENDED


def with_ddp(plan: Plan, steps: int, dtype: torch.dtype) -> Any:
    def wrap(chunk: Chunk, mesh: RankMesh, **_: Any) -> None:
        ddp_replicate(chunk, device_mesh=mesh.axis("dp"))

    everywhere = mock.patch.object(Layout, "on_fsdp", return_value=True)
    with everywhere, mock.patch.object(parallelize, "apply_data_parallel", wrap):
        return run_plan(plan, steps, dtype)


def test_ddp_under_a_pipeline_is_silently_wrong() -> None:
    # Why zero 0 sums its gradients by itself.
    assert not is_right(plan_of(schedule="1f1b", dp=2, micro_batch=1), with_ddp), MENDED
    assert is_right(plan_of(schedule="1f1b", dp=2, micro_batch=1))


def test_split_backward_of_one_microbatch_in_16_bits_cannot_reduce() -> None:
    """Gradients that were summed are fp32, those of weights' halves are not; FSDP2 reduces one precision at once."""
    job, layout = replace(JOB, precision="bf16"), Layout(pp=2, schedule="zb1p", micro_batch=JOB.global_batch)
    (reason,) = violations(layout, RuleContext(MODEL, job, 2))
    assert reason.startswith("zb1p with one microbatch in bf16: ")
    assert violations(layout, RuleContext(MODEL, JOB, 2)) == ()
    plan = make_plan(MODEL, layout, job, check=False)
    with pytest.raises(RankError, match="uniform gradient dtype"):  # else torch has mended it: lift the rule
        run_ranks(run_plan, 2, plan, 1, torch.float32)
