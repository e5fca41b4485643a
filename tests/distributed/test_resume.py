"""A run that goes on under another layout, or another number of ranks, goes on as if nothing had happened."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.model import ModelSpec
from runtime import checkpoint
from runtime.checkpoint_folder import FOLDER, StateText, complete_steps, latest
from runtime.checkpoint_writer import CheckpointWriter
from runtime.step import StepResult, TrainState, build_state, training_step
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import BALANCE, LEARNING_RATE, SEED, WEIGHT_DECAY, own_tokens, tokens_of
from tests.plans import make_plan, tiny_experts, tiny_gpt2, tiny_llama

STEPS, SAVED = 6, 3  # of the uninterrupted run, and after how many the others change
CLOSE = 1e-5  # relative, of losses and norms in fp32
CPU = torch.device("cpu")


def plan_of(model: ModelSpec, cuts: tuple[int, ...] | None = None, **layout: Any) -> Plan:
    job = TrainingJob(global_batch=12, sequence=16, precision="fp32")
    return make_plan(model, Layout(**{"micro_batch": 1, **layout}), job, cuts)


DENSE = {
    "one rank": plan_of(tiny_llama(), micro_batch=4),
    "tp2": plan_of(tiny_llama(), tp=2, micro_batch=2),
    "pp2 in 4 chunks": plan_of(tiny_llama(), pp=2, schedule="interleaved-1f1b", virtual_stages=2),
    "dp4 zero3": plan_of(tiny_llama(), dp=4, zero=3, dp_shard=4),
    "HSDP": plan_of(tiny_llama(), dp=4, zero=3, dp_shard=2),
    "cp2 zero3": plan_of(tiny_llama(), cp=2, cp_style="ring", dp=2, zero=3, dp_shard=2, micro_batch=2),
    "dp3 zero1": plan_of(tiny_llama(), dp=3, zero=1, dp_shard=3, micro_batch=2),
    "pp3 uneven": plan_of(tiny_llama(), (1, 3), pp=3, schedule="1f1b"),
    "tp2 pp2 with sequence": plan_of(tiny_llama(), tp=2, pp=2, schedule="gpipe", sequence_parallel=True),
    "zbv": plan_of(tiny_llama(), pp=2, schedule="zbv", virtual_stages=2),
}
EXPERTS = {
    "one rank": plan_of(tiny_experts()),
    "ep2": plan_of(tiny_experts(), dp=2, ep=2),
    "tp2 ep2": plan_of(tiny_experts(), tp=2, dp=2, ep=2, sequence_parallel=True),
    "pp2 zero1": plan_of(tiny_experts(), pp=2, dp=2, ep=2, zero=1, dp_shard=2, schedule="1f1b"),
}
TIED = {
    "one rank": plan_of(tiny_gpt2(), micro_batch=2),
    "pp2": plan_of(tiny_gpt2(), pp=2, schedule="1f1b"),
    "tp2": plan_of(tiny_gpt2(), tp=2),
}
FAMILIES = {"dense": DENSE, "experts": EXPERTS, "tied": TIED}
Losses = list[float]


def start(plan: Plan) -> TrainState:
    return build_state(plan, CPU, dtype=torch.float32, seed=SEED, weight_decay=WEIGHT_DECAY, balance=BALANCE)


def step_of_training(state: TrainState, plan: Plan, step: int, **wishes: Any) -> StepResult:
    here = state.mesh.coordinate
    inputs, targets = own_tokens(plan, tokens_of(plan, step), here.dp, here.cp)
    return training_step(state, inputs, targets, learning_rate=LEARNING_RATE, clip_norm=1.0, **wishes)


def train_on(state: TrainState, plan: Plan, first: int, last: int) -> Losses:
    """Loss and gradient norm of the steps [first, last), counted from 0."""
    results = [step_of_training(state, plan, step) for step in range(first, last)]
    return [number for result in results for number in (result.loss, result.grad_norm)]


def write(plan: Plan, run_dir: Path) -> Losses:
    """The whole run, with a checkpoint on the way."""
    state = start(plan)
    before = train_on(state, plan, 0, SAVED)
    checkpoint.save(run_dir, SAVED, state.chunks, state.optimizer, StateText(plan, {}).at(SAVED))
    return before + train_on(state, plan, SAVED, STEPS)


def go_on(plan: Plan, folders: dict[str, Path]) -> dict[str, Losses]:
    """The rest of the run, from each of the checkpoints."""
    found = {}
    for name, folder in folders.items():
        state = start(plan)
        assert checkpoint.load(folder, state.chunks, state.optimizer) == SAVED
        found[name] = train_on(state, plan, SAVED, STEPS)
    return found


def hold(pairs: dict[str, list[str]], plans: dict[str, Plan], tmp_path: Path) -> None:
    """For each reader and writer of `pairs`: the resumed run's losses and norms are the uninterrupted one's."""
    writers = sorted({writer for group in pairs.values() for writer in group})
    whole = {name: run_ranks(write, plans[name].layout.world_size, plans[name], tmp_path / name) for name in writers}
    first = whole[writers[0]][0]
    assert len(set(first)) == 2 * STEPS
    for reader, group in pairs.items():
        folders = {writer: latest(tmp_path / writer) for writer in group}
        for ranks in run_ranks(go_on, plans[reader].layout.world_size, plans[reader], folders, timeout_seconds=300.0):
            for writer, found in ranks.items():
                assert found == pytest.approx(whole[writer][0][2 * SAVED :], rel=CLOSE), f"{writer} to {reader}"
                assert found == pytest.approx(first[2 * SAVED :], rel=CLOSE), f"{writer} to {reader}"


def test_a_run_goes_on_under_other_layouts(tmp_path: Path) -> None:
    pairs = {
        "tp2": ["pp2 in 4 chunks", "dp3 zero1", "cp2 zero3"],
        "pp2 in 4 chunks": ["dp3 zero1"],
        "one rank": ["dp3 zero1"],
    }
    hold(pairs, DENSE, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_under_every_other_layout(family: str, tmp_path: Path) -> None:
    plans = FAMILIES[family]
    hold({reader: [name for name in plans if name != reader] for reader in plans}, plans, tmp_path)


def test_there_are_enough_pairs() -> None:
    assert sum(len(list(itertools.permutations(plans, 2))) for plans in FAMILIES.values()) >= 20


def a_leg(plan: Plan, run_dir: Path, first: int, last: int) -> Losses:
    state = start(plan)
    if first > 0:
        assert checkpoint.load(latest(run_dir), state.chunks, state.optimizer) == first
    found = train_on(state, plan, first, last)
    checkpoint.save(run_dir, last, state.chunks, state.optimizer, StateText(plan, {}).at(last))
    return found


@pytest.mark.full
def test_a_run_goes_on_with_4_2_3_and_1_ranks(tmp_path: Path) -> None:
    legs = [DENSE["HSDP"], DENSE["pp2 in 4 chunks"], DENSE["dp3 zero1"], DENSE["one rank"]]
    found: Losses = []
    for index, plan in enumerate(legs):
        found += run_ranks(a_leg, plan.layout.world_size, plan, tmp_path / "legs", 2 * index, 2 * index + 2)[0]
    whole = run_ranks(a_leg, 1, DENSE["one rank"], tmp_path / "whole", 0, 2 * len(legs))[0]
    assert found == pytest.approx(whole, rel=CLOSE)
    assert sorted(complete_steps(tmp_path / "legs")) == [2, 4, 6, 8]


# ---- beside training -----------------------------------------------------------------------------------------


def tensors(state: TrainState, step: int) -> dict[str, torch.Tensor]:
    """A copy of what a checkpoint would hold of this rank."""
    found = checkpoint.state_of(state.chunks, state.optimizer, step)
    return {name: getattr(tensor, "_local_tensor", tensor).detach().clone() for name, tensor in found.items()}


def write_beside(plan: Plan, run_dir: Path) -> tuple[list[bool], list[tuple[bool, ...]], list[int]]:
    """Whether asynchronous checkpoints hold what was there when they were asked for, though training went on at once;
    and what wishes of rank 1 the ranks hear of."""
    state = start(plan)
    text = StateText(plan, {})
    writer = CheckpointWriter(run_dir, state.chunks, state.optimizer, text, keep=3, asynchronous=True)
    at, heard = {}, []
    for step in range(1, 5):
        wishes = (dist.get_rank() == 1 and step == 2, dist.get_rank() == 1 and step > 2)
        heard.append(step_of_training(state, plan, step, wishes=wishes).wishes)
        at[step] = tensors(state, step)
        writer.write(step)
        writer.poll()
    train_on(state, plan, 5, 7)
    writer.finish()
    dist.barrier()
    same = []
    for step in sorted(complete_steps(run_dir)):
        other = start(plan)
        assert checkpoint.load(run_dir / FOLDER / f"step_{step}", other.chunks, other.optimizer) == step
        loaded = tensors(other, step)
        same.append(loaded.keys() == at[step].keys() and all(loaded[n].equal(t) for n, t in at[step].items()))
    return same, heard, [found.step for found in writer.written]


def test_a_checkpoint_beside_training_holds_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    plan = plan_of(tiny_llama(), dp=2, zero=3, dp_shard=2, micro_batch=2)
    for same, heard, written in run_ranks(write_beside, 2, plan, tmp_path):
        assert same == [True, True, True]
        assert heard == [(False, False), (True, False), (False, True), (False, True)]
        assert written == [1, 2, 3, 4]
    assert sorted(complete_steps(tmp_path)) == [2, 3, 4]
