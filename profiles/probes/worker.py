"""One rank of the profiler: joins the others, measures case after case with them until the time is up."""

from __future__ import annotations

import datetime
import importlib
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.cuda.nccl as nccl
import torch.distributed as dist

from ..points import CollectivePoint
from .cases import DEFAULT, PHASES, QUICK, Case, all_cases
from .collectives import make_groups
from .cpu_rank import prepare_cpu_rank
from .findings import LIST_OF, Request
from .pace import Pace
from .timing import CaseFailed, Rank
from .topology import NodeIdentity, device_conditions, node_identity, nvlink_topology

# What a training rank has imported, so that its resident memory before any model is measured like for like.
_TRAINING_MODULES = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
)
_EFFORT_SECONDS = {QUICK: 0.03, DEFAULT: 0.06}  # of one measurement; 0.15 in full
_TIMED = 0.25  # share of a collective's time that its samples may take
_SLOW_SECONDS = 5.0  # a case that takes longer is ruled by its bytes and not by the effort
_COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)

Tell = Callable[[str, Any], None]


def work(rank_index: int, world_size: int, init_method: str, request: Request, tell: Tell) -> None:
    """Measure as rank `rank_index`. Rank 0 tells `(kind, content)` of progress, facts and what was found.

    Cases that need memory or an operation which some rank lacks are skipped on all and named.
    """
    warnings.simplefilter("ignore")
    prepare_cpu_rank()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank_index))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=init_method,
        rank=rank_index,
        world_size=world_size,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    for module in _TRAINING_MODULES:
        importlib.import_module(module)
    control: Any = dist.new_group(backend="gloo") if world_size > 1 else None
    rank = Rank(rank_index, world_size, device, control)
    facts = _facts(rank)
    share = 1.0 if cuda else facts["ranks_per_machine"] / len(os.sched_getaffinity(0))
    rank = replace(rank, ranks_per_core=max(1.0, share), effort_seconds=_EFFORT_SECONDS.get(request.level, 0.15))
    cases = [case for case in all_cases(rank, make_groups(rank), request.dtypes) if case.level <= request.level]
    rank = replace(rank, patience_seconds=_patience(cases, rank.most(request.deadline - time.time())))
    if rank_index == 0:
        tell("facts", facts | {"quick_cases": [(case.phase, case.name) for case in cases if case.level == QUICK]})
    _measure(rank, [case for case in cases if case.name not in request.done], request, tell)
    if rank_index == 0:
        tell("end", {"conditions_after": device_conditions()})
    rank.barrier()
    dist.destroy_process_group()


def _measure(rank: Rank, cases: list[Case], request: Request, tell: Tell) -> None:
    # Whether to go on is decided by times that all ranks agree on: if one skipped a case, the others would wait in it.
    deadline = rank.most(request.deadline)
    spent = dict.fromkeys(PHASES, 0.0)  # seconds
    took: dict[str, list[tuple[int, float]]] = {}  # ladder -> (size, seconds) of its cases so far
    pace = Pace(rank) if rank.device.type == "cpu" else None
    for number, case in enumerate(in_turn(cases, spent)):
        now = rank.most(time.time())
        first = case.level == QUICK and not spent[case.phase]
        if not (first or case.needed) and now + _expected(case, took) > deadline:
            continue
        if rank.rank == 0:
            tell("progress", (case.phase, case.name, min(1.0, number / len(cases))))
        paced = pace.seconds() if pace is not None else 1.0
        found, reason = _attempt(rank, case)
        seconds = rank.most(time.time()) - now
        spent[case.phase] += seconds
        took.setdefault(case.ladder, []).append((case.size, seconds))
        if rank.rank == 0:
            tell("case", {"name": case.name, "found": found, "skipped": reason, "pace": paced})


def in_turn(cases: Iterable[Case], spent: Mapping[str, float]) -> Iterator[Case]:
    """The quick cases, next always of the phase that has had the least of its share of the time, then the others.

    `spent` are the seconds of each phase so far, which whoever measures keeps up. So a time that is up too early has
    seen of each phase what its share allows, and what one phase leaves over is shared by the rest.
    """
    queues = {phase: deque[Case]() for phase in PHASES}
    later = []
    for case in cases:
        if case.level == QUICK:
            queues[case.phase].append(case)
        else:
            later.append(case)
    while waiting := [phase for phase, queue in queues.items() if queue]:
        yield queues[min(waiting, key=lambda phase: spent[phase] / PHASES[phase])].popleft()
    yield from later


def _patience(cases: list[Case], left_seconds: float) -> float:
    """For one collective, so that all the quick ones together find the time of their phase, warm-up and quiet too."""
    links = sum(case.phase == "links" and case.level == QUICK for case in cases)
    return _TIMED * PHASES["links"] * left_seconds / max(1, links)


def _expected(case: Case, took: dict[str, list[tuple[int, float]]]) -> float:
    """Seconds that the case will take, from the nearest smaller one of its ladder: on a slow link they are many."""
    smaller = [known for known in took.get(case.ladder, []) if 0 < known[0] <= case.size]
    if not case.ladder or not smaller:
        return case.seconds
    size, seconds = max(smaller)
    return seconds * case.size / size if seconds > _SLOW_SECONDS else seconds


