"""A run's plan for other devices: the same job, what it costs, and what a resume takes from the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cli_ending
from cli import app
from planner.errors import InfeasibleError
from planner.plan import Plan, load, save
from planner.question import ask
from planner.replanning import Replan, cluster_left, plan_again
from planner.search import search
from profiles.input_error import InputError
from runtime import elastic, launch
from runtime.checkpoint_folder import FOLDER, STATE_FILE, StateText
from runtime.leaving import EXIT_CODE, Left
from runtime.trainer import TrainOptions

TINY = """
schema: meshwright.model/v1
name: tiny
family: llama
layers: 4
hidden_size: 32
ffn_hidden_size: 64
heads: 4
kv_heads: 2
vocab_size: 256
max_positions: 64
norm: rmsnorm
norm_epsilon: 1.0e-5
activation: swiglu
positions: rope
rope_theta: 10000.0
"""
SETTINGS = {"steps": 100, "learning_rate": 0.001, "data": None, "checkpoint_every": 5, "clip": 0.5, "seed": 3}


def plan_for(folder: Path, cluster: str = "dgx-h100:1", devices: int | None = 4, pins: tuple[str, ...] = ()) -> Plan:
    (folder / "tiny.yaml").write_text(TINY)
    question = ask(str(folder / "tiny.yaml"), cluster, 12, 16, devices=devices, precision="fp32", pins=pins)
    return search(question)


def run_of(plan: Plan, folder: Path, step: int = 40) -> Path:
    """A run's folder as far as its plan and what its checkpoint says, without tensors."""
    checkpoint = folder / FOLDER / f"step_{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).write_text(StateText(plan, SETTINGS).at(step))
    save(plan, folder / "plan.yaml")
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["cli.py", *arguments])
    return cli_ending.exit_code_of(app)


# ---- replan --------------------------------------------------------------------------------------------------


