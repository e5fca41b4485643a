"""One use of the profiler as a person sees it: a progress bar, files that are whole at any moment, a way to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..cluster import ClusterSpec
from ..hardware import HardwareProfile, load_hardware
from ..input_error import InputError
from ..local_files import ProfileFiles
from ..store import require_writable

if TYPE_CHECKING:
    from . import profiler
    from .findings import Findings

_PLAIN_SECONDS = 15.0  # between lines that stand for the bar where the output is no terminal


def measure(
    nproc: int | None,
    thoroughness: str,
    output: Path | None,
    command: str,
    *,
    resume: bool = False,
    dtypes: tuple[str, ...] = (),
) -> tuple[HardwareProfile, ClusterSpec] | None:
    """Measure and write; None on the ranks that only take part.

    An interrupted session leaves the profile of what it had measured, if a plan can be made from that; `resume`
    takes what the file holds and measures what is missing. `dtypes` are of the kernels, by default what
    `ProfileOptions` says.

    Raises:
        InputError: nothing to resume, or what `profile_machine` raises.
    """
    began = time.time()
    from . import profiler  # torch, which takes seconds to load, is within the budget

    files = ProfileFiles.at(output)

    def keep(findings: Findings) -> None:
        files.write(findings.hardware(), findings.cluster(files.name))

    if profiler.is_first():
        require_writable(files.hardware)
        require_writable(files.cluster)
    earlier = _earlier(files, nproc) if resume else None
    options = profiler.ProfileOptions(
        ranks=nproc or (earlier.provenance["ranks"] if earlier else profiler.default_ranks()),
        thoroughness=thoroughness,
        dtypes=dtypes or None,
        resume=earlier,
        began=began,
    )
    if not profiler.is_first():
        profiler.profile_machine(options, command)
        return None
    try:
        with _progress() as on_progress:
            findings = profiler.profile_machine(options, command, on_progress=on_progress, keep=keep)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_what_is_left(files, output, earlier)) from None
    if not findings.usable:
        raise InputError(
            "the time was up before enough was measured to plan with",
            where="the profiler",
            expected="GEMM and attention of one dtype at least",
            got=f"{len(findings.done)} cases",
            hint="leave --quick out, or stop what else this machine is doing",
        )
    return findings.hardware(), findings.cluster(files.name)


def _what_is_left(files: ProfileFiles, output: Path | None, earlier: HardwareProfile | None) -> str:
    """What an interrupted session tells a person."""
    try:
        kept = load_hardware(files.hardware).provenance.get("complete") is False or earlier is not None
    except InputError:
        kept = False
    if not kept:
        return "interrupted before there was enough to plan with; nothing was written"
    flag = f" -o {output}" if output is not None else ""
    return f"interrupted; {files.hardware} holds what was measured, and `cli.py profile --resume{flag}` goes on"


def _earlier(files: ProfileFiles, nproc: int | None) -> HardwareProfile:
    earlier = load_hardware(files.hardware)
    ranks = earlier.provenance.get("ranks")
    if "cases" not in earlier.provenance or (nproc is not None and nproc != ranks):
        raise InputError(
            "that profile cannot be gone on with",
            where=f"{files.hardware}: provenance",
            expected="a profile that was measured" + (f" with {nproc} ranks" if nproc else ""),
            got=f"one of {ranks} ranks" if ranks else "one that was not measured here",
            hint="leave --resume out to measure anew",
        )
    return earlier


@contextmanager
def _progress() -> Iterator[Callable[[profiler.Progress], None]]:
    """A bar on a terminal, elsewhere a line from time to time."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        TextColumn("measuring this machine"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting the ranks", total=1.0)
        yield lambda at: bar.update(task, description=at.case, completed=at.share)


def _lines(console: Console) -> Callable[[profiler.Progress], None]:
    last = [0.0]

    def print_line(at: profiler.Progress) -> None:
        if time.monotonic() - last[0] > _PLAIN_SECONDS:
            last[0] = time.monotonic()
            console.print(f"measuring this machine: {at.share:.0%}, {at.phase}")

    return print_line