def _attempt(rank: Rank, case: Case) -> tuple[dict[str, Any], str]:
    """What the case found, merged over the ranks, or why it was skipped."""
    try:
        own = _by_list(case.measure(rank))
        rank.barrier()
    except CaseFailed as error:
        return {}, str(error)
    except (MemoryError, RuntimeError, AttributeError) as error:
        if not (case.optional or _is_out_of_reach(error)):
            raise
        rank.give_up()
        return {}, _reason(error)
    finally:
        if rank.device.type == "cuda":
            torch.cuda.empty_cache()
    merged: dict[str, Any] = {}
    for key, content in own.items():
        if isinstance(content, list) and content and hasattr(content[0], "spread"):
            merged[key] = _merged(rank, content)
        else:
            merged[key] = content
    return merged, ""


def _by_list(result: Any) -> dict[str, Any]:
    """A probe's result as {list of the profile or name of a figure: content}."""
    if isinstance(result, dict):
        return result
    points = result if isinstance(result, list) else [result]
    return {LIST_OF[type(points[0])]: points}


def _is_out_of_reach(error: Exception) -> bool:
    """Out of memory, or a dtype that a kernel has not got here; anything else is a bug.

    torch has classes for both, but for memory on CPUs, where only its allocator's message tells.
    """
    if isinstance(error, MemoryError | NotImplementedError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _merged(rank: Rank, points: list[Any]) -> list[dict[str, Any]]:
    """Each point with its median over the ranks (of a collective the mean: all have waited for each other)."""
    own = torch.tensor([[p.seconds, p.spread] for p in points], dtype=torch.float64)
    every = [torch.empty_like(own) for _ in range(rank.world_size)]
    if rank.control is not None:
        dist.all_gather(every, own, group=rank.control)
    else:
        every = [own]
    stacked = torch.stack(every)
    communicates = isinstance(points[0], CollectivePoint)
    merged = stacked.mean(dim=0) if communicates else stacked.quantile(0.5, dim=0)
    return [
        {**asdict(p), "seconds": seconds, "spread": round(spread, 3)}
        for p, (seconds, spread) in zip(points, merged.tolist(), strict=True)
    ]


# ---- facts about the machine ---------------------------------------------------------------------------------


def _facts(rank: Rank) -> dict[str, Any]:
    """What stays the same while measuring. Every rank must call it."""
    own = {
        "node": node_identity().to_dict(),
        "context_bytes": _resident_bytes(rank),
        "device": _device_name(rank),
    }
    every: list[Any] = [own]
    if rank.control is not None:
        every = [None] * rank.world_size
        dist.all_gather_object(every, own, group=rank.control)
    nodes = [NodeIdentity(**one["node"]) for one in every]
    machine = nodes[rank.rank].boot_id
    per_machine = sum(node.boot_id == machine for node in nodes)
    topology, reason = nvlink_topology() if rank.device.type == "cuda" else (None, "no GPU")
    return {
        "nodes": [node.to_dict() for node in nodes],
        "runs": _runs(nodes),
        "ranks_per_machine": per_machine,
        "device": own["device"],
        "context_bytes": max(one["context_bytes"] for one in every),
        "memory_bytes": _memory_bytes(rank, per_machine),
        "cuda": rank.device.type == "cuda",
        "multiprocessors": _multiprocessors(rank),
        "topology": topology.to_dict() if topology is not None else reason,
        "driver": topology.driver_version if topology is not None else None,
        "nccl": ".".join(map(str, nccl.version())) if rank.device.type == "cuda" else None,
        "conditions_before": device_conditions(),
    }


def _runs(nodes: Iterable[NodeIdentity]) -> list[int]:
    """How many neighbouring ranks are on one node, node after node."""
    runs: list[int] = []
    before: NodeIdentity | None = None
    for node in nodes:
        if node == before:
            runs[-1] += 1
        else:
            runs.append(1)
        before = node
    return runs


def _resident_bytes(rank: Rank) -> float:
    """Bytes this process holds now: interpreter, torch and communicators, before any model."""
    if rank.device.type == "cuda":
        torch.ones(1, device=rank.device)
        free, total = torch.cuda.mem_get_info()
        return float(total - free)
    with open("/proc/self/statm") as statm:
        return float(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def _memory_bytes(rank: Rank, ranks_per_machine: int) -> float:
    """One rank's memory: its GPU's, or its share of what its machine has."""
    if rank.device.type == "cuda":
        return float(torch.cuda.get_device_properties(rank.device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / ranks_per_machine


def _multiprocessors(rank: Rank) -> int:
    return torch.cuda.get_device_properties(rank.device).multi_processor_count if rank.device.type == "cuda" else 0


def _device_name(rank: Rank) -> str:
    if rank.device.type == "cuda":
        return torch.cuda.get_device_name(rank.device)
    with open("/proc/cpuinfo") as cpuinfo:
        names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, one thread a rank"
