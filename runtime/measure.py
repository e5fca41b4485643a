"""Where a step's seconds went on each rank: compute and its kernels, tp, cp, dp, pipeline bubble, optimizer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.record import KERNELS, PARTS

from .clock import Clock
from .mesh import AXES, RankMesh
from .replicas import SPAN as REPLICAS
from .ring_attention import WAIT, seen_through

WARM_UP_STEPS = 2  # first steps allocate and fill torch's caches of sharding rules
LONG_RUN_STEPS = 8  # from here on steps 4 to 6 are watched; a shorter run watches its last step
_WATCHED_STEPS = (4, 5, 6)
WATCH_EVERY = 100  # besides, so that a rank that becomes slow later is seen
_SPANS = {"FSDP::": "dp", REPLICAS: "dp", WAIT: "cp"}  # how names of spans booked whole begin, and their axis
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "_grouped_mm"}


class OperationTimer(TorchDispatchMode):
    """Times each collective on its own, from issue to end, and books it on the mesh axis of its group; and each
    kernel, booked as gemm, attention or memory (all others). All that FSDP2 does is dp's: its packing and its Python
    with its collectives, as the profiler measures them. It marks what it does for torch's profiler, and so do our own
    sum of gradients, dp's too, and the ring where it waits for a message, which is what cp's costs.

    To wait for each collective takes away overlap, so steps under this mode are not counted as step time. Sends
    and receives are let through: to wait for one before its partner is posted would deadlock.
    """

    def __init__(self, mesh: RankMesh, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        axes = {axis: axis for axis in AXES}
        self._exchanging: set[str] = set()  # groups in which tokens go to their experts
        if mesh.expert_mesh is not None:
            # A group of the same ranks may serve another axis too; what FSDP2 does in it is booked by its span.
            axes = {"edp": "dp"} | axes
            self._exchanging = {group.group_name for axis in ("ep", "etp") for group in mesh.groups(axis)}
        self.axis_of_group: dict[str, str] = {
            group.group_name: booked for axis, booked in axes.items() for group in mesh.groups(axis)
        }
        if mesh.context_group is not None:
            self.axis_of_group[mesh.context_group.group_name] = "cp"
        self.counts: dict[str, int] = {}
        self._marks: list[str | None] = []  # of the spans that are open: the axis that each is booked on
        self._entered: Any = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as it is, and its collectives and GEMMs are seen; without this torch leaves it aside."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # DTensor unfolds first, and its collectives come back here as plain ops
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return self._mark(func, args, kwargs)
        if (ring := seen_through(self, func)) is not None:
            return ring(*args)
        axis = self._axis(func, args, kwargs)
        if axis is None and (func.namespace != "aten" or func.is_view):
            return func(*args, **kwargs)
        start = self.clock.point()
        output = func(*args, **kwargs)
        if axis is None:
            if not any(self._marks):
                self.clock.add(f"kernel_{kernel_kind(func.__name__)}", start)
            return output
        if func.namespace == "c10d":
            _wait_for_work(output)
        else:
            _wait_for_tensors(output)
        if not any(self._marks):
            self.clock.add(f"communication_{axis}", start)
        name = f"{axis}:{func.__name__.split('.')[0]}"
        self.counts[name] = self.counts.get(name, 0) + 1
        return output

    def _mark(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A span of torch's profiler begins or ends; the outermost of _SPANS are booked whole."""
        inside = any(self._marks)
        if func.__name__.startswith("_record_function_enter"):
            name = str(args[0])
            self._marks.append(next((axis for start, axis in _SPANS.items() if name.startswith(start)), None))
            if any(self._marks) and not inside:
                self._entered = self.clock.point()
        elif self._marks:
            axis = self._marks.pop()
            if inside and not any(self._marks):
                self.clock.add(f"communication_{axis}", self._entered)
        return func(*args, **kwargs)

    def _axis(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """The axis of a collective; None for every other op, and for the world's scalar all-reduce."""
        if func.namespace == "_c10d_functional":
            name = next((value for value in (*reversed(args), *kwargs.values()) if isinstance(value, str)), None)
        elif func.namespace == "c10d" and func.__name__.split(".")[0] not in ("send", "recv_", "recv_any_source_"):
            boxed = next(value for value in args if isinstance(value, torch.ScriptObject) and _is_group(value))
            name = dist.ProcessGroup.unbox(boxed).group_name
        else:
            return None
        if name in self._exchanging and "all_to_all" in func.__name__:
            return "ep"
        return self.axis_of_group.get(name) if name is not None else None


def kernel_kind(name: str) -> str:
    """gemm, attention or memory: what bounds the aten operation of this name."""
    base = name.split(".")[0]
    if base in _PRODUCTS:
        return "gemm"
    return "attention" if base.startswith(("_scaled_dot_product", "_flash_attention")) else "memory"


@dataclass
class StepMeter:
    """Collects the spans of each step and, for a few steps, the seconds of each collective and kernel.

    `watched_steps` are those few, where they are not to be the usual ones; else they come again every `watch_every`
    steps, 0 for never, and none of `unwatched` is among them.

    Usage, on every rank: `with meter.watch(step):` around forward and backward, `meter.end_step(step, …)`
    after it, `meter.table()` when the run is over.
    """

    mesh: RankMesh
    clock: Clock
    pp: int
    steps: int
    watched_steps: tuple[int, ...] = ()
    watch_every: int = 0
    unwatched: range = range(0)
    _tables: dict[int, dict[str, float]] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)
    _communication: dict[str, list[float]] = field(default_factory=lambda: {"tp": [], "cp": [], "dp": [], "ep": []})
    _kernels: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KERNELS})

    def watched(self, step: int) -> bool:
        """Whether collectives are timed in this step; `step` counts from 1 within this process's run."""
        if self.watched_steps:
            return step in self.watched_steps
        if step in self.unwatched:
            return False
        if self.steps >= LONG_RUN_STEPS:
            return step in _WATCHED_STEPS or (self.watch_every > 0 and step % self.watch_every == 0)
        return step == self.steps and self.steps > 1

    def watch(self, step: int) -> AbstractContextManager[Any]:
        return OperationTimer(self.mesh, self.clock) if self.watched(step) else nullcontext()

    def end_step(self, step: int, *, step_seconds: float, optimizer: float, synchronise: float) -> None:
        """Book a step: `optimizer` seconds of norm, clipping and update; `synchronise` of waiting for all ranks."""
        spans = self.clock.read()
        if self.watched(step):
            for axis, seconds in self._communication.items():
                seconds.append(spans.get(f"communication_{axis}", 0.0))
            for kind, seconds in self._kernels.items():
                seconds.append(spans.get(f"kernel_{kind}", 0.0))
            return
        busy = spans.get("forward", 0.0) + spans.get("backward", 0.0) + spans.get("reduce", 0.0)
        idle = spans["schedule"] - busy
        table: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        table["compute"] = busy
        if self.pp > 1:
            # A stage that ends early waits for the others in the schedule, or else in the first collective
            # after it, the sum of a tied matrix's gradients among them.
            table["pp_bubble"] = idle + spans.get("complete", 0.0) + synchronise
            table["optimizer"] = optimizer
        else:
            table["compute"] += idle
            table["optimizer"] = optimizer + synchronise
        table["other"] = step_seconds - sum(table.values())
        self._tables[step] = table
        self._seconds[step] = step_seconds

    def median_step(self) -> int:
        """The counted step whose seconds are the (lower) median on this rank."""
        settled = [step for step in self._seconds if step > WARM_UP_STEPS]
        steps = settled or list(self._seconds)
        return sorted(steps, key=lambda step: self._seconds[step])[(len(steps) - 1) // 2]

    def table(self, step: int) -> dict[str, float]:
        """Seconds of each part of `step`; they sum to its seconds.

        tp, cp, ep and dp_exposed are medians over the watched steps and are taken out of compute.
        """
        parts = dict(self._tables[step])
        for part, axis in (("tp", "tp"), ("cp", "cp"), ("ep", "ep"), ("dp_exposed", "dp")):
            seconds = statistics.median(self._communication[axis]) if self._communication[axis] else 0.0
            seconds = min(seconds, parts["compute"])
            parts[part] += seconds
            parts["compute"] -= seconds
        return parts

    def kernels(self) -> dict[str, float]:
        """Seconds of a step in kernels of each kind, medians over the watched steps; {} where none was watched."""
        return {kind: statistics.median(seconds) for kind, seconds in self._kernels.items() if seconds}

    def kernel_seconds(self) -> list[float]:
        """Seconds in kernels of all kinds, of each watched step."""
        return [sum(step) for step in zip(*self._kernels.values(), strict=True)]

    def seconds(self, step: int) -> float:
        return self._seconds[step]


def busiest(tables: Sequence[dict[str, float]]) -> int:
    """The rank with the most compute, the lowest of equals: the one whose time the step is made of."""
    return max(range(len(tables)), key=lambda rank: (tables[rank]["compute"], -rank))


def _is_group(boxed: Any) -> bool:
    return "ProcessGroup" in str(boxed._type())


def _wait_for_tensors(output: Any) -> None:
    """Wait for the tensors that a functional collective gives."""
    for tensor in output if isinstance(output, list | tuple) else (output,):
        torch.ops._c10d_functional.wait_tensor(tensor)


def _wait_for_work(output: Any) -> None:
    """Wait for the Work among a c10d op's results; NCCL gives none where it was called to be waited for."""
    for value in output if isinstance(output, list | tuple) else (output,):
        if isinstance(value, torch.ScriptObject) and (work := dist.Work.unbox(value)) is not None:
            work.wait()
