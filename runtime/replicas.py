"""Gradients of weights that several ranks hold whole (zero 0), summed over those ranks by this module alone.

[Note: Gradient sum]
Where weights are neither cut nor widened nothing need be put around modules: they stay plain parameters, and what data
parallelism adds is one sum a step. Gradients are sent in messages of at most `MESSAGE_BYTES`, from the last parameter
to the first, which is about the order in which a backward finishes them. A message is packed when the last of its
gradients is there, and from then on they are views of it: each is copied once, and besides the gradients one message is
held. A gradient that alone is as large is summed where it lies. Without a pipeline this happens in the backward of the
step's last microbatch, while the rest of it runs; under one when the schedule is over, by whatever order its backwards,
whole or in halves, have run.

Ranks may have used different parameters. A message always has all of its parameters, with zeros where a rank has no
gradient, and behind them how many ranks had each; one that no rank has used keeps none. Messages leave in one fixed
order on all ranks, whichever is ready first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function

from planner.layout import MESSAGE_BYTES

from .experts import Experts
from .local_parameters import local_part, with_local
from .mesh import RankMesh
from .transformer import Chunk

SPAN = "Replicas::"  # how the names of its spans for torch's profiler begin


@dataclass
class _Message:
    """Parameters of one dtype whose gradients are sent together, and the place of the last of them among all.

    `begin` are where their gradients begin in `flat`; the numbers of ranks that had each begin at `elements`, or where
    the one gradient `stays` where it lies they are `counts`. `missing` is how many of the gradients are not there yet.
    """

    group: dist.ProcessGroup
    parameters: list[nn.Parameter] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    elements: int = 0
    last: int = 0
    missing: int = 0
    flat: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    works: list[dist.Work] = field(default_factory=list)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter would still fit in."""
        local = local_part(parameter)
        return not self.parameters or (self.elements + local.numel()) * local.element_size() <= MESSAGE_BYTES

    def put(self, parameter: nn.Parameter, place: int) -> None:
        self.parameters.append(parameter)
        self.begin.append(self.elements)
        self.elements += local_part(parameter).numel()
        self.last = place

    @property
    def stays(self) -> bool:
        return self.elements * self.parameters[0].element_size() >= MESSAGE_BYTES and len(self.parameters) == 1

    def view(self, which: int) -> torch.Tensor:
        """The part of the message that is the gradient of a parameter, with that one's strides."""
        assert self.flat is not None
        local = local_part(self.parameters[which])
        return self.flat.as_strided(local.shape, local.stride(), self.flat.storage_offset() + self.begin[which])

    def launch(self) -> None:
        """Pack the gradients, make them views of the message, and begin to sum it."""
        local, number = local_part(self.parameters[0]), len(self.parameters)
        there = [float(parameter.grad is not None) for parameter in self.parameters]
        own = None if self.parameters[0].grad is None else local_part(self.parameters[0].grad)
        if self.stays:
            self.counts = local.new_tensor(there)
            if own is not None and own.stride() == local.stride():
                self.flat = own.as_strided((self.elements,), (1,))
            else:
                self.flat = self._pack(local.new_empty(self.elements))
            self.works = [self._sum(self.flat), self._sum(self.counts)]
        else:
            self.flat = self._pack(local.new_empty(self.elements + number))
            counts = self.counts = self.flat[self.elements :]
            counts.fill_(1.0)
            for which in (which for which in range(number) if not there[which]):
                counts[which] = 0.0
            self.works = [self._sum(self.flat)]

    def _sum(self, flat: torch.Tensor) -> dist.Work:
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        return work

    def _pack(self, flat: torch.Tensor) -> torch.Tensor:
        self.flat = flat
        for which, parameter in enumerate(self.parameters):
            view = self.view(which)
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(local_part(parameter.grad))
                parameter.grad = with_local(parameter.grad, view)  # type: ignore[assignment]
        return flat

    def wait(self) -> None:
        """Until the sum is there. A gradient that this rank had none of is there if another rank had one."""
        for work in self.works:
            work.wait()
        assert self.counts is not None
        for which, parameter in enumerate(self.parameters):
            if parameter.grad is None and self.counts[which] > 0:
                parameter.grad = with_local(parameter, self.view(which))  # type: ignore[assignment]
        self.flat, self.counts, self.works = None, None, []


class Replicas:
    """Sums the gradients of a rank's chunks over the ranks that hold the same weights ([Note: Gradient sum]).

    With `overlap` messages leave during the backward between `begin` and `finish`, of which there must be one. Tells
    the chunks how many ranks end up with the same gradients.
    """

    def __init__(self, chunks: Sequence[Chunk], mesh: RankMesh, *, overlap: bool) -> None:
        for chunk in chunks:
            experts = _expert_parameters(chunk)
            dense, expert = mesh.axis("dp").size(), mesh.axis("edp").size() if experts else 1
            chunk.replicas = {id(p): expert if id(p) in experts else dense for p in chunk.parameters()}
        self._messages = _messages_of(chunks, mesh)
        self._launched = 0
        self._begun = False
        if overlap:
            for message in self._messages:
                for parameter in message.parameters:
                    parameter.register_post_accumulate_grad_hook(self._noting(message))

    def begin(self) -> None:
        """The one backward that comes before `finish` is the step's last."""
        self._begun = True
        for message in self._messages:
            message.missing = len(message.parameters)

    def finish(self) -> None:
        """Sum what is not under way, and wait for all of it. Once a step; every rank must call it."""
        with torch.no_grad(), record_function(f"{SPAN}finish"):
            for message in self._messages[self._launched :]:
                message.launch()
            for message in self._messages:
                message.wait()
        self._launched, self._begun = 0, False

    def _noting(self, message: _Message) -> Callable[[torch.Tensor], None]:
        def gradient_is_there(_parameter: torch.Tensor) -> None:
            if self._begun:
                message.missing -= 1
                if message.missing == 0:
                    self._launch_ready()

        return gradient_is_there

    def _launch_ready(self) -> None:
        with torch.no_grad(), record_function(f"{SPAN}launch"):
            while self._launched < len(self._messages) and self._messages[self._launched].missing == 0:
                self._messages[self._launched].launch()
                self._launched += 1


def _expert_parameters(chunk: Chunk) -> set[int]:
    experts = (module for module in chunk.modules() if isinstance(module, Experts))
    return {id(parameter) for module in experts for parameter in module.parameters()}


def _messages_of(chunks: Sequence[Chunk], mesh: RankMesh) -> list[_Message]:
    """In about the order in which backwards fill them."""
    open_ones: dict[tuple[str, torch.dtype], _Message] = {}
    messages: list[_Message] = []
    experts = set[int]().union(*map(_expert_parameters, chunks))
    trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    for place, parameter in enumerate(reversed(trained)):
        axis = "edp" if id(parameter) in experts else "dp"
        if mesh.axis(axis).size() == 1:
            continue
        message = open_ones.get((axis, parameter.dtype))
        if message is None or not message.holds(parameter):
            message = open_ones[axis, parameter.dtype] = _Message(mesh.axis(axis).get_group())
            messages.append(message)
        message.put(parameter, place)
    return sorted(messages, key=lambda message: message.last)
