"""Files that cannot be used, of ten kinds under five verbs: one screen, all five parts of the error, exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import dumps
from profiles.catalogue import CATALOG

from .command_line import run
from .plans import make_plan, tiny_llama

TEXTS = {
    "model": (CATALOG / "models" / "gpt2.yaml").read_text(),
    "cluster": (CATALOG / "clusters" / "dgx-a100.yaml").read_text(),
    "hardware": (CATALOG / "hardware" / "a100-sxm-80gb.yaml").read_text(),
    "runs": "id,model\n",
}
JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
_BATCH = ["--global-batch", "64", "--seq", "1024"]
VERBS: dict[str, Callable[[str], list[str]]] = {
    "model": lambda file: ["plan", "--model", file, "--cluster", "dgx-a100:1", *_BATCH],
    "cluster": lambda file: ["estimate", "--model", "gpt2", "--cluster", file, *_BATCH, "--layout", "tp=2"],
    "hardware": lambda file: ["profile", "--show", file],
    "plan": lambda file: ["explain", file],
    "runs": lambda file: ["validate", file],
}


def _changed(text: str, key: str, value: str) -> str:
    """The text with another value behind the first `key:` that is not a comment."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}: "))
    lines[at] = f"{lines[at].partition(':')[0]}: {value}"
    return "\n".join(lines)


# What is wrong -> what becomes of the file's bytes, and what the error must say.
YAML_FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "a wrong key": (lambda text: f"wrong_key: 1\n{text}", "unknown key wrong_key"),
    "a key twice": (lambda text: f"schema: a\n{text}", "the key schema a second time"),
    "another schema": (lambda text: _changed(text, "schema", "meshwright.plan/v0"), "meshwright."),
    "a missing key": (lambda text: text.replace("schema:", "schemata:", 1), "the key schema is missing"),
    "a list": (lambda _: "- 1\n- 2\n", "a mapping of keys to values"),
    "cut in a line": (lambda text: text[: text.index("schema:") + 40] + "\n  x: {a: [", "is not valid YAML"),
    "nothing in it": (lambda _: "", "a mapping of keys to values"),
}
NUMBERS = {"model": "layers", "cluster": "devices_per_node", "hardware": "memory_bytes", "plan": "global_batch"}


def _check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str, file: Path, says: str
) -> None:
    code, out, err = run(capsys, monkeypatch, *VERBS[kind](str(file)))
    assert (code, out) == (2, ""), err
    assert len(err.splitlines()) <= 24
    labels = [line.split()[0] for line in err.splitlines() if line[:1].isalpha()]
    assert labels == ["error", "where", "expected", "got", "try"], err
    assert says in " ".join(err.split()), err


def _text(kind: str) -> str:
    return dumps(make_plan(tiny_llama(), Layout(dp=2), JOB)) if kind == "plan" else TEXTS[kind]


@pytest.mark.parametrize("kind", NUMBERS)
def test_yaml_that_cannot_be_used(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.yaml"
    for change, says in YAML_FAULTS.values():
        file.write_text(change(_text(kind)))
        _check(capsys, monkeypatch, kind, file, says)
    for number in ("nan", "-3", "a lot"):
        file.write_text(_changed(_text(kind), NUMBERS[kind], number))
        _check(capsys, monkeypatch, kind, file, NUMBERS[kind])


@pytest.mark.parametrize("kind", VERBS)
def test_what_is_no_text(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.yaml"
    _check(capsys, monkeypatch, kind, file, str(file))  # does not exist
    file.write_bytes(b"\xff\xfe\x00n\xe9: 1\n")
    _check(capsys, monkeypatch, kind, file, "byte 0xff at 0, which no UTF-8 has there")
    file.unlink()
    file.mkdir()
    _check(capsys, monkeypatch, kind, file, "file.yaml")
