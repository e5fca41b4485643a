"""Checkpoints on disk: none is lost by a kill at any moment, and none runs code when it is read."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.input_error import InputError
from runtime.checkpoint_folder import (
    FOLDER,
    STATE_FILE,
    RunState,
    StateText,
    complete_steps,
    keep_newest,
    latest,
    publish,
    remove_unfinished,
    unfinished,
)
from runtime.checkpoint_index import METADATA_FILE, SafeReader
from runtime.run_folder import prepare
from tests.plans import make_plan, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process, as meant
JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
PLAN = make_plan(tiny_llama(vocab_size=256), Layout(micro_batch=2), JOB)
SETTINGS = {"steps": 20, "learning_rate": 1e-3, "data": None}


def put(run_dir: Path, *steps: int, plan: Plan = PLAN) -> None:
    """Checkpoints of one tensor."""
    for step in steps:
        folder = unfinished(run_dir, step)
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text(StateText(plan, SETTINGS).at(step))
        state_dict_saver.save({"a": torch.arange(12.0).view(4, 3)}, checkpoint_id=str(folder), no_dist=True)
        publish(run_dir, step)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    put(tmp_path, 5, 10)
    return tmp_path


def test_a_checkpoint_says_what_run_it_is_of(run_dir: Path) -> None:
    state = RunState.read(latest(run_dir))
    assert (state.step, state.samples, state.plan, dict(state.settings)) == (10, 80, PLAN, SETTINGS)
    os.rename(latest(run_dir), run_dir / FOLDER / "step_11")
    with pytest.raises(InputError, match=r"step_11/run\.yaml: step; expected: 11, as the folder is named; got: 10"):
        RunState.read(latest(run_dir))


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("work", ["publish", "publish again", "delete"])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(
    work: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each change of a name or a file in turn: what is found then is whole, and later work clears the rest."""

    def act() -> None:
        if work == "delete":
            keep_newest(run_dir, 1)
            return
        step = 10 if work == "publish again" else 15
        shutil.rmtree(unfinished(run_dir, step), ignore_errors=True)
        shutil.copytree(run_dir / FOLDER / "step_5", unfinished(run_dir, step))
        publish(run_dir, step)

    moments = 0
    while True:
        calls = iter(range(moments, -1, -1))

        def dying(real: Callable[..., Any], calls: Any = calls) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls, None) == 0:
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                act()
                break
            except Killed:
                moments += 1
        whole = complete_steps(run_dir)
        assert whole
        assert max(whole) >= (5 if work == "publish again" else 10)
        for step in whole:
            SafeReader(run_dir / FOLDER / f"step_{step}")
        remove_unfinished(run_dir)
        shutil.rmtree(run_dir / FOLDER)
        put(run_dir, 5, 10)
    assert moments > 3
    assert max(complete_steps(run_dir)) == (15 if work == "publish" else 10)


def test_the_newest_are_kept(run_dir: Path) -> None:
    put(run_dir, 100)
    keep_newest(run_dir, 0)
    assert sorted(complete_steps(run_dir)) == [5, 10, 100]
    keep_newest(run_dir, 2)
    assert sorted(os.listdir(run_dir / FOLDER)) == ["step_10", "step_100"]


# ---- reading without running ---------------------------------------------------------------------------------


