"""Why a run ended early: the rank that died, where it stood in the layout, and its last words."""

from __future__ import annotations


class RunFailed(Exception):
    """A rank ended before the run did; the launcher has stopped the others.

    Attributes:
        rank: global rank of the process that died first.
        stage: its pipeline coordinate.
        exit_code: its exit code; negative is the number of the signal that killed it.
        log_lines: the last lines it wrote.
    """

    def __init__(self, *, rank: int, stage: int, exit_code: int, log_lines: tuple[str, ...] = ()) -> None:
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        log = "".join(f"\n  {line}" for line in log_lines)
        super().__init__(f"rank {rank} (pipeline stage {stage}) {how}" + (f"; its last lines:{log}" if log else ""))
        self.rank = rank
        self.stage = stage
        self.exit_code = exit_code
        self.log_lines = log_lines
