"""Seconds of messages between stages: on each hop, and what they take from the compute of an action."""

from __future__ import annotations

import operator
from itertools import pairwise

from profiles.hardware import HardwareProfile
from profiles.points import HOST_OPERATIONS
from profiles.software import Software

from .comm_cost import CommModel, Group
from .layout import Layout
from .memory_cost import MemoryModel
from .schedule import V_SHAPED


class MessageModel:
    """Prices what the stages of one model send to each other as one trainer does it."""

    def __init__(self, hardware: HardwareProfile, comm: CommModel, memory: MemoryModel, software: Software) -> None:
        self._hardware, self._comm, self._memory, self._software = hardware, comm, memory, software

    def hops(self, layout: Layout) -> tuple[float, ...]:
        """One message of each stage to the next; cut over tp and gathered again where the trainer does so."""
        if layout.pp == 1:
            return (0.0,) * (layout.stages - 1)
        group, size = Group(layout.pp, layout.tp * layout.cp * layout.dp), self._memory.boundary_bytes(layout)
        if self._software.scatter_gather and layout.tp > 1 and not layout.sequence_parallel:
            gathered = self._comm.collective_seconds("all_gather", Group(layout.tp, 1), size)
            of_ranks = tuple(sent + gathered for sent in self._comm.hop_seconds(group, size / layout.tp))
        else:
            of_ranks = self._comm.hop_seconds(group, size)
            if self._software.p2p == "described":
                of_ranks = tuple(map(operator.add, of_ranks, _described_seconds(self._hardware, self._comm, group)))
        if layout.schedule in V_SHAPED:
            return (*of_ranks[:-1], 0.0, *of_ranks[-2::-1])[: layout.stages - 1]
        return (of_ranks * layout.virtual_stages)[:-1]

    def work(self, layout: Layout) -> float:
        """What messages take from the compute of an action, a mean over the stages: of S at most S - 1 send."""
        each, each_byte = self._hardware.message_overhead_seconds, self._hardware.message_overhead_seconds_per_byte
        if each == each_byte == 0.0:
            return 0.0
        ranks = [layout.pipeline(1).rank_of(stage) for stage in range(layout.stages)]
        crossed = sum(one != other for one, other in pairwise(ranks))
        return (each + each_byte * self._memory.boundary_bytes(layout)) * crossed / layout.stages


def _described_seconds(hardware: HardwareProfile, comm: CommModel, group: Group) -> tuple[float, ...]:
    """What a message of each hop takes besides its bytes where two messages before it say what it is.

    The host of either stage reads and writes them number by number, with nothing of the device to hide behind; a mean
    over the forward, which sends a mask besides, and the backward.
    """
    tensors, described_bytes = 1.5, 7 * 8.0  # a message; seven numbers of 8 bytes in the first, six in the second
    operations = sum(HOST_OPERATIONS["described"]) / 2
    host = operations * hardware.host_operation_seconds
    return tuple(host + tensors * 2 * sent for sent in comm.hop_seconds(group, described_bytes))
