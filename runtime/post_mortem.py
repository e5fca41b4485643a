"""Why a run ended: which rank is to blame, judged by what the ranks said and what they left behind."""

from __future__ import annotations

import signal
from pathlib import Path

from planner.layout import Layout
from profiles.lists_in_words import first_of

from . import flight_recorder, stacks, whereabouts
from .failure import LOG_LINES, RAISED, RunFailed, retold
from .mesh import coordinate_of
from .rank_watch import RankWatch

# What the launcher sends, and how gloo and NCCL end a process whose peer is gone or late.
_CONSEQUENCES = (signal.SIGTERM, stacks.STOP_SIGNAL, signal.SIGABRT)
_NCCL_TIMED_OUT = "collective operation timeout"  # in what NCCL's watchdog logs before it aborts the process
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting in the kernel", "R": "running", "S": "asleep"}


def log_path(logs: Path, rank: int) -> Path:
    """Where the output of `rank` goes, and its stack when it is stopped."""
    return logs / f"rank_{rank}.log"


def why(rank: int, exit_code: int, layout: Layout, logs: Path, watch: RankWatch, timeout_seconds: float) -> Exception:
    """The error for a run in which torch found `rank` dead with `exit_code`, a signal's number if negative.

    torch reports one of the dead, and the others are only a consequence. A rank that was killed is the one that torch
    names, since those that raise linger; of ranks that raised, the first that said so and did not only lose a peer,
    which a rank may know before that peer has said anything.
    """
    killed = exit_code < 0 and -exit_code not in _CONSEQUENCES
    if not killed and watch.failures:
        first, said = next((it for it in watch.failures if it[1]["kind"] != "lost peer"), watch.failures[0])
        if said["kind"] == "timeout":
            return _hang(first, layout, logs, watch, timeout_seconds)
        known = retold(said)
        if known is not None:
            return known
        return _died(first, RAISED, layout, tuple(said["lines"]))
    log = _log(logs, rank)
    if exit_code == -signal.SIGABRT and _NCCL_TIMED_OUT in log:
        return _hang(rank, layout, logs, watch, timeout_seconds)
    return _died(rank, exit_code, layout, tuple(log.splitlines()[-LOG_LINES:]))


def waited(rank: int, layout: Layout, logs: Path, timeout_seconds: float) -> RunFailed:
    """The error of `rank` under torchrun when its own collective timed out: who is furthest behind, as far as known.

    Nobody but torchrun can stop the others, so what they were doing is in their own output, where they write it then.
    """
    places = {other: whereabouts.read(logs, other) for other in range(layout.world_size)}
    seen = {other: place for other, place in places.items() if place is not None}
    last = min(seen, key=lambda other: (seen[other], other), default=rank)
    recorder = flight_recorder.place_of_dumps(logs)
    how = f"waited {timeout_seconds:g} s (--timeout) in a collective; "
    if last in seen and seen[last] < max(seen.values()):
        how += f"furthest behind is rank {last} (pipeline stage {coordinate_of(last, layout).pp}), at {seen[last]}"
    else:
        how += "each rank's calls are in its own output, where torchrun has stopped it"
    return RunFailed(how, rank=rank, stage=coordinate_of(rank, layout).pp, log_lines=(recorder,) if recorder else ())


def _died(rank: int, exit_code: int, layout: Layout, lines: tuple[str, ...]) -> RunFailed:
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    return RunFailed(
        f"{how}; its last lines" if lines else how,
        rank=rank,
        stage=coordinate_of(rank, layout).pp,
        exit_code=exit_code,
        log_lines=lines,
    )


def _hang(first: int, layout: Layout, logs: Path, watch: RankWatch, timeout_seconds: float) -> RunFailed:
    """The error when a collective of rank `first` timed out: who did not come to it, and what it did instead.

    A rank waits if it said that a collective failed, or if its stack says so. Of those that do not, the one to blame is
    the one furthest behind.
    """
    ranks = range(layout.world_size)
    found = {rank: stacks.main_stack(_log(logs, rank)) for rank in ranks}
    gave_up = {rank for rank, _ in watch.failures}
    waiting = [rank for rank in ranks if rank in gave_up or stacks.waits_for_others(found[rank])]
    elsewhere = [rank for rank in ranks if rank not in waiting]
    places = {rank: whereabouts.read(logs, rank) for rank in ranks}

    def progress(rank: int) -> tuple[bool, whereabouts.Place | int, int]:
        place = places[rank]
        return (place is not None, place or 0, rank)

    patience = f"{timeout_seconds:g} s (--timeout)"
    recorder = flight_recorder.place_of_dumps(logs)
    if not elsewhere:
        at = {rank: said["at"] for rank, said in reversed(watch.failures) if said["kind"] == "timeout"}
        calls = {rank: at.get(rank, str(found[rank][0]) if found[rank] else "lost a peer") for rank in ranks}
        lines = [f"rank {rank} at {places[rank] or 'the start'}: {calls[rank]}" for rank in ranks]
        how = f"waited {patience} for others in a collective, and so did every other rank, for different ones"
        lines = [*lines[:LOG_LINES], *([recorder] if recorder else [])]
        return RunFailed(how, rank=first, stage=coordinate_of(first, layout).pp, log_lines=tuple(lines))
    rank = min(elsewhere, key=progress)
    place = f"at {places[rank]}" if places[rank] else "before its first step"
    how = f"did not come to a collective in which {_names(waiting)} waited for it for {patience}; it was {place}"
    if rank in watch.killed:
        state = watch.killed[rank]
        how += f", and its process obeyed no signal: {_STATES.get(state, f'state {state}')}"
    stack = [str(frame) for frame in found[rank][:LOG_LINES]]
    if stack:
        how += ", in these calls, innermost first"
    return RunFailed(
        how,
        rank=rank,
        stage=coordinate_of(rank, layout).pp,
        exit_code=-signal.SIGKILL if rank in watch.killed else -signal.SIGTERM,
        log_lines=(*stack, f"all its threads: {log_path(logs, rank)}", *([recorder] if recorder else [])),
    )


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {first_of(ranks)}"


def _log(logs: Path, rank: int) -> str:
    path = log_path(logs, rank)
    return path.read_text(errors="replace") if path.exists() else ""
