"""The plan of an elastic run: torchrun starts as many ranks as it has nodes left for, and they agree on a plan."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from planner.plan import Plan, load
from planner.record import PLAN_FILE, put_plan
from profiles.input_error import InputError

from .checkpoint_folder import complete_steps

_LOOK_SECONDS = 0.2  # between two looks whether rank 0 has planned
_PLAN_SECONDS = 600.0  # for rank 0 to plan in


def check_elastic(plan_file: Path | None, run_dir: Path | None) -> tuple[Path, Path]:
    """The two files an elastic run needs; an InputError where one is missing, or torchrun, or its store would be lost.

    torch keeps where the ranks meet in the agent of the first rank 0, and other agents remember that place when it is
    gone (2.11 to 2.13), unless the store is not shared.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise InputError(
            "an elastic run needs an agent that starts ranks again",
            where="--elastic",
            expected="torchrun --nnodes MIN:MAX around it",
            got="a process that torchrun has not started",
            hint="torchrun --nnodes 1:4 --max-restarts 10 --rdzv-backend c10d --rdzv-endpoint HOST:PORT … cli.py "
            "train plan.yaml --run-dir runs/mine --elastic",
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        raise InputError(
            "the ranks could not meet again once the first agent is lost",
            where="the environment of torchrun",
            expected="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            got="a store that lives in the first agent and that the others go on looking for",
            hint="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun …",
        )
    if plan_file is None or run_dir is None:
        raise InputError(
            "an elastic run needs a plan for all its nodes and a run folder",
            where="--elastic",
            expected="PLAN.YAML and --run-dir FOLDER, on a disk that all nodes share",
            got="not both",
        )
    return plan_file, run_dir


def plan_for_ranks(plan_file: Path, run_dir: Path, plan_again: Callable[[Plan, int], Plan]) -> Path:
    """The file whose plan is for WORLD_SIZE ranks: the run's present one, `plan_file`, or a new one of the run's.

    Rank 0 makes the new one, from the plan in `plan_file`, whose cluster is the whole; the others wait for its file,
    for which the disk must be shared. Raises InputError where it does not come.
    """
    ranks, present = int(os.environ["WORLD_SIZE"]), run_dir / PLAN_FILE
    for path in (present, plan_file):
        if _is_for(path, ranks):
            return path
    if os.environ["RANK"] == "0":
        put_plan(run_dir, plan_again(load(plan_file), ranks), max(complete_steps(run_dir), default=0))
        return present
    deadline = time.monotonic() + _PLAN_SECONDS
    while not _is_for(present, ranks):
        if time.monotonic() > deadline:
            raise InputError(
                f"rank 0 has made no plan for {ranks} ranks",
                where=str(present),
                expected="its new plan, on a disk that all nodes share",
                got=f"none after {_PLAN_SECONDS:g} s",
            )
        time.sleep(_LOOK_SECONDS)
    return present


def _is_for(path: Path, ranks: int) -> bool:
    return path.exists() and load(path).layout.world_size == ranks
