"""A run that is watched: its log, its traces, steps left out for their norm, and ranks that srun starts."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from planner.schedule import action_lists
from planner.trace_names import UPDATE
from profiles.input_error import InputError
from profiles.parent_process import die_with_parent
from runtime.launch import start_ranks, train
from runtime.learning_rate import RateSchedule
from runtime.parameters import named_parameters
from runtime.run_folder import prepare
from runtime.step import build_state, training_step
from runtime.trainer import TrainOptions
from runtime.watching import Watching
from tests.distributed.faults import compute_slowly_on_rank_one, small_plan
from tests.distributed.harness import run_ranks
from tests.distributed.layout_runs import own_samples, tokens_of

ROOT = Path(__file__).parents[2]


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    plan, options = small_plan(dp=2), TrainOptions(run_dir=tmp_path, steps=8)
    prepare(tmp_path, plan, steps=options.steps, resume=False)
    start_ranks(plan, options, compute_slowly_on_rank_one)
    measured = yaml.safe_load((tmp_path / "record.yaml").read_text())["measured"]
    (slow,) = measured["stragglers"]
    assert (slow["rank"], slow["stage"]) == (1, 0)
    assert slow["slower"] > 1.2


def test_a_run_leaves_its_log_and_traces(tmp_path: Path) -> None:
    plan, seen = small_plan(pp=2), []
    watching = Watching(log_every=4, profile_steps=(6, 7))
    schedule = RateSchedule(shape="linear")
    train(plan, TrainOptions(run_dir=tmp_path, steps=10, schedule=schedule, watching=watching), seen.append)
    assert seen[-1]["lr"] == pytest.approx(3e-3)  # the warm-up's last
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("|")[0].split("]")[1].split() for line in lines[:3]] == [
        ["iteration", f"{step}/", "10"] for step in (4, 8, 10)
    ]
    assert lines[3].startswith(" validation loss at iteration 10 | lm loss value: ")
    mean = sum(record["loss"] for record in seen[4:8]) / 4
    assert f"lm loss: {mean:.6E}" in lines[1]

    events = json.loads((tmp_path / "trace" / "measured.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for rank, actions in enumerate(action_lists(plan.layout.pipeline(plan.microbatches))):
        for step in (6, 7):
            own = [event for event in spans if (event["pid"], event["args"]["step"]) == (rank, step)]
            assert [event["name"] for event in own] == [*map(str, actions), f"{rank}R", UPDATE]
            for event, after in pairwise(own):
                assert 0 <= event["ts"] < event["ts"] + event["dur"] <= after["ts"] + 1e-3
    # On the one clock of both ranks no action ends before what it waits for has begun. (It may before that has ended:
    # rank 0 writes down the end of its forward when what the forward has sent is long there.)
    begins = {(e["args"]["step"], e["name"]): e["ts"] for e in spans}
    ends = {(e["args"]["step"], e["name"]): e["ts"] + e["dur"] for e in spans}
    assert all(begins[step, "0F0"] < ends[step, "1F0"] < ends[step, "0B0"] for step in (6, 7))
    for rank in (0, 1):
        with gzip.open(tmp_path / "trace" / f"rank_{rank}.json.gz") as file:
            traced = json.load(file)["traceEvents"]
        assert any(event.get("name") == "aten::mm" for event in traced)
    record = yaml.safe_load((tmp_path / "record.yaml").read_text())
    assert record["spiked_steps"] == 0
    assert isinstance(record["measured"]["stragglers"], list)


def updates_under(limits: tuple[float, ...]) -> list[tuple[bool, float]]:
    """A step under each limit of the norm: whether it was made, and how far it moved the weights of this rank."""
    plan = small_plan(dp=2, zero=3, dp_shard=2)
    state = build_state(plan, torch.device("cpu"), dtype=torch.float32, seed=0, weight_decay=0.1)
    found = []
    for step, limit in enumerate(limits):
        before = [p.to_local().clone() for _, p in named_parameters(state.chunks)]  # type: ignore[attr-defined]
        tokens = own_samples(plan, tokens_of(plan, step), state.mesh.coordinate.dp)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        result = training_step(state, inputs, targets, learning_rate=1e-2, clip_norm=1.0, norm_limit=limit)
        after = [p.to_local() for _, p in named_parameters(state.chunks)]  # type: ignore[attr-defined]
        moved = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
        found.append((result.updated, moved))
    return found


def test_a_step_above_the_limit_changes_nothing_on_any_rank() -> None:
    for found in run_ranks(updates_under, 2, (float("inf"), 1e-3, 1e3)):
        assert [made for made, _ in found] == [True, False, True]
        assert found[1][1] == 0.0
        assert min(found[0][1], found[2][1]) > 1e-4


def test_a_window_after_the_run_is_refused(tmp_path: Path) -> None:
    options = TrainOptions(run_dir=tmp_path / "run", steps=4, watching=Watching(profile_steps=(5, 6)))
    with pytest.raises(InputError, match=r"--profile-steps; expected: a first step of at most 4; got: 5"):
        train(small_plan(pp=2), options, print)
    assert not (tmp_path / "run").exists()


def test_srun_joins(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from runtime.launch import train; from runtime.trainer import TrainOptions\n"
        "from tests.distributed.faults import small_plan\n"
        "train(small_plan(dp=2), TrainOptions(run_dir=Path(sys.argv[1]), steps=2), print)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared: dict[str, Any] = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(port),  # the job's own may be taken here, where there is no Slurm
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "run")],
            env=os.environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        for rank in (0, 1)
    ]
    said = [task.communicate(timeout=90) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "'step': 2" in said[0][0]
    assert said[1][0] == ""
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
