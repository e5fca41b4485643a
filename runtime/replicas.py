"""Gradients of weights that several ranks hold whole (zero 0), summed over those ranks by this module alone.

[Note: Gradient sum]
Where weights are neither cut nor widened nothing need be put around modules: they stay plain parameters, and what data
parallelism adds is one sum a step. A block's gradients are one message, its experts' another, what is before and after
the blocks one each. Each message is packed when the last of its gradients is there, and from then on the gradients are
views of it, so that they are copied once and a second copy of a block's gradients is all that is held besides. Without
a pipeline this happens in the backward of the step's last microbatch, while the rest of it runs. Under a pipeline it is
done when the schedule is over, by whatever order its backwards, whole or in halves, have run.

Ranks may have used different parameters. A message always has all of its parameters, with zeros where a rank has no
gradient, and behind them how many ranks had each; one that no rank has used keeps none. Messages leave in one fixed
order on all ranks, whichever is ready first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from .experts import Experts
from .local_parameters import local_part, with_local
from .mesh import RankMesh
from .transformer import Chunk

SPAN = "Replicas::"  # how the names of its spans for torch's profiler begin


@dataclass
class _Bucket:
    """Parameters of one dtype whose gradients are one message. `waiting` for so many of them."""

    parameters: list[nn.Parameter]
    group: dist.ProcessGroup
    waiting: int = 0
    flat: torch.Tensor | None = None
    work: dist.Work | None = None

    @property
    def offsets(self) -> list[int]:
        """Where each parameter's gradient begins in the message; last, where the counts of ranks do."""
        return [0, *accumulate(local_part(parameter).numel() for parameter in self.parameters)]

    def launch(self) -> None:
        """Pack the gradients, make them views of the message, and begin to sum it."""
        first = local_part(self.parameters[0])
        *offsets, end = self.offsets
        self.flat = flat = torch.empty(end + len(self.parameters), dtype=first.dtype, device=first.device)
        flat[end:] = 1.0
        for place, (parameter, offset) in enumerate(zip(self.parameters, offsets, strict=True)):
            local = local_part(parameter)
            view = flat.as_strided(local.shape, local.stride(), offset)
            if parameter.grad is None:
                view.zero_()
                flat[end + place] = 0.0
            else:
                view.copy_(local_part(parameter.grad))
                parameter.grad = with_local(parameter.grad, view)
        self.work = dist.all_reduce(flat, group=self.group, async_op=True)

    def wait(self) -> None:
        """Until the sum is there. A gradient that this rank had none of is given where another rank had one."""
        assert self.work is not None
        assert self.flat is not None
        self.work.wait()
        *offsets, end = self.offsets
        for place, (parameter, offset) in enumerate(zip(self.parameters, offsets, strict=True)):
            if parameter.grad is None and self.flat[end + place] > 0:
                local = local_part(parameter)
                parameter.grad = with_local(parameter, self.flat.as_strided(local.shape, local.stride(), offset))
        self.flat = self.work = None


class Replicas:
    """Sums the gradients of a rank's chunks over the ranks that hold the same weights ([Note: Gradient sum]).

    `overlap`: between `begin` and `finish` there is one backward, and messages leave while it runs.
    """

    def __init__(self, chunks: Sequence[Chunk], mesh: RankMesh, *, overlap: bool) -> None:
        self._buckets = [bucket for chunk in reversed(chunks) for bucket in _buckets_of(chunk, mesh)]
        self._launched = 0
        for chunk in chunks:
            chunk.replicas = _replicas_of(chunk, mesh)
        self._begun = False
        if overlap:
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def begin(self) -> None:
        """The backward that follows is the last before `finish`."""
        self._begun = True
        for bucket in self._buckets:
            bucket.waiting = len(bucket.parameters)

    def finish(self) -> None:
        """Sum what is not under way, and wait for all of it. Every rank must call it, once a step."""
        with torch.no_grad(), record_function(f"{SPAN}finish"):
            for bucket in self._buckets[self._launched :]:
                bucket.launch()
            for bucket in self._buckets:
                bucket.wait()
        self._launched, self._begun = 0, False

    def _hook(self, bucket: _Bucket) -> Any:
        def gradient_is_there(_parameter: torch.Tensor) -> None:
            if self._begun:
                bucket.waiting -= 1
                if not bucket.waiting:
                    self._launch_ready()

        return gradient_is_there

    def _launch_ready(self) -> None:
        while self._launched < len(self._buckets) and not self._buckets[self._launched].waiting:
            with torch.no_grad(), record_function(f"{SPAN}launch"):
                self._buckets[self._launched].launch()
            self._launched += 1


def _replicas_of(chunk: Chunk, mesh: RankMesh) -> dict[int, int]:
    experts = _experts_of(chunk)
    dense, expert = mesh.axis("dp").size(), mesh.axis("edp").size() if experts else 1
    return {id(parameter): expert if id(parameter) in experts else dense for parameter in chunk.parameters()}


def _experts_of(chunk: Chunk) -> set[int]:
    modules = (module for module in chunk.modules() if isinstance(module, Experts))
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _buckets_of(chunk: Chunk, mesh: RankMesh) -> Iterable[_Bucket]:
    """In about the order in which a backward pass fills them."""
    experts = _experts_of(chunk)
    axes = {"edp": mesh.axis("edp")} if experts else {}
    axes["dp"] = mesh.axis("dp")
    for parameters in _units_of(chunk):
        for axis, of in axes.items():
            if of.size() == 1:
                continue
            own = [p for p in parameters if p.requires_grad and (id(p) in experts) == (axis == "edp")]
            for dtype in dict.fromkeys(parameter.dtype for parameter in own):
                yield _Bucket([p for p in own if p.dtype == dtype], of.get_group())


def _units_of(chunk: Chunk) -> Iterable[list[nn.Parameter]]:
    """What is after the blocks, each block from the last to the first, and what is before them."""
    of_blocks: set[int] = set()
    blocks = []
    for block in chunk.blocks.values():  # some modules use a parameter in several
        blocks.append([parameter for parameter in block.parameters() if id(parameter) not in of_blocks])
        of_blocks |= {id(parameter) for parameter in blocks[-1]}
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    rest = before
    for parameter in chunk.parameters():
        if id(parameter) in of_blocks:
            rest = after
        else:
            rest.append(parameter)
    return [after, *reversed(blocks), before]
