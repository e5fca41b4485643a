"""Layouts run side by side: on the ranks a step of each in turn, on the other side what they have left in a folder.

[Note: Turns]
A machine that others share runs faster and slower by the minute, so what is predicted and what is measured must see
the same minutes. The ranks build every layout once and then work in turns; between two of them they wait, and the
machine is profiled. Turns are asked for and answered with empty files in a folder, which ranks in another network
namespace see too.

[Note: Groups]
Each process group of gloo's has a thread that looks around a hundred times a second. A run has a dozen groups, dozens
of layouts in one process have hundreds, whose threads took a large part of two cores from what was measured. So layouts
share their groups, each as many over the same ranks as it asks for.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed import device_mesh

from planner.plan import Plan, load, save
from profiles.hardware import HardwareProfile
from profiles.parent_process import die_with_parent
from profiles.probes.pace import Pace
from profiles.probes.timing import Rank
from runtime.measure import StepMeter, busiest
from runtime.process_group import process_group
from runtime.step import TrainState, build_state, training_step

WARM_UP_ROUNDS = 2
WATCHED_ROUNDS = 1  # after the measured ones: every kernel and collective timed on its own
_LOOK_SECONDS = 0.05  # between two looks for a file
_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Case:
    """One layout: its plan, seconds of each measured step (slowest rank), and the busiest rank's parts."""

    plan: Plan
    seconds: list[float]
    rank: int
    parts: dict[str, float]
    kernels: dict[str, float]
    paces: list[float]

    @property
    def measured_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def error(self) -> float:
        return self.plan.prediction.step_seconds / self.measured_seconds - 1.0

    def slowness(self, hardware: HardwareProfile) -> float:
        """Seconds of the reference work around these steps, in times of those while profiling."""
        pace = hardware.provenance.get("pace")
        return statistics.median(self.paces) / pace["median_seconds"] if pace else 1.0

    def paced_error(self, hardware: HardwareProfile) -> float:
        """The error had the machine kept the profile's pace."""
        return (1.0 + self.error) * self.slowness(hardware) - 1.0


# ---- on the ranks --------------------------------------------------------------------------------------------


