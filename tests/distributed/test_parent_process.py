"""Ranks of benchmarks, of tests and of the profiler end with the process that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from profiles.parent_process import die_with_parent
from tests.distributed.test_launch import alive
from tests.distributed.test_run_life import until

ROOT = Path(__file__).parents[2]
# Each starts a rank that says its process id and goes on for ever.
STARTERS = {
    "benchmarks": """
from benchmarks import side_by_side
def work(*arguments):
    say()
side_by_side.run_layouts = work
if __name__ == "__main__":
    with side_by_side.ranks_of_this_machine(Path(), 1, 1, 1, 1):
        time.sleep(600)
""",
    "tests": """
from tests.distributed.harness import run_ranks
run_ranks(say, 1, timeout_seconds=600)
""",
    "the profiler": """
from profiles.probes import profiler
def work(*arguments):
    say()
profiler.worker.work = work
if __name__ == "__main__":
    profiler.profile_machine(profiler.ProfileOptions(ranks=1), "")
""",
}
SAY = """
import os, sys, time
from pathlib import Path
def say():
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    while True:
        time.sleep(0.1)
"""


ENDS = [("benchmarks", signal.SIGTERM), ("tests", signal.SIGKILL), ("the profiler", signal.SIGKILL)]


@pytest.mark.parametrize(("starter", "end"), ENDS)
def test_no_rank_outlives_its_parent(starter: str, end: signal.Signals, tmp_path: Path) -> None:
    script, said = tmp_path / "script.py", tmp_path / "said"
    script.write_text(SAY + STARTERS[starter])
    said.mkdir()
    with _in_the_background([str(script), str(said)]) as parent:
        until(lambda: any(said.iterdir()) or parent.poll() is not None)
        (rank,) = [int(path.name) for path in said.iterdir()]
        assert alive(rank)
        parent.send_signal(end)
        assert parent.wait(timeout=10) == -end
        until(lambda: not alive(rank), 10.0)


@contextmanager
def _in_the_background(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """As a shell starts a command with &: SIGINT is ignored, which torch would send to ranks without a parent."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent()

    parent = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        preexec_fn=prepare,
    )
    try:
        yield parent
    finally:
        parent.kill()
        parent.wait()
