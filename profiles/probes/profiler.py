"""The profiler's conduct: ranks started together, a time budget kept, one HardwareProfile and ClusterSpec out."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import queue
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..cluster import ClusterSpec, LinkTier
from ..hardware import AttentionPoint, CollectivePoint, GemmPoint, HardwareProfile, MemoryPoint
from ..input_error import InputError
from . import collectives, compute
from .overheads import measure_overheads
from .timing import Rank

# Shares of the time budget; what a phase leaves over goes to the next.
_SHARES = (("collectives", 0.30), ("overheads", 0.15), ("memory", 0.20), ("attention", 0.15), ("gemm", 0.20))
_NCCL_COMMUNICATOR_BYTES = 616e6  # middle of the 544 to 688 MB that one was seen to take; gloo's buffers are small
_ALLOCATOR_SLACK = 0.05  # nominal: blocks that the allocator holds and no tensor uses
_HIDDEN_ON_CUDA = 0.9  # nominal, until overlap is measured; FSDP2 on gloo blocks, so nothing hides there
# What a training rank has imported, so that its resident memory before any model is measured like for like.
_TRAINING_MODULES = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
)
_PATIENCE_SECONDS = 120.0  # beyond the budget, before a silent rank is taken for lost


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure: ranks, seconds for all of it, and the dtypes of GEMM, attention and memory-bound work."""

    ranks: int
    budget_seconds: float
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """What the profiler is at: phase, and the share of the budget used, 0 to 1."""

    phase: str
    share: float


def default_ranks() -> int:
    """All GPUs, else the CPU cores this process may use, at most 8."""
    return torch.cuda.device_count() or min(8, len(os.sched_getaffinity(0)))


def profile_machine(
    request: ProfileRequest, command: str, on_progress: Callable[[Progress], None]
) -> tuple[HardwareProfile, ClusterSpec]:
    """Measure this machine with `request.ranks` ranks at once.

    Raises:
        InputError: more ranks than GPUs, or a rank that died or went silent.
    """
    cuda = torch.cuda.is_available()
    if cuda and request.ranks > torch.cuda.device_count():
        raise InputError(
            "more ranks than GPUs",
            where="--nproc",
            expected=f"at most {torch.cuda.device_count()}",
            got=str(request.ranks),
        )
    context = mp.get_context("spawn")
    messages: Any = context.Queue()
    deadline = time.time() + request.budget_seconds
    port = _free_port()
    workers = [
        context.Process(target=_work, args=(rank, request, port, deadline, messages), daemon=True)
        for rank in range(request.ranks)
    ]
    for worker in workers:
        worker.start()
    try:
        results = _collect(workers, messages, request, deadline, on_progress)
    finally:
        for worker in workers:
            worker.join(timeout=2)
            if worker.is_alive():
                worker.kill()
    return _profile(request, command, cuda, results), _cluster(request, results)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _collect(
    workers: list[Any], messages: Any, request: ProfileRequest, deadline: float, on_progress: Callable[[Progress], None]
) -> list[dict[str, Any]]:
    """One result per rank; a dead or silent rank is an InputError that names it."""
    results: dict[int, dict[str, Any]] = {}
    while len(results) < len(workers):
        try:
            kind, rank, content = messages.get(timeout=0.5)
        except queue.Empty:
            dead = [i for i, worker in enumerate(workers) if i not in results and worker.exitcode is not None]
            if dead:
                raise InputError(
                    f"rank {dead[0]} of the profiler died",
                    where=f"rank {dead[0]}",
                    got=f"exit code {workers[dead[0]].exitcode}",
                    hint="fewer ranks: --nproc",
                ) from None
            if time.time() > deadline + _PATIENCE_SECONDS:
                silent = sorted(set(range(len(workers))) - set(results))
                raise InputError(f"ranks {silent} of the profiler went silent", hint="fewer ranks: --nproc") from None
            continue
        if kind == "progress":
            on_progress(Progress(content, 1.0 - max(0.0, deadline - time.time()) / request.budget_seconds))
        elif kind == "failed":
            raise InputError(f"rank {rank} of the profiler failed", where=f"rank {rank}", got=content)
        else:
            results[rank] = content
    return [results[rank] for rank in range(len(workers))]


