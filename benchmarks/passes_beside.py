"""python benchmarks/passes_beside.py [--model NAME...]: what a pass takes alone, and beside others on shared cores.

Forward and backward of a whole model on one rank, in one process, in two and in four at once, with nothing sent.
Printed are the seconds of the processor for each sequence: what ranks cost each other besides the time that they share
a core for. Run it on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, where `runtime` is a benchmark

import torch
import torch.nn.functional as F

from planner.plan import Stage
from profiles.catalogue import resolve_model
from profiles.parent_process import die_with_parent
from profiles.probes.cpu_rank import prepare_cpu_rank
from runtime.experts import Balance, routers_of
from runtime.parameters import initialise
from runtime.transformer import build_chunk

PROCESSES = (1, 2, 4)
SEQUENCES = (1, 2, 4)  # of a pass
_TOKENS = 256
_WARM_UP, _SEQUENCES_A_TURN = 5, 24


def _passes(name: str, sequences: int, barrier: Any, results: Any) -> None:
    die_with_parent()
    prepare_cpu_rank()
    model = resolve_model(name)
    chunk = build_chunk(model, Stage.whole(model)).to_empty(device="cpu")
    chunk.tie()
    initialise([chunk], layers=model.layers, seed=1)
    for router in routers_of([chunk]):
        router.balance, router.sequences_per_step = Balance(), sequences
    tokens = torch.randint(0, model.vocab_size, (sequences, _TOKENS + 1))

    def one_pass() -> None:
        F.cross_entropy(chunk(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()

    for _ in range(_WARM_UP):
        one_pass()
    barrier.wait()
    repeats, begun = max(2, _SEQUENCES_A_TURN // sequences), time.process_time()
    for _ in range(repeats):
        one_pass()
    results.put((time.process_time() - begun) / repeats / sequences)
    barrier.wait()  # the others work on as long


def _seconds(name: str, sequences: int, processes: int) -> float:
    """Of the processor, for a sequence, of the mean process."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes, timeout=120), context.Queue()
    ranks = [
        context.Process(target=_passes, args=(name, sequences, barrier, results), daemon=True) for _ in range(processes)
    ]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=180) for _ in ranks]
    for rank in ranks:
        rank.join()
    return statistics.mean(found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = Path(__file__).parent / "shapes"
    options.add_argument("--model", nargs="*", default=["demo", str(shapes / "experts.yaml")], help="names or files")
    options.add_argument("--turns", type=int, default=3, help="of every case, the median of which is shown")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  torch {torch.__version__}  {' '.join(sys.argv)}")
    print(
        "model    sequences a pass  " + "  ".join(f"{n:2} at once" for n in PROCESSES) + "   ms of the processor each"
    )
    for name in arguments.model:
        for sequences in SEQUENCES:
            turns = [[_seconds(name, sequences, n) for n in PROCESSES] for _ in range(arguments.turns)]
            medians = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
            print(f"{Path(name).stem:8} {sequences:16}  " + "  ".join(f"{1e3 * s:10.1f}" for s in medians), flush=True)


if __name__ == "__main__":
    main()
