"""torch's flight recorder: the last collectives of each rank, written into the run folder when one times out."""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "nccl_flight_recorder_rank_"
_COLLECTIVES = 2000  # kept per rank: torch's own default


def environment(logs: Path) -> dict[str, str]:
    """What the process groups read when they are made, and when they time out.

    From torch/csrc/distributed/c10d/FlightRecorder.hpp and ProcessGroupNCCL.hpp of torch 2.13; the place under its
    older name too.
    """
    return {
        "TORCH_FR_BUFFER_SIZE": str(_COLLECTIVES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(logs.absolute() / PREFIX),
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(logs.absolute() / PREFIX),
    }


def turn_on(logs: Path) -> None:
    """For the process groups that this process makes from now on; what a person has set stays as it is."""
    for name, value in environment(logs).items():
        os.environ.setdefault(name, value)


def place_of_dumps(logs: Path) -> str:
    """Where the dumps of a hang are and how to read them, as a line; empty where there are none."""
    dumps = sorted(logs.glob(f"{PREFIX}*"))
    if not dumps:
        return ""
    return (
        f"flight recorder of {len(dumps)} ranks: {logs / PREFIX}*; read with: torchfrtrace {logs} -p {PREFIX} "
        "--allow-incomplete-ranks"
    )
