"""The sacred test: loss and gradient norm of every step do not depend on the layout beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.model import ModelSpec
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import Trajectory, run_plain, run_plan, run_plan_in
from tests.plans import make_plan, tiny_gpt2, tiny_llama

STEPS = 10
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative
JOB = TrainingJob(global_batch=12, sequence=16, precision="fp32")
LLAMA = tiny_llama()
LLAMA_ONE_KV = tiny_llama(name="tiny-llama-kv1", kv_heads=1)
GPT2 = tiny_gpt2()


@dataclass(frozen=True)
class Case:
    """A layout of a model, its stage boundaries and recomputing blocks per stage."""

    model: ModelSpec
    layout: dict[str, Any]
    cuts: tuple[int, ...] | None = None
    recompute: tuple[int, ...] | None = None
    selective: tuple[int, ...] | None = None

    def plan(self) -> Plan:
        layout = Layout(**self.layout)
        if layout.zero and "dp_shard" not in self.layout:
            layout = Layout(**self.layout, dp_shard=layout.dp)
        return make_plan(self.model, layout, JOB, self.cuts, self.recompute, self.selective)


Counts = tuple[int, ...] | None


def llama(cuts: Counts = None, recompute: Counts = None, selective: Counts = None, **layout: Any) -> Case:
    return Case(LLAMA, {"micro_batch": 2} | layout, cuts, recompute, selective)


def gpt2(cuts: Counts = None, recompute: Counts = None, selective: Counts = None, **layout: Any) -> Case:
    return Case(GPT2, {"micro_batch": 2} | layout, cuts, recompute, selective)


def looped(schedule: str, chunks: int = 2, **layout: Any) -> dict[str, Any]:
    return {"pp": 2, "schedule": schedule, "virtual_stages": chunks} | layout


CASES = {
    "one rank": llama(),
    "one rank, micro_batch 1": llama(micro_batch=1),
    "tp2": llama(tp=2, micro_batch=6),
    "tp2 sp": llama(tp=2, sequence_parallel=True, micro_batch=6),
    "tp2 sp recompute": llama(tp=2, sequence_parallel=True, micro_batch=6, recompute=(4,)),
    "tp2 of 1 kv head": Case(LLAMA_ONE_KV, {"tp": 2, "micro_batch": 6}),
    "tp4 of 2 kv heads": llama(tp=4, micro_batch=12),
    "tp4 sp of 2 kv heads": llama(tp=4, sequence_parallel=True, micro_batch=12),
    "pp2 gpipe": llama(pp=2, schedule="gpipe"),
    "pp2 gpipe, 2 microbatches": llama(pp=2, schedule="gpipe", micro_batch=6),
    "pp2 1f1b": llama(pp=2),
    "pp2 1f1b, 12 microbatches": llama(pp=2, micro_batch=1),
    "pp2 recompute on one stage": llama(pp=2, recompute=(1, 0)),
    "pp4 uneven": llama(pp=4, cuts=(1, 2, 4), recompute=(0, 1, 1, 0)),
    "pp3, embedding alone": llama(pp=3, cuts=(0, 2)),
    "dp2 zero0": llama(dp=2),
    "dp2 zero1": llama(dp=2, zero=1),
    "dp2 zero2": llama(dp=2, zero=2),
    "dp2 zero3": llama(dp=2, zero=3),
    "dp2 zero3 recompute": llama(dp=2, zero=3, recompute=(2,)),
    "dp3 zero1, uneven shards": llama(dp=3, zero=1),
    "dp4 zero2": llama(dp=4, zero=2, micro_batch=1),
    "tp2 pp2": llama(tp=2, pp=2, micro_batch=6),
    "tp2 sp pp2 gpipe": llama(tp=2, pp=2, sequence_parallel=True, schedule="gpipe", micro_batch=6),
    "tp2 dp2 zero0": llama(tp=2, dp=2, micro_batch=3),
    "tp2 sp dp2 zero1": llama(tp=2, dp=2, sequence_parallel=True, zero=1, micro_batch=3),
    "tp2 sp dp2 zero3": llama(tp=2, dp=2, sequence_parallel=True, zero=3, micro_batch=3),
    "pp2 dp2 zero0": llama(pp=2, dp=2),
    "pp2 dp2 zero1": llama(pp=2, dp=2, zero=1),
    "pp2 dp2 zero3": llama(pp=2, dp=2, zero=3, recompute=(0, 2)),
    "selective": llama(selective=(4,)),
    "tp2 selective": llama(tp=2, selective=(4,), micro_batch=6),
    "tp2 sp selective and full": llama(tp=2, sequence_parallel=True, recompute=(1,), selective=(2,), micro_batch=6),
    "dp2 zero3 selective": llama(dp=2, zero=3, selective=(3,)),
    "pp2 dp2 zero1 selective": llama(pp=2, dp=2, zero=1, selective=(2, 1)),
    "dp4 hsdp2 zero1": llama(dp=4, dp_shard=2, zero=1, micro_batch=1),
    "dp4 hsdp2 zero3": llama(dp=4, dp_shard=2, zero=3, micro_batch=1),
    "interleaved": llama(**looped("interleaved-1f1b")),
    "interleaved, 3 chunks, uneven": llama(**looped("interleaved-1f1b", 3), cuts=(0, 1, 2, 3, 4)),
    "interleaved recompute": llama(**looped("interleaved-1f1b"), recompute=(1, 0, 1, 0), selective=(0, 1, 0, 1)),
    "interleaved dp2 zero1": llama(**looped("interleaved-1f1b", dp=2, zero=1)),
    "interleaved dp2 zero3": llama(**looped("interleaved-1f1b", dp=2, zero=3)),
    "interleaved tp2 sp": llama(**looped("interleaved-1f1b", tp=2, sequence_parallel=True, micro_batch=6)),
    "looped bfs": llama(**looped("looped-bfs")),
    "looped bfs dp2 zero0": llama(**looped("looped-bfs", dp=2)),
    "zb1p": llama(**looped("zb1p", 1)),
    "zb1p, 2 chunks, uneven": llama(**looped("zb1p"), cuts=(0, 2, 3)),
    "zb1p dp2 zero1": llama(**looped("zb1p", 1, dp=2, zero=1)),
    "zb1p tp2": llama(**looped("zb1p", 1, tp=2, micro_batch=6)),
    "zbv": llama(**looped("zbv")),
    "zbv dp2 zero0": llama(**looped("zbv", dp=2)),
    "zbv dp2 zero1": llama(**looped("zbv", dp=2, zero=1)),
    "zbv tp2 sp": llama(**looped("zbv", tp=2, sequence_parallel=True, micro_batch=3)),
    "dualpipev": llama(**looped("dualpipev")),
    "dualpipev dp2 zero1": llama(**looped("dualpipev", dp=2, zero=1, micro_batch=1)),
    "gpt2 zbv": gpt2(**looped("zbv")),
    "gpt2 interleaved": gpt2(**looped("interleaved-1f1b")),
    "gpt2 zbv dp2 zero1": gpt2(**looped("zbv", dp=2, zero=1)),
    "gpt2 one rank": gpt2(),
    "gpt2 tp2": gpt2(tp=2, micro_batch=6),
    "gpt2 tp2 sp": gpt2(tp=2, sequence_parallel=True, micro_batch=6),
    "gpt2 pp2": gpt2(pp=2),
    "gpt2 pp2 gpipe uneven": gpt2(pp=2, schedule="gpipe", cuts=(3,)),
    "gpt2 dp2 zero1": gpt2(dp=2, zero=1),
    "gpt2 dp2 zero3": gpt2(dp=2, zero=3),
    "gpt2 pp2 dp2 zero1": gpt2(pp=2, dp=2, zero=1),
    "gpt2 pp2 dp2 zero0": gpt2(pp=2, dp=2),
    "gpt2 tp2 sp pp2": gpt2(tp=2, pp=2, sequence_parallel=True, micro_batch=6),
    "gpt2 tp2 sp dp2 zero3": gpt2(tp=2, dp=2, sequence_parallel=True, zero=3, micro_batch=3),
}


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, torch.dtype], Trajectory]:
    """Plain torch, one process, by model and dtype."""
    plans = [Case(model, {"micro_batch": 2}).plan() for model in (LLAMA, LLAMA_ONE_KV, GPT2)]
    return {(plan.model.name, dtype): run_plain(plan, STEPS, dtype) for plan in plans for dtype in TOLERANCE}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_norm_do_not_depend_on_the_layout(
    name: str, references: dict[tuple[str, torch.dtype], Trajectory]
) -> None:
    plan = CASES[name].plan()
    steps = dict.fromkeys(TOLERANCE, STEPS)
    ranks = run_ranks(run_plan_in, plan.layout.world_size, plan, steps)
    for dtype, tolerance in TOLERANCE.items():
        expected = references[plan.model.name, dtype]
        for trajectory in (ranks[0][dtype], ranks[-1][dtype]):
            assert trajectory.losses == pytest.approx(expected.losses, rel=tolerance)
            assert trajectory.norms == pytest.approx(expected.norms, rel=tolerance)


def test_the_reference_learns(references: dict[tuple[str, torch.dtype], Trajectory]) -> None:
    # Equal numbers would prove little if the weights never moved.
    for trajectory in references.values():
        assert len(set(trajectory.norms)) == STEPS
        assert trajectory.losses[0] != pytest.approx(trajectory.losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        llama(pp=2, dp=2, zero=1),
        llama(tp=2, dp=2, sequence_parallel=True, zero=3, micro_batch=3),
        gpt2(pp=2, tp=2, micro_batch=6),
    ],
    ids=["pp2 dp2 zero1", "tp2 sp dp2 zero3", "gpt2 tp2 pp2"],
)
def test_clipping_follows_the_norm_of_the_whole_model(case: Case) -> None:
    plan, limit = case.plan(), 0.05
    expected = run_plain(Case(plan.model, {"micro_batch": 2}).plan(), 4, torch.float64, limit)
    clipped = run_ranks(run_plan, plan.layout.world_size, plan, 4, torch.float64, limit)[0]
    assert min(expected.norms) > limit
    assert clipped.norms == pytest.approx(expected.norms, rel=1e-6)  # torch adds 1e-6 to the norm it divides by
    assert clipped.losses == pytest.approx(expected.losses, rel=1e-6)
    # AdamW hardly sees a factor on all gradients, so they are looked at themselves.
    assert clipped.clipped_norms == pytest.approx([limit] * 4, rel=1e-6)
    assert expected.clipped_norms == pytest.approx([limit] * 4, rel=1e-4)
