"""The process group of a run: device and backend of this rank, timeout, and an orderly end."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from profiles.input_error import InputError


@contextmanager
def process_group(world_size: int, timeout_seconds: float) -> Iterator[torch.device]:
    """Join the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; gives this rank's device.

    NCCL on CUDA, gloo on CPUs. A collective that some rank never joins raises after `timeout_seconds`.
    Raises InputError when the group has another size than the plan's `world_size`.
    """
    running = int(os.environ["WORLD_SIZE"])
    if running != world_size:
        raise InputError(
            "the plan is for another number of devices than are running",
            where="plan: layout",
            expected=f"{world_size} ranks, as in the plan",
            got=f"{running} ranks",
            hint=f"start {world_size} ranks, or plan again for {running} devices",
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)  # ranks share the cores
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=device if cuda else None,
    )
    yield device
    # Not after an error: the other ranks may be waiting for this one, and its death is what tells them.
    dist.barrier()
    dist.destroy_process_group()


def set_timeout(groups: Iterable[dist.ProcessGroup], seconds: float) -> None:
    """From now on, for collectives of the world and of `groups`, all of which this rank is in."""
    for group in (None, *groups):
        _set_pg_timeout(datetime.timedelta(seconds=seconds), group)
