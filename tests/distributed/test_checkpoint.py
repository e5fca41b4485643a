"""A checkpoint written under one layout loads under another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.input_error import InputError
from profiles.model import ModelSpec
from runtime import checkpoint
from runtime.checkpoint_folder import latest, step_of
from runtime.gradients import complete_gradients
from runtime.mesh import build_mesh
from runtime.optimizer import build_optimizer, set_learning_rate
from runtime.parallelize import build_chunks
from runtime.parameters import named_parameters
from runtime.pipeline import build_runner
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.layout_runs import own_tokens, tokens_of
from tests.plans import make_plan, tiny_gpt2, tiny_llama

Values = dict[str, torch.Tensor]


def plan_of(model: ModelSpec, **layout: Any) -> Plan:
    sharded = {"dp_shard": layout.get("dp", 1)} if layout.get("zero") else {}
    return make_plan(
        model, Layout(micro_batch=2, **layout, **sharded), TrainingJob(global_batch=8, sequence=16, precision="fp32")
    )


def values(chunks: Any, optimizer: torch.optim.AdamW) -> Values:
    """Every parameter and moment of this rank's chunks, whole."""
    found = {}
    for name, parameter in named_parameters(chunks):
        for key, tensor in {"value": parameter.detach(), **optimizer.state[parameter]}.items():
            found[f"{name}.{key}"] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
    return found


def train_and_save(plan: Plan, run_dir: Path) -> Values:
    mesh = build_mesh(plan.layout, "cpu", tied_embeddings=plan.model.tied_embeddings)
    chunks = build_chunks(plan, mesh, torch.device("cpu"), dtype=torch.float32, seed=0)
    optimizer = build_optimizer(chunks, weight_decay=0.1)
    runner = build_runner(plan, chunks, mesh, torch.device("cpu"), torch.float32)
    runner.step(*own_tokens(plan, tokens_of(plan, 0), mesh.coordinate.dp, mesh.coordinate.cp))
    complete_gradients(chunks, mesh)
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    checkpoint.save(run_dir, 7, chunks, optimizer, "")
    return values(chunks, optimizer)


def load(plan: Plan, folder: Path) -> tuple[int, Values]:
    mesh = build_mesh(plan.layout, "cpu", tied_embeddings=plan.model.tied_embeddings)
    chunks = build_chunks(plan, mesh, torch.device("cpu"), dtype=torch.float32, seed=1)
    optimizer = build_optimizer(chunks, weight_decay=0.1)
    return checkpoint.load(folder, chunks, optimizer), values(chunks, optimizer)


def merged(ranks: list[Values]) -> Values:
    return {name: tensor for rank in ranks for name, tensor in rank.items()}


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (plan_of(tiny_llama(), pp=2), plan_of(tiny_llama(), dp=2, zero=3)),
        (plan_of(tiny_llama(), tp=2, dp=2, zero=1), plan_of(tiny_llama(), pp=2)),
        (plan_of(tiny_gpt2(), dp=2), plan_of(tiny_gpt2(), tp=2, pp=2)),
        (plan_of(tiny_gpt2(), pp=2), plan_of(tiny_gpt2())),
        (plan_of(tiny_gpt2(), cp=2, cp_style="ring", zero=3), plan_of(tiny_gpt2(), pp=2)),
    ],
    ids=["pp2 to dp2 zero3", "tp2 dp2 zero1 to pp2", "tied dp2 to tp2 pp2", "tied pp2 to one rank", "cp2 zero3 to pp2"],
)
def test_a_checkpoint_loads_under_another_layout(writer: Plan, reader: Plan, tmp_path: Path) -> None:
    written = merged(run_ranks(train_and_save, writer.layout.world_size, writer, tmp_path))
    answers = run_ranks(load, reader.layout.world_size, reader, latest(tmp_path))
    assert {step for step, _ in answers} == {7}
    read = merged([found for _, found in answers])
    assert read.keys() == written.keys()
    assert len(read) == 4 * len({name.rpartition(".")[0] for name in read})  # value, step, two moments
    for name, tensor in written.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0, msg=name)


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for name in ("step_9", "step_10", ".step_11.unfinished", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest(tmp_path).name == "step_10"
    assert step_of(latest(tmp_path)) == 10
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        latest(tmp_path / "elsewhere")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run_ranks(train_and_save, 1, plan_of(tiny_llama()), tmp_path)
    with pytest.raises(RankError, match=r"InputError.*cannot be loaded.*a checkpoint of this plan's model"):
        run_ranks(load, 1, plan_of(tiny_llama(hidden_size=64, head_dim=16)), latest(tmp_path))
