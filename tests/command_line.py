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


def ctrl_c_in_each_that_it_starts(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have each process that a command's multiprocessing starts get Ctrl-C when it is about to import `module`.

    By a module in `folder` that every Python loads first; for each that was sent, a file ends in .sent there.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r} and 'from multiprocessing' in ' '.join(sys.orig_argv):\n"
        f"            open({str(folder)!r} + '/%d.sent' % os.getpid(), 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def _before_it_starts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()