def run_layouts(folder: Path, count: int, turns: int, rounds: int) -> None:
    """One rank, its place in the environment: build every layout, then in each turn `rounds` steps of each."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds: list[list[float]] = [[] for _ in range(count)]
    paces: list[list[float]] = [[] for _ in range(count)]
    with process_group(world_size, _PATIENCE_SECONDS) as device:
        pace = Pace(Rank(rank, world_size, device, dist.group.WORLD))
        plans = [load(folder / f"{i}.yaml") for i in range(count)]
        states = _states(plans, device)
        last = WARM_UP_ROUNDS + turns * rounds
        watched = tuple(last + 1 + i for i in range(WATCHED_ROUNDS))
        meters = [
            StepMeter(state.mesh, state.runner.clock, plan.layout.pp, last + WATCHED_ROUNDS, watched_steps=watched)
            for plan, state in zip(plans, states, strict=True)
        ]
        for number in range(1, last + WATCHED_ROUNDS + 1):
            turn, within = divmod(number - WARM_UP_ROUNDS - 1, rounds)
            measured = WARM_UP_ROUNDS < number <= last
            if number > WARM_UP_ROUNDS and within == 0 and rank == 0:
                _wait_for(folder / f"turn{turn}", lambda: None)  # the watched rounds are the last turn
            for i, (plan, state) in enumerate(zip(plans, states, strict=True)):
                if measured:
                    paces[i].append(pace.seconds())
                dist.barrier()
                started = time.perf_counter()
                one_step(plan, state, meters[i], number)
                if measured:
                    seconds[i].append(time.perf_counter() - started)
            if rank == 0:
                print(f"round {number} of {last + WATCHED_ROUNDS}", file=sys.stderr, flush=True)
                if measured and within == rounds - 1:
                    (folder / f"done{turn}").touch()
        tables = [(meter.table(meter.median_step()), meter.kernels()) for meter in meters]
        torch.save({"seconds": seconds, "tables": tables, "paces": paces}, folder / f"rank{rank}.pt")


def _states(plans: Sequence[Plan], device: torch.device) -> list[TrainState]:
    """Of every plan, on process groups that they share."""
    states, made = [], dict[GroupKey, Any]()
    for plan in plans:
        with shared_groups(made):
            states.append(build_state(plan, device, dtype=torch.float32, seed=0, weight_decay=0.1))
    return states


# Ranks, and which of the groups that one layout asks for over them, counted from 1.
GroupKey = tuple[tuple[int, ...], int]


@contextmanager
def shared_groups(made: dict[GroupKey, Any]) -> Iterator[None]:
    """Meanwhile one layout is built, of groups that are `made` where they are ([Note: Groups]); two of its axes over
    the same ranks have one each."""
    asked, new_group = Counter[tuple[int, ...]](), dist.new_group

    def shared(ranks: Sequence[int], **options: Any) -> Any:
        asked[tuple(ranks)] += 1
        key = (tuple(ranks), asked[tuple(ranks)])
        if key not in made:
            made[key] = new_group(ranks, **options)
        return made[key]

    dist.new_group = device_mesh.new_group = shared  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.new_group = device_mesh.new_group = new_group


def one_step(plan: Plan, state: TrainState, meter: StepMeter, number: int) -> None:
    samples, length = plan.microbatches * plan.layout.micro_batch, plan.job.sequence // plan.layout.cp
    ids = torch.randint(0, plan.model.vocab_size, (samples, length + 1), device=state.device)
    start = time.perf_counter()
    result = training_step(
        state,
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        learning_rate=1e-4,
        clip_norm=1.0,
        watch=meter.watch(number),
    )
    meter.end_step(
        number,
        step_seconds=time.perf_counter() - start,
        optimizer=result.optimizer_seconds,
        synchronise=result.synchronise_seconds,
    )


# ---- on the other side ---------------------------------------------------------------------------------------


class Turns:
    """The ranks' side of the folder as the one that has them started sees it.

    Between two turns the `processes` are stopped: gloo's threads, of which the groups of all layouts have a hundred,
    look around a hundred times a second each, and what is profiled meanwhile would seem slower than it is.
    """

    def __init__(self, folder: Path, check: Callable[[], None], processes: Sequence[int] = ()) -> None:
        self._folder, self._check, self._processes, self._taken = folder, check, processes, 0

    def take(self) -> None:
        """Let the ranks work for one turn; back when it is over. `check` raises if they are no more."""
        self.watch()
        _wait_for(self._folder / f"done{self._taken}", self._check)
        self._send(signal.SIGSTOP)
        self._taken += 1

    def watch(self) -> None:
        """Let them go on to the watched rounds and end."""
        (self._folder / f"turn{self._taken}").touch()
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            os.kill(process, number)


@contextmanager
def ranks_of_this_machine(folder: Path, world_size: int, count: int, turns: int, rounds: int) -> Iterator[Turns]:
    """The ranks at work on the plans in the folder; at the end they have left there what they measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world_size, port, str(folder), count, turns, rounds)
    started: Any = mp.start_processes(  # type: ignore[reportPrivateImportUsage]
        _spawned, args=arguments, nprocs=world_size, start_method="spawn", join=False
    )

    def check() -> None:
        started.join(timeout=0)  # raises what a rank has raised

    work = Turns(folder, check, started.pids())
    yield work
    work.watch()
    while not started.join():
        pass


def _spawned(rank: int, world_size: int, port: int, folder: str, count: int, turns: int, rounds: int) -> None:
    die_with_parent()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
    run_layouts(Path(folder), count, turns, rounds)


def _wait_for(file: Path, check: Callable[[], None]) -> None:
    while not file.exists():
        check()
        time.sleep(_LOOK_SECONDS)


def save_plans(plans: Sequence[Plan], folder: Path) -> None:
    for i, plan in enumerate(plans):
        save(plan, folder / f"{i}.yaml")


def read_cases(plans: Sequence[Plan], folder: Path, world_size: int) -> list[Case]:
    """What the ranks have left in the folder; the plans may have been priced anew since."""
    ranks = [torch.load(folder / f"rank{r}.pt") for r in range(world_size)]
    cases = []
    for i, plan in enumerate(plans):
        steps = [max(step) for step in zip(*(rank["seconds"][i] for rank in ranks), strict=True)]
        busy = busiest([rank["tables"][i][0] for rank in ranks])
        parts, kernels = ranks[busy]["tables"][i]
        cases.append(Case(plan, steps, busy, parts, kernels, ranks[0]["paces"][i]))
    return cases
