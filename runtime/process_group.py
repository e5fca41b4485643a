"""The process group of a run: device and backend of this rank, timeout, and an orderly end."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from profiles.input_error import InputError
from profiles.probes.cpu_rank import prepare_cpu_rank


@contextmanager
def process_group(world_size: int, timeout_seconds: float, *, on_cpu: bool = False) -> Iterator[torch.device]:
    """Join the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; gives this rank's device.

    NCCL on CUDA, gloo on CPUs and where `on_cpu` asks for it. A collective that some rank never joins raises after
    `timeout_seconds`.
    Raises InputError when the group has another size than the plan's `world_size`, or cannot meet there.
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
    if torch.cuda.is_available() and not on_cpu:
        # Slurm may show each rank its own device alone.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        prepare_cpu_rank()
    cuda, timeout = device.type == "cuda", datetime.timedelta(seconds=timeout_seconds)
    with _groups_time_out(timeout):
        try:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
        except dist.DistNetworkError as error:
            raise _no_meeting_point(str(error)) from None
        yield device
    # Not after an error: the other ranks may be waiting for this one, and its death is what tells them.
    dist.barrier()
    dist.destroy_process_group()


def set_timeout(groups: Iterable[dist.ProcessGroup], seconds: float) -> None:
    """From now on, for collectives of the world and of `groups`, all of which this rank is in; not for what gloo
    receives."""
    for group in (None, *groups):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def _groups_time_out(timeout: datetime.timedelta) -> AbstractContextManager[object]:
    """Groups made in this context, those of a mesh among them, have this timeout.

    Without it they would wait half an hour, torch's default, whatever the first group was told; and what gloo receives
    obeys only the timeout that its group was made with, so that to set it later does not help.
    """
    return mock.patch.multiple(distributed_c10d, default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)


def _no_meeting_point(reason: str) -> InputError:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    taken = "EADDRINUSE" in reason
    return InputError(
        f"port {port} is in use" if taken else f"the ranks cannot meet at {address}:{port}",
        where="MASTER_ADDR and MASTER_PORT",
        expected=f"a free port on {address}" if taken else "the machine of rank 0 and a free port there",
        got="another process that listens on it" if taken else reason.splitlines()[0],
        hint="another MASTER_PORT (torchrun: --master-port); under Slurm ranks are started by srun",
    )
