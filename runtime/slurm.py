"""Ranks that srun has started: Slurm's variables as those that torchrun sets.

srun --ntasks 16 --ntasks-per-node 8 cli.py train plan.yaml --run-dir runs/mine
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from profiles.input_error import InputError

# Below the ephemeral ports of Linux (32768 on), above the well-known ones.
_FIRST_PORT, _PORTS = 15000, 15000


def joins(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several ranks that torchrun or srun has started."""
    return "RANK" in environment or _tasks(environment) > 1


def is_first(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for the run: rank 0, or the launcher."""
    return environment.get("RANK", "0") == "0"


def join(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where srun and not torchrun has started this rank, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Ranks meet on the first node of the step, at a port that follows from the job's number and the step's; an address or
    port that is set already is kept. Raises InputError where a variable is missing.
    """
    if "RANK" in environment or _tasks(environment) <= 1:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "")
    missing = [name for name in ("SLURM_LOCALID", "SLURM_JOB_ID") if not environment.get(name, "").isdecimal()]
    missing += [] if nodes else ["SLURM_NODELIST"]
    if missing:
        raise InputError(
            "Slurm does not say all that a rank must know",
            where="the environment",
            expected=", ".join(missing),
            got=", ".join(sorted(name for name in environment if name.startswith("SLURM_"))),
            hint="start it with srun, or with torchrun on each node",
        )
    number = int(environment["SLURM_JOB_ID"]) + 101 * int(environment.get("SLURM_STEP_ID", "0"))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(_tasks(environment))
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _PORTS))


def first_host(nodes: str) -> str:
    """The first name of a list of hosts as Slurm writes it.

    >>> first_host("gpu[003-005,9]-ib,login1")
    'gpu003-ib'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _tasks(environment: MutableMapping[str, str]) -> int:
    """Tasks of this step; 0 where this process is none of them."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
    if not environment.get("SLURM_PROCID", "").isdecimal() or not tasks.isdecimal():
        return 0
    return int(tasks)
