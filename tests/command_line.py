"""The command line for tests: a command in this process, or one of its own that Ctrl-C reaches."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from profiles.parent_process import die_with_parent

_CLI = Path(__file__).parents[1] / "cli.py"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["cli.py", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


def start(*arguments: str) -> subprocess.Popen[str]:
    """A command in a session of its own, which Ctrl-C reaches even where the tests run in the background of a shell."""
    return subprocess.Popen(
        [sys.executable, str(_CLI), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_before_it_starts,
    )


def _before_it_starts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()
