"""Bad inputs that are no file's syntax: numbers without end, paths that cannot be used, two runs in one folder.

And that what is cheap to find wrong is found before a machine is measured or a plan made.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan, dumps, load
from profiles.catalogue import CATALOG
from profiles.input_error import InputError
from runtime.data.byte_text import load_corpus, text_files
from runtime.run_folder import LOGS_FOLDER, alone_in, prepare
from runtime.trackers import check_reachable

from .command_line import run
from .plans import make_plan, tiny_llama

DEMO = (CATALOG / "models" / "demo.yaml").read_text()
SHAPE = ["--global-batch", "16", "--seq", "256"]


def small_plan() -> Plan:
    return make_plan(tiny_llama(), Layout(dp=2), TrainingJob(global_batch=8, sequence=16, precision="fp32"))


def never(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("long work was begun")


def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *command: str, says: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, monkeypatch, *command)
    assert (code, out) == (2, ""), err
    assert [line.split()[0] for line in err.splitlines() if line[:1].isalpha()] == [
        *("error", "where", "expected", "got", "try")
    ], err
    for text in says:
        assert text in " ".join(err.split()), err


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("layers", "1000000000", "at most 1,000 layers"),
        ("vocab_size", "1" + "0" * 400, "one of 1329 bits"),
        ("hidden_size", "-7", "-7"),
    ],
)
def test_a_model_beyond_all_bounds(
    key: str,
    value: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "\n".join(f"{key}: {value}" if line.startswith(f"{key}: ") else line for line in DEMO.splitlines())
    (tmp_path / "model.yaml").write_text(text)
    command = ["plan", "--model", str(tmp_path / "model.yaml"), "--cluster", "dgx-h100:1", *SHAPE]
    refused(capsys, monkeypatch, *command, says=(says,))


def test_a_batch_beyond_all_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["plan", "--model", "demo", "--cluster", "dgx-h100:1", "--seq", "256", "--global-batch"]
    for digits in (30, 5000):  # Python itself refuses to read so many as the latter
        refused(capsys, monkeypatch, *command, "9" * digits, says=("from 1 to 1,000,000,000",))
    document = small_plan().to_dict()
    document["job"]["global_batch"] = 8 * 10**30
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    refused(capsys, monkeypatch, "explain", str(tmp_path / "plan.yaml"), says=("job.global_batch", "1,000,000,000"))


@pytest.mark.parametrize("pin", ["64", float("nan"), "4..2", [], True, None, [1, "2"]])
def test_a_plan_pins_what_a_person_could_have_typed(pin: Any, tmp_path: Path) -> None:
    plan = small_plan()
    kept = replace(plan, job=replace(plan.job, pins={"tp": 1, "pp": range(1, 3), "recompute": ("none", "full")}))
    (tmp_path / "plan.yaml").write_text(dumps(kept))
    assert load(tmp_path / "plan.yaml") == kept
    document = plan.to_dict()
    document["job"]["pins"] = {"tp": pin}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(InputError, match=r"where: \S*plan.yaml: job.pins.tp"):
        load(tmp_path / "plan.yaml")


# ---- paths -----------------------------------------------------------------------------------------------------


def test_what_the_operating_system_refuses_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["plan", "--model", "demo", "--cluster", "dgx-h100:1", *SHAPE, "--document-length", "a" * 5000]
    refused(capsys, monkeypatch, *command, says=("File name too long", "aaa…"))


def test_an_empty_name_is_not_the_folder_one_is_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(capsys, monkeypatch, "train", "plan.yaml", "--run-dir", "", says=("--run-dir names nothing",))
    command = ["plan", "--model", "demo", "--cluster", "dgx-h100:1", *SHAPE, "--document-length", ""]
    refused(capsys, monkeypatch, *command, says=("--data names nothing",))


def test_text_that_may_not_be_read_is_refused_and_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "data" / "inside"
    inside.mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("hello" * 50)
    (inside / "b.txt").write_text("world" * 50)
    (inside / "again").symlink_to(tmp_path / "data")  # a loop, which is not gone into
    assert text_files(tmp_path / "data") == [tmp_path / "data" / "a.txt", inside / "b.txt"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="got: neither a file nor a folder"):
        load_corpus(tmp_path / "pipe", sequence=8)  # which would wait for a writer

    # A test may run as root, who reads everything.
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt")
        with pytest.raises(InputError, match=r"got: \S*inside/b.txt: Permission denied"):
            load_corpus(tmp_path / "data", sequence=8)
    scandir = os.scandir

    def refuse(folder: Any) -> Any:
        if Path(folder) == inside:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        with pytest.raises(InputError, match=r"got: \S*inside: Permission denied"):
            load_corpus(tmp_path / "data", sequence=8)


@pytest.mark.parametrize("place", ["file/x.yaml", "folder", "loop/x.yaml"])
def test_where_nothing_can_be_written_nothing_is_measured_or_planned(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("profiles.probes.profiler.profile_machine", never)
    monkeypatch.setattr("planner.planning.search", never)
    for command in (["profile", "--quick"], ["plan", "--model", "demo", "--cluster", "dgx-h100:1", *SHAPE]):
        refused(capsys, monkeypatch, *command, "-o", str(tmp_path / place), says=("cannot be written",))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop"]
    assert os.listdir(tmp_path / "folder") == []


# ---- run folders -----------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        with pytest.raises(InputError, match=r"another run is writing into \S*run"), alone_in(tmp_path / "run"):
            raise AssertionError
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "run"):
        pass


def test_a_start_clears_what_ranks_have_left_and_nothing_else(tmp_path: Path) -> None:
    logs = tmp_path / LOGS_FOLDER
    logs.mkdir()
    left = ("rank_0.log", "rank_11.log", "rank_0.at", "nccl_flight_recorder_rank_0", "leave", "fork_server.log")
    for name in (*left, "mine.txt", "rank.py"):
        (logs / name).write_text(name)
    prepare(tmp_path, small_plan(), steps=1, resume=False)
    assert sorted(os.listdir(logs)) == ["mine.txt", "rank.py"]


# ---- before long work ------------------------------------------------------------------------------------------


MEGATRON = [
    *("megatron", "--cluster", "dgx-h100:1", "--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--bf16", "--seq-length", "64", "--max-position-embeddings", "64", "--vocab-size", "256", "--train-iters", "4"),
    *("--micro-batch-size", "1", "--global-batch-size", "8", "--lr", "1e-3"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train", "--data", "nowhere"], "where --data nowhere"),
        (["train", "--betas", "1"], "where --betas"),
        (["train", "--tokenizer", "nowhere"], "where --tokenizer nowhere"),
        (["train", "--lr-schedule", "steep"], "where --lr-schedule"),
        (["train", "--mlflow", "nowhere://x"], "mlflow cannot be reached"),
        ([*MEGATRON, "--data-path", "nowhere"], "where --data-path nowhere"),
    ],
)
def test_what_is_cheap_to_see_is_seen_before_a_plan_is_made(
    command: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--mlflow" in command:
        pytest.importorskip("mlflow")
    monkeypatch.setattr("profiles.probes.session.measure", never)
    monkeypatch.setattr("planner.planning.make", never)
    code, _, err = run(capsys, monkeypatch, *command)
    assert (code, says in " ".join(err.split())) == (2, True), err


def test_wandb_that_does_not_know_who_asks_is_told_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"wandb cannot be reached; where: --wandb mine"):
        check_reachable("mine", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_reachable("mine", None)
    wandb.teardown()  # it keeps the environment that it was first used in
