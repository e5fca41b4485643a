"""Ctrl-C in the middle of an import, of a verb or of a library in C, and standard streams that nobody reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli_signals import NO_READER, interruptible
from tests.command_line import start

CLI = Path(__file__).parents[1] / "cli.py"


def test_ctrl_c_in_an_import_ends_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    running = start("--help")
    assert running.communicate(timeout=60) == ("", "")
    assert running.returncode == -signal.SIGINT  # which a shell calls 130
    ignored = subprocess.Popen(  # as a shell has it in its background: typer.py goes on, and is not typer
        [sys.executable, str(CLI), "--help"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert "has no attribute 'Option'" in ignored.communicate(timeout=60)[1]


def _as_highs_does() -> None:
    """Its arrays come from Python's own, and whatever happens meanwhile is an argument that does not fit."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise TypeError("incompatible arguments") from None


def test_ctrl_c_that_a_library_makes_another_error_of() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt) as caught, interruptible():
            _as_highs_does()
        assert isinstance(caught.value.__cause__, TypeError)
        with pytest.raises(TypeError), interruptible():
            raise TypeError("nobody has typed anything")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", "--help"], ["profile", "--list", "--json"], ["plan", "--bogus"]]
)
def test_a_closed_pipe_ends_a_command_quietly(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    fails = "--bogus" in words  # then it is standard error that nobody reads
    ended = subprocess.run(
        [sys.executable, str(CLI), *words],
        stdout=subprocess.PIPE if fails else writer,
        stderr=writer if fails else subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (ended.returncode, ended.stdout or ended.stderr or "") == (NO_READER, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_shell_has_closed_is_no_error(closed: str) -> None:
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, str(CLI), "plan", "--bogus", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
