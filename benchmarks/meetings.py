"""python benchmarks/meetings.py [--turns 9]: what it takes ranks that share cores to meet, with all or half at work.

Four ranks compute on this machine, as many as two to a core on two, and each pair sums a tensor after a stretch of
work, as the ranks of a stage under tensor parallelism do. In turn both pairs work, and one while the other waits to
receive, as a stage in its bubble does. Printed are the seconds of the work alone and what the sum adds to them: compute
gains from idle cores, the sums gain less, since a part of them is waking up. The planner counts them as gaining nothing
([Note: Beside others] in planner/contention.py). Run it on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, where `runtime` is a benchmark

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from profiles.parent_process import die_with_parent
from profiles.probes.concurrency import block_work
from profiles.probes.cpu_rank import prepare_cpu_rank

RANKS = 4
STRETCHES = (1, 4, 16)  # times the work goes into what passes between two sums
SIZES = (4, 2**16, 2**20)  # of the tensor, bytes
_STRETCHES_A_TURN = 48


def _measure(rank: int, store: str, turns: int) -> None:
    die_with_parent()
    prepare_cpu_rank()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=120)
    )
    pair = [dist.new_group([first, first + 1]) for first in range(0, RANKS, 2)][rank // 2]
    work = block_work()

    def stretch_seconds(loops: int, size_bytes: int, active: int) -> float:
        """Of the mean rank of those at work; no sum where there are no bytes."""
        tensor, repeats = torch.zeros(max(1, size_bytes // 4)), max(3, _STRETCHES_A_TURN // loops)
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(repeats if rank < active else 0):
            for _ in range(loops):
                work()
            if size_bytes:
                dist.all_reduce(tensor, group=pair)
        spent = torch.tensor((time.perf_counter() - begun) / repeats if rank < active else 0.0)
        dist.all_reduce(spent)
        return spent.item() / active

    cases = list(product(STRETCHES, (0, *SIZES), (RANKS // 2, RANKS)))
    found: dict[tuple[int, int, int], list[float]] = {case: [] for case in cases}
    for turn in range(turns + 1):
        for case in cases:
            seconds = stretch_seconds(*case)
            if turn:
                found[case].append(seconds)
    if rank == 0:
        _show({case: statistics.median(seconds) for case, seconds in found.items()})
    dist.destroy_process_group()


def _show(seconds: dict[tuple[int, int, int], float]) -> None:
    print("work, half at it   all at it   sum of     adds, half at it   all at it")
    for loops, size in product(STRETCHES, SIZES):
        half, whole = (seconds[loops, 0, active] for active in (RANKS // 2, RANKS))
        half_more, whole_more = (
            seconds[loops, size, active] - seconds[loops, 0, active] for active in (RANKS // 2, RANKS)
        )
        print(
            f"{1e3 * half:11.2f} ms  {1e3 * whole:7.2f} ms  {size:8} B  {1e3 * half_more:11.2f} ms"
            f"  {1e3 * whole_more:9.2f} ms"
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=9, help="of every case, the median of which is shown")
    turns = options.parse_args().turns
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine = f"{platform.node()}  {os.cpu_count()} cores  torch {torch.__version__}"
    print(f"{now}  {machine}  {' '.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (str(Path(folder) / "store"), turns), nprocs=RANKS)


if __name__ == "__main__":
    main()