def test_the_job_stays_and_the_layout_fits_what_is_left(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    after, dropped = plan_again(plan, plan.cluster.with_devices(3), 60.0)
    assert (after.model, after.job, after.layout.world_size, dropped) == (plan.model, plan.job, 3, ())
    found = Replan(before=plan, after=after, steps_done=40, steps=100)
    assert found.gpu_hours_left(after) == 60 * after.prediction.step_seconds * 3 / 3600
    assert found.to_dict()["before"]["gpu_hours_left"] == 60 * plan.prediction.step_seconds * 4 / 3600


def test_pins_hold_as_long_as_they_can(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, pins=("dp=4",))
    twice, dropped = plan_again(plan, replace(plan.cluster), 60.0)
    assert (twice.layout.dp, dropped) == (4, ())
    after, dropped = plan_again(plan, plan.cluster.with_devices(3), 60.0)
    assert (after.layout.world_size, after.job.pins, dropped) == (3, {}, ("dp=4",))


def test_where_nothing_is_legal_it_says_so(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, devices=8)
    with pytest.raises(InfeasibleError):  # 7 ranks: no divisor of 4 layers, 4 heads or 12 samples
        plan_again(plan, plan.cluster.with_devices(7), 60.0)


def test_what_is_left_is_whole_nodes(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, "dgx-h100:3", devices=None)
    assert plan.layout.world_size == 24
    assert cluster_left(plan, None, 1, tmp_path).devices == 16
    assert cluster_left(plan, 8, None, tmp_path).devices == 8
    for devices, lost, said in ((None, 3, "1 to 2 of its 3 nodes"), (12, None, "a multiple of 8")):
        with pytest.raises(InputError, match=said):
            cluster_left(plan, devices, lost, tmp_path)
    for both in ((None, None), (8, 1)):
        with pytest.raises(InputError, match="one of --devices and --lost-nodes"):
            cluster_left(plan, *both, tmp_path)


def test_replan_writes_the_plan_and_keeps_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan_for(tmp_path)
    run_dir = run_of(before, tmp_path / "run")
    assert call(monkeypatch, "replan", str(run_dir), "--devices", "2", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["steps_done"], document["steps_left"], document["after"]["devices"]) == (40, 60, 2)
    assert load(run_dir / "plan.yaml").layout.world_size == 2
    assert load(run_dir / "plan_until_step_40.yaml") == before
    # Another one before it was ever followed: what trained until step 40 stays, and is what it starts from.
    assert call(monkeypatch, "replan", str(run_dir), "--devices", "3", "--steps", "400") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "after step 40 of 400" in said
    assert "the one before it is plan_until_step_40.yaml" in said
    assert load(run_dir / "plan_until_step_40.yaml") == before
    assert call(monkeypatch, "replan", str(run_dir), "--devices", "3", "--steps", "40") == 2
    assert "nothing left to plan for" in capsys.readouterr().err
    assert call(monkeypatch, "replan", str(run_dir), "--cluster", "dgx-h100:2", "--lost-nodes", "1") == 0
    assert load(run_dir / "plan.yaml").layout.world_size == 8


# ---- what a resume remembers ---------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainOptions]:
    """What `train` would have started."""
    found: list[TrainOptions] = []
    monkeypatch.setattr(launch, "train", lambda _, options, __: found.append(options))
    return found


def test_options_not_given_are_the_runs(
    tmp_path: Path, asked: list[TrainOptions], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_of(plan_for(tmp_path), tmp_path / "run")
    assert call(monkeypatch, "train", "--resume", "--lr", "0.002", "--clip", "0.5", "--run-dir", str(run_dir)) == 0
    (options,) = asked
    assert (options.steps, options.checkpoint_every, options.clip_norm, options.seed) == (100, 5, 0.5, 3)
    assert options.learning_rate == 0.002
    assert options.settings["learning_rate"] == 0.002
    assert options.settings["checkpoint_every"] == 5
    assert not options.settings.keys() & {"run_dir", "resume", "time_limit", "context"}
    assert capsys.readouterr().err.strip() == "other than in the run so far: --lr 0.002 (until now 0.001)"


def test_what_is_remembered_survives_yaml_as_it_was(
    tmp_path: Path, asked: list[TrainOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings of one start, through a checkpoint, are those of the next."""
    plan = plan_for(tmp_path)
    save(plan, tmp_path / "plan.yaml")
    arguments = ["--steps", "9", "--async-checkpoint", "--data", str(tmp_path), "--keep-checkpoints", "2"]
    first = ["train", str(tmp_path / "plan.yaml"), "--run-dir", str(tmp_path / "run"), *arguments]
    assert call(monkeypatch, *first) == 0
    checkpoint = tmp_path / "run" / FOLDER / "step_4"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).write_text(StateText(plan, asked[0].settings).at(4))
    save(plan, tmp_path / "run" / "plan.yaml")
    assert call(monkeypatch, "train", "--run-dir", str(tmp_path / "run"), "--resume") == 0
    assert asked[1] == replace(asked[0], resume=True)
    assert (asked[1].data.paths, asked[1].async_checkpoint, asked[1].keep_checkpoints) == ((str(tmp_path),), True, 2)


def raising(error: Exception) -> Callable[..., None]:
    def train(*_: Any) -> None:
        raise error

    return train


def test_a_run_that_left_has_an_exit_code_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_of(plan_for(tmp_path), tmp_path / "run")
    monkeypatch.setattr(launch, "train", raising(Left("left after step 60 of 100")))
    assert call(monkeypatch, "train", "--run-dir", str(run_dir), "--resume") == EXIT_CODE == 75
    assert "left after step 60 of 100" in capsys.readouterr().err


def test_elastic_without_torchrun_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "train", "plan.yaml", "--run-dir", str(tmp_path), "--elastic") == 2
    assert "torchrun --nnodes MIN:MAX" in capsys.readouterr().err


# ---- elastic: what each rank takes for the plan ----------------------------------------------------------------


def test_ranks_of_an_elastic_run_agree_on_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run_dir, file = plan_for(tmp_path), tmp_path / "run", tmp_path / "plan.yaml"
    save(plan, file)
    planned: list[int] = []

    def plan_anew(base: Plan, devices: int) -> Plan:
        assert base == plan
        planned.append(devices)
        return plan_again(base, base.cluster.with_devices(devices), 60.0)[0]

    def taken(ranks: int, rank: int) -> Path:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("RANK", str(rank))
        return elastic.plan_for_ranks(file, run_dir, plan_anew)

    assert [taken(4, rank) for rank in (1, 0)] == [file, file]
    run_of(plan, run_dir, 15)
    assert [taken(3, rank) for rank in (0, 1, 2)] == [run_dir / "plan.yaml"] * 3
    assert planned == [3]
    assert load(run_dir / "plan.yaml").layout.world_size == 3
    assert load(run_dir / "plan_until_step_15.yaml") == plan
    assert [taken(4, rank) for rank in (0, 3)] == [file, file]  # a node has come back
    monkeypatch.setattr(elastic, "_PLAN_SECONDS", 0.3)
    with pytest.raises(InputError, match="rank 0 has made no plan for 2 ranks"):
        taken(2, 1)


def test_a_store_that_dies_with_the_first_agent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        elastic.check_elastic(tmp_path / "plan.yaml", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert elastic.check_elastic(tmp_path / "plan.yaml", tmp_path) == (tmp_path / "plan.yaml", tmp_path)
    with pytest.raises(InputError, match="--run-dir FOLDER"):
        elastic.check_elastic(tmp_path / "plan.yaml", None)
