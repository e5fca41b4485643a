"""Training on indexed datasets: the same losses under every layout and after a resume, with validation on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from planner.plan import Plan
from profiles.input_error import InputError
from runtime.data.data_options import DataOptions
from runtime.data.indexed_dataset import IndexedWriter
from runtime.data.packing import Packing
from runtime.launch import train
from runtime.learning_rate import RateSchedule
from runtime.plain_loop import run_plain
from runtime.trainer import TrainOptions, open_data
from tests.distributed.faults import small_plan

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """Two datasets of a few thousand tokens below 256, blended; training goes through both more than once."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("a", "b"):
        lengths = random.integers(1, 40, size=20)
        with IndexedWriter(str(folder / name), np.dtype(np.uint16)) as writer:
            writer.add(random.integers(0, 256, size=lengths.sum()), lengths)
    return DataOptions(paths=("0.3", str(folder / "a"), "0.7", str(folder / "b")), split="80,20", cache=folder)


def losses(plan: Plan, options: TrainOptions) -> np.ndarray:
    """Train; [steps, 2] loss and gradient norm of what the run folder holds."""
    train(plan, options, lambda _: None)
    records = map(json.loads, (options.run_dir / "metrics.jsonl").read_text().splitlines())
    return np.array([[record["loss"], record["grad_norm"]] for record in records])


def test_losses_depend_neither_on_the_layout_nor_on_a_resume(data: DataOptions, tmp_path: Path) -> None:
    whole = TrainOptions(run_dir=tmp_path / "whole", steps=STEPS, data=data, validation_every=2)
    expected = losses(small_plan(dp=2), whole)
    assert len(expected) == STEPS

    parts = replace(whole, run_dir=tmp_path / "parts", checkpoint_every=2)
    assert np.allclose(losses(small_plan(pp=2), parts), expected, rtol=1e-5)
    folder = parts.run_dir / "checkpoints"
    (folder / f"step_{STEPS}").rename(folder.parent / "later")
    assert np.allclose(losses(small_plan(pp=2), replace(parts, resume=True)), expected, rtol=1e-5)

    with pytest.raises(InputError, match="would not go on with the samples that follow"):
        train(small_plan(pp=2), replace(parts, resume=True, steps=STEPS + 1, seed=1), lambda _: None)

    records = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4]
    record = yaml.safe_load((whole.run_dir / "record.yaml").read_text())
    assert record["validation_loss"] == records[-1]["validation_loss"]
    assert record["token_unit"] == "token"
    assert record["bigram_loss"] is None
    assert record["data"].startswith("0.3 ")


def test_documents_of_a_run_are_packed_in_training_and_validation(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} " * (1 + number % 5))
    data = DataOptions(paths=(str(tmp_path / "text"),), reset_attention=True, reset_positions=True, mask_loss=True)
    plan, rate = small_plan(pp=2), 1e-3
    options = TrainOptions(
        run_dir=tmp_path / "run",
        steps=2,
        data=data,
        validation_batches=1,
        learning_rate=rate,
        min_learning_rate=rate,
        warmup_steps=0,
        schedule=RateSchedule(shape="constant"),
        clip_norm=None,
    )
    found = losses(plan, options)
    tokens, samples = open_data(plan, options), plan.job.global_batch
    packing = Packing(end=0, mask_loss=True)
    assert tokens.packing == packing
    batches = [tokens.batch(1, samples), tokens.batch(2, samples), tokens.validation_batch(0, samples)]
    assert all((batch[:, :-1] == 0).any() for batch in batches)
    expected = run_plain(
        plan.model,
        map(torch.from_numpy, batches),
        dtype=torch.float32,
        learning_rate=rate,
        weight_decay=options.weight_decay,
        seed=options.seed,
        packing=packing,
    )
    assert found == pytest.approx(np.array([expected.losses[:2], expected.norms[:2]]).T, rel=1e-5)
    record = yaml.safe_load((options.run_dir / "record.yaml").read_text())
    assert record["validation_loss"] == pytest.approx(expected.losses[2], rel=1e-5)
