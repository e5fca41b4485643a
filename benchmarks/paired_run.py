"""The runtime and another loop in one process group, a step of each in turn on the same batch.

[Note: Pairs]
Three loops are built: ours, theirs and theirs again. Ours and theirs make a pair of steps, then theirs again and
theirs, and in the next pair whoever came second comes first. What theirs again differs from theirs is noise: of the
machine, and of what building the same thing twice at other addresses does.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from paired_ratios import slowest, together
from plain_loops import CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY, Loop, Values
from torch import multiprocessing as mp

from planner.plan import Plan, Stage
from profiles.model import ModelSpec
from profiles.parent_process import die_with_parent
from runtime.parameters import initialise, named_parameters
from runtime.process_group import process_group
from runtime.step import build_state, training_step
from runtime.transformer import build_chunk

WARM_UP_STEPS = 3
SAME_LOSS = 1e-4  # relative: float32 and another order of sums
_SEED = 7
_PATIENCE_SECONDS = 300.0
Builder = Callable[[Plan, Values, torch.device], Loop]


@dataclass(frozen=True)
class Pairs:
    """Seconds of each step: ours beside theirs, and theirs again beside theirs."""

    ours: list[float]
    theirs: list[float]
    again: list[float]
    beside_again: list[float]


@dataclass(frozen=True)
class Measured:
    """Each step by the clock, as its slowest rank saw it, and in CPU seconds, those of all ranks together.

    CPU seconds leave out all waiting, for other ranks too, and what else runs on the machine takes less from them.
    """

    clock: Pairs
    cpu: Pairs


class Ours:
    """The runtime's step, with the reading of its clock, which the trainer does each step too."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.state = build_state(plan, device, dtype=torch.float32, seed=_SEED, weight_decay=WEIGHT_DECAY)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        result = training_step(self.state, inputs, targets, learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM)
        self.state.runner.clock.read()
        return result.loss / dist.get_world_size()


def run_pairs(plan: Plan, builder: Builder, pairs: int) -> Measured:
    """Start the ranks of the plan, let them work, and read what they measured. Raises what a rank has raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (plan, builder, pairs, port, folder)
        mp.start_processes(_rank, args=arguments, nprocs=plan.layout.world_size, start_method="spawn")  # type: ignore[reportPrivateImportUsage]
        ranks = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(plan.layout.world_size)]
    columns = [[rank[column] for rank in ranks] for column in range(4)]
    clock = Pairs(*(slowest([[step.clock for step in rank] for rank in column]) for column in columns))
    return Measured(clock, Pairs(*(together([[step.cpu for step in rank] for rank in column]) for column in columns)))


def _rank(rank: int, plan: Plan, builder: Builder, pairs: int, port: int, folder: str) -> None:
    die_with_parent()
    warnings.simplefilter("ignore")  # torch's own, of interfaces that both sides use
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": plan.layout.world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
    with process_group(plan.layout.world_size, _PATIENCE_SECONDS) as device:
        values = first_values(plan.model)
        ours = Ours(plan, device)
        loops: dict[str, Loop] = {
            "ours": ours,
            "theirs": builder(plan, values, device),
            "again": builder(plan, values, device),
        }
        own = _OwnSamples(plan, ours.state.mesh.coordinate.dp, device)
        _warm_up(loops, own)
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(_measure(loops, own, pairs)))
    os._exit(0)  # what torchtitan imports complains at length when it is torn down


def _warm_up(loops: Mapping[str, Loop], own: _OwnSamples) -> None:
    """First steps, on the same batches from the same values, so that all loops must have the same losses."""
    losses: dict[str, list[float]] = {}
    for name, loop in loops.items():
        parts = torch.tensor([loop.step(*own.batch(number)) for number in range(WARM_UP_STEPS)], dtype=torch.float64)
        dist.all_reduce(parts)
        losses[name] = parts.tolist()
    for name, found in losses.items():
        apart = max(abs(a / b - 1) for a, b in zip(found, losses["ours"], strict=True))
        if not apart < SAME_LOSS:
            raise RuntimeError(f"losses of {name} are {found}, ours {losses['ours']}: not the same training")


@dataclass(frozen=True)
class _Seconds:
    """Of one step on one rank."""

    clock: float
    cpu: float


def _measure(loops: Mapping[str, Loop], own: _OwnSamples, pairs: int) -> tuple[list[_Seconds], ...]:
    """Seconds of this rank: ours, theirs beside it, theirs again, theirs beside that ([Note: Pairs])."""
    columns: tuple[list[_Seconds], ...] = ([], [], [], [])
    gc.collect()
    gc.freeze()
    gc.disable()  # else it would run in whoever's step it falls
    for number in range(pairs):
        batch = own.batch(number)
        for (left, right), (first, second) in (((0, 1), ("ours", "theirs")), ((2, 3), ("again", "theirs"))):
            gc.collect()
            seconds = {}
            order = ((left, first), (right, second))
            for column, name in order if number % 2 == 0 else reversed(order):
                seconds[column] = _timed(loops[name], batch)
            for column, value in seconds.items():
                columns[column].append(value)
    return columns


def _timed(loop: Loop, batch: tuple[torch.Tensor, torch.Tensor]) -> _Seconds:
    dist.barrier()
    cpu, clock = time.process_time(), time.perf_counter()
    loop.step(*batch)
    return _Seconds(time.perf_counter() - clock, time.process_time() - cpu)


@dataclass(frozen=True)
class _OwnSamples:
    """Batches of random tokens; of each microbatch of micro_batch · dp samples this dp rank has its micro_batch."""

    plan: Plan
    dp_rank: int
    device: torch.device

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [microbatches · micro_batch, sequence]."""
        plan, layout = self.plan, self.plan.layout
        size = (plan.microbatches, layout.dp, layout.micro_batch, plan.job.sequence + 1)
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, plan.model.vocab_size, size, generator=generator)[:, self.dp_rank].flatten(0, 1)
        return tokens[:, :-1].contiguous().to(self.device), tokens[:, 1:].contiguous().to(self.device)


def first_values(model: ModelSpec) -> Values:
    """The first value of every parameter by name, whole, as the runtime draws them."""
    chunk = build_chunk(model, Stage.whole(model)).to_empty(device="cpu")
    initialise([chunk], layers=model.layers, seed=_SEED)
    return {name: parameter.detach() for name, parameter in named_parameters([chunk])}