def _work(index: int, request: ProfileRequest, port: int, deadline: float, messages: Any) -> None:
    """One rank: measure every phase until its share of the time is gone, then report."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=index,
            world_size=request.ranks,
            timeout=datetime.timedelta(seconds=60),
        )
        rank = Rank(index, request.ranks, device)
        messages.put(("result", index, _measure(rank, request, deadline, messages)))
        rank.barrier()
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:  # reported to the parent, which names the rank
        messages.put(("failed", index, f"{type(error).__name__}: {error}"))
        messages.close()
        messages.join_thread()
        os._exit(1)
    dist.destroy_process_group()


def _measure(rank: Rank, request: ProfileRequest, deadline: float, messages: Any) -> dict[str, Any]:
    cuda = rank.device.type == "cuda"
    for module in _TRAINING_MODULES:
        importlib.import_module(module)
    groups = collectives.make_groups(rank)
    context_bytes = _resident_bytes(rank)
    cases: dict[str, list[Callable[[], object]]] = {
        "collectives": [
            lambda c=c: collectives.measure_collective(rank, groups[c[0]], c[0], c[1], c[2])
            for c in collectives.collective_cases(rank.world_size, cuda)
        ],
        "overheads": [lambda: measure_overheads(rank, groups)],
        "memory": [
            lambda d=d, o=o, e=e: compute.measure_memory(rank, d, o, e)
            for d in request.dtypes
            for e in (compute.CUDA_ELEMENTS if cuda else compute.CPU_ELEMENTS)
            for o in compute.MEMORY_OPERATIONS
        ],
        "attention": [
            lambda d=d, s=s: compute.measure_attention(rank, d, *s)
            for d in request.dtypes
            for s in compute.attention_shapes(cuda)
        ],
        "gemm": [
            lambda d=d, s=s: compute.measure_gemm(rank, d, *s)
            for s in compute.gemm_shapes(cuda)
            for d in request.dtypes
        ],
    }
    total = max(1.0, deadline - time.time())
    found: dict[str, Any] = {"context_bytes": context_bytes}
    used = 0.0
    for phase, share in _SHARES:
        used += share
        until = deadline - total * (1.0 - used)
        if rank.rank == 0:
            messages.put(("progress", 0, phase))
        found[phase] = _until(rank, cases[phase], until)
    found["device"] = _device_name(rank)
    found["memory_bytes"] = _memory_bytes(rank)
    return found


def _until(rank: Rank, cases: list[Callable[[], object]], until: float) -> list[Any]:
    """Results of the cases, in order, until the time is up on any rank; the first always runs."""
    results: list[Any] = []
    for case in cases:
        late = torch.tensor([float(time.time() > until)], device=rank.device)
        if rank.world_size > 1:
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if results and late.item() > 0:
            break
        result = case()
        results.extend(result if isinstance(result, list) else [result])
    return results


def _resident_bytes(rank: Rank) -> float:
    """Bytes this process holds now: interpreter, torch and communicators, before any model."""
    if rank.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return float(total - free)
    with open("/proc/self/statm") as statm:
        return float(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def _memory_bytes(rank: Rank) -> float:
    """One rank's memory: its GPU's, or its share of what this machine has."""
    if rank.device.type == "cuda":
        return float(torch.cuda.get_device_properties(rank.device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / rank.world_size


def _device_name(rank: Rank) -> str:
    if rank.device.type == "cuda":
        return torch.cuda.get_device_name(rank.device)
    with open("/proc/cpuinfo") as cpuinfo:
        names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, one core a rank"


def _merged(results: list[dict[str, Any]], phase: str, kind: type) -> tuple[Any, ...]:
    """Points of one kind, each the median over the ranks (a collective: the slowest rank)."""
    merged = []
    pick = max if kind is CollectivePoint else statistics.median
    for points in zip(*(result[phase] for result in results), strict=True):
        seconds = pick([point.seconds for point in points])
        merged.append(kind(**{**vars(points[0]), "seconds": float(seconds)}))
    return tuple(merged)


def _profile(request: ProfileRequest, command: str, cuda: bool, results: list[dict[str, Any]]) -> HardwareProfile:
    gemm = _merged(results, "gemm", GemmPoint)
    memory = _merged(results, "memory", MemoryPoint)
    overheads = {key: statistics.median(r["overheads"][0][key] for r in results) for key in results[0]["overheads"][0]}
    peaks = {
        dtype: max(2.0 * p.m * p.n * p.k / p.seconds for p in gemm if p.dtype == dtype) for dtype in request.dtypes
    }
    large = max((p for p in memory if p.operation == "residual" and p.direction == "forward"), key=lambda p: p.elements)
    smallest = min(p.seconds for p in memory if p.operation == "residual" and p.direction == "forward")
    return HardwareProfile(
        name="local",
        device=results[0]["device"],
        backend="nccl" if cuda else "gloo",
        memory_bytes=results[0]["memory_bytes"],
        context_bytes=max(r["context_bytes"] for r in results),
        communicator_bytes=_NCCL_COMMUNICATOR_BYTES if cuda else 0.0,
        allocator_slack=_ALLOCATOR_SLACK,
        memory_bandwidth_bytes_per_second=12.0 * large.elements / large.seconds,
        launch_seconds=smallest,
        hidden_communication=_HIDDEN_ON_CUDA if cuda else 0.0,
        **overheads,
        peak_flops_per_second=peaks,
        provenance={
            "kind": "measured",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "host": platform.node(),
            "ranks": request.ranks,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        gemm=gemm,
        attention=_merged(results, "attention", AttentionPoint),
        memory=memory,
        collectives=_merged(results, "collectives", CollectivePoint),
    )


def _cluster(request: ProfileRequest, results: list[dict[str, Any]]) -> ClusterSpec:
    points = [p for p in _merged(results, "collectives", CollectivePoint) if p.operation == "all_reduce"]
    if points:
        large, small = max(points, key=lambda p: p.bytes), min(points, key=lambda p: p.bytes)
        steps = 2 * (small.ranks - 1)
        bandwidth, latency = large.bytes * steps / large.ranks / large.seconds, small.seconds / steps
    else:
        bandwidth, latency = 1e9, 1e-3
    link = LinkTier(
        tier="node",
        span=request.ranks,
        bandwidth_bytes_per_second=bandwidth,
        latency_seconds=latency,
        source="measured: all-reduce of the hardware profile" if points else "one rank: no link",
    )
    return ClusterSpec(
        name="local",
        hardware="local",
        nodes=1,
        devices_per_node=request.ranks,
        memory_bytes=results[0]["memory_bytes"],
        links=(link,),
    )