class Bomb:
    """A pickle that calls."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def spoil(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / METADATA_FILE
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))


def with_objects(metadata: Any) -> Any:
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    return metadata


def with_a_bomb(metadata: Any) -> Any:
    metadata.planner_data = Bomb()
    return metadata


def elsewhere(metadata: Any) -> Any:
    for part in metadata.storage_data.values():
        part.relative_path = "../step_5/__0_0.distcp"
    return metadata


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a call": (with_a_bomb, "it asks for posix.mkdir"),
    "a call instead": (lambda _: Bomb(), "it asks for posix.mkdir"),
    "objects beside tensors": (with_objects, "it asks for torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
    "something else": (lambda _: {"a": 1}, "expected: an index of tensors; got: dict"),
    "a file of another": (elsewhere, "expected: names of files in the same folder; got: ../step_5/__0_0.distcp"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_index_that_would_run_code_is_refused(what: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    change, said = REFUSED[what]
    spoil(latest(run_dir), change)
    with pytest.raises(InputError) as error:
        SafeReader(latest(run_dir))
    assert said in str(error.value)
    assert not (run_dir / "exploded").exists()


def test_a_tensor_that_would_run_code_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That torch loads with weights_only where it reads our tensors; a later one that does not fails here."""
    monkeypatch.chdir(run_dir)
    data = next(latest(run_dir).glob("*.distcp"))
    bomb = io.BytesIO()
    torch.save(Bomb(), bomb)
    data.write_bytes(bomb.getvalue().ljust(data.stat().st_size, b"\0"))
    spoil(latest(run_dir), lambda metadata: _as_long(metadata, len(bomb.getvalue())))
    with pytest.raises(BaseException, match="mkdir"):
        state_dict_loader.load({"a": torch.zeros(4, 3)}, storage_reader=SafeReader(latest(run_dir)), no_dist=True)
    assert not (run_dir / "exploded").exists()


def _as_long(metadata: Any, length: int) -> Any:
    for part in metadata.storage_data.values():
        part.length = length
    return metadata


def test_a_whole_checkpoint_is_read(run_dir: Path) -> None:
    state = {"a": torch.zeros(4, 3)}
    state_dict_loader.load(state, storage_reader=SafeReader(latest(run_dir)), no_dist=True)
    assert state["a"].equal(torch.arange(12.0).view(4, 3))


def test_damage_is_named(run_dir: Path) -> None:
    data = next(latest(run_dir).glob("*.distcp"))
    size = data.stat().st_size
    os.truncate(data, size - 1)
    with pytest.raises(InputError, match=rf"{data.name}; expected: a file of {size} bytes; got: {size - 1} bytes"):
        prepare(run_dir, PLAN, steps=20, resume=True)
    data.unlink()
    with pytest.raises(InputError, match=r"got: no file; try: delete .*step_10 to resume from the checkpoint before"):
        prepare(run_dir, PLAN, steps=20, resume=True)
    (latest(run_dir) / METADATA_FILE).write_bytes(b"not a pickle")
    with pytest.raises(InputError, match="an index of tensors, and nothing to call"):
        prepare(run_dir, PLAN, steps=20, resume=True)


# ---- what a run's folder allows ------------------------------------------------------------------------------


def test_a_fresh_run_does_not_mix_with_another(run_dir: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run already.*checkpoints up to step 10.*--resume"):
        prepare(run_dir, PLAN, steps=20, resume=False)


def test_another_layout_goes_on_and_the_plan_before_it_stays(run_dir: Path) -> None:
    (run_dir / "plan.yaml").write_text("what was there")
    other = make_plan(PLAN.model, Layout(dp=2, micro_batch=1), JOB)
    prepare(run_dir, other, steps=20, resume=True)
    prepare(run_dir, other, steps=20, resume=True)
    assert (run_dir / "plan_until_step_10.yaml").read_text() == "what was there"
    assert len(list(run_dir.glob("plan*.yaml"))) == 2


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (make_plan(tiny_llama(vocab_size=256, layers=6), Layout(), JOB), "layers 6, not 4"),
        (make_plan(PLAN.model, Layout(), replace(JOB, global_batch=16)), "job.global_batch; expected: 8"),
        (make_plan(PLAN.model, Layout(), replace(JOB, sequence=32)), "job.sequence; expected: 16"),
    ],
    ids=["model", "batch", "sequence"],
)
def test_another_model_or_other_samples_are_refused(plan: Plan, said: str, run_dir: Path) -> None:
    with pytest.raises(InputError) as error:
        prepare(run_dir, plan, steps=20, resume=True)
    assert said in str(error.value)
    assert not (run_dir / "plan.yaml").exists()
