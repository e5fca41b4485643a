"""Seconds of data parallelism for one part of the model: weights gathered, gradients reduced, and what hides them.

Dense weights are replicated over dp·cp ranks and sharded over dp_shard·cp of them; those of experts over edp. Under
HSDP the shards' gradients are summed over the replicas after they have been reduced inside.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiles.hardware import HardwareProfile
from profiles.points import DTYPE_BYTES
from profiles.software import Software

from .comm_cost import CommModel, Group
from .compute_cost import ComputeModel
from .layout import MESSAGE_BYTES, Layout
from .part_seconds import NOTHING, Seconds


@dataclass(frozen=True, slots=True)
class DataParallel:
    """Exposed seconds of one part: per microbatch `forward` and `backward`, once a step `gather` and `reduce`."""

    forward: Seconds = NOTHING
    backward: Seconds = NOTHING
    gather: Seconds = NOTHING
    reduce: Seconds = NOTHING


class DataParallelModel:
    """Prices dp as one trainer runs it."""

    def __init__(
        self, hardware: HardwareProfile, comm: CommModel, compute: ComputeModel, precision: str, software: Software
    ) -> None:
        self._hardware, self._comm, self._compute, self._software = hardware, comm, compute, software
        self._weight_bytes = DTYPE_BYTES["bf16" if precision == "fp8" else precision]
        wide = software.on_fsdp or (software.gradients == "fp32" and precision != "fp16")
        self._gradient_bytes = 4 if wide else self._weight_bytes
        self._around = Seconds(dp=hardware.fsdp_forward_overhead_seconds if software.on_fsdp else 0.0)
        self._back = Seconds(dp=hardware.fsdp_backward_overhead_seconds if software.on_fsdp else 0.0)

    def price(
        self,
        layout: Layout,
        dense: float,
        expert: float,
        forward: float,
        backward: float,
        tensors: int = 1,
        whole: float = 0.0,
        *,
        root: bool = False,
        reshard: bool | None = None,
    ) -> DataParallel:
        """What a part of so many parameters in `tensors` adds, with so many seconds of compute to hide behind.

        FSDP2 keeps embedding and head in the root group (`root`): gathered first and reduced last, they hide behind
        nothing, and zero 3 keeps them gathered from forward to backward. torch's pipeline reduces once, after the
        last action, behind nothing; under zero 3 it gathers layers again for each backward, unless stages say
        otherwise (`reshard`, [Note: Resharding]). Where a microbatch neither gathers nor reduces, FSDP2's Python
        around the part is left; what was measured of its collectives has it in it. Where gradients are summed without
        it ([Note: Gradient sum]), the last message behind nothing, or in buckets of DDP, the rank has `whole`
        parameters in all, and 0 elsewhere; a part has its share of a message.
        """
        if whole and self._software.sums_alone:
            return self._alone(layout, dense, expert, backward, max(whole, dense + expert))
        gathered, reduced = self._collectives(layout, dense, expert, tensors, whole)
        if gathered == reduced == 0.0:
            return self._widened(dense + expert)
        torch_root, pipelined = root and self._software.on_fsdp, layout.pp > 1 and self._software.on_torch_pipeline
        exposed, zero = self._hardware.exposed_seconds, layout.zero
        hides_gather = self._software.weight_gather == "overlapped" and not torch_root
        hides_reduce = self._software.gradient_reduce == "overlapped" and not torch_root and not pipelined
        first = Seconds(dp=exposed(gathered, forward if hides_gather else 0.0))
        again = Seconds(dp=exposed(gathered, backward if self._software.weight_gather == "overlapped" else 0.0))
        last = Seconds(dp=exposed(reduced, backward if hides_reduce else 0.0))
        if whole and zero:
            copies, parameters = layout.shards, dense + expert
            first += Seconds(dp=self._copied(parameters, copies * tensors))
            last += Seconds(dp=self._copied(parameters, 2 * copies * self._messages(parameters, tensors)))
        around, back = self._around, self._back
        if zero == 0:
            return DataParallel(forward=around, backward=back, reduce=last)
        if pipelined and reshard and not torch_root:
            return DataParallel(forward=first, backward=again, reduce=last)
        if zero == 1 or (pipelined and reshard is False):
            return DataParallel(forward=around, backward=back, gather=first, reduce=last)
        if pipelined:
            backward_gather = again if zero == 3 and not torch_root else back
            return DataParallel(forward=around, backward=backward_gather, gather=first, reduce=last)
        if zero == 2:
            return DataParallel(forward=around, gather=first, backward=last)
        return DataParallel(forward=first, backward=last if torch_root else last + again)

    def summed_bytes(self, layout: Layout, parameters: float) -> float:
        """Bytes of the gradients of so many parameters when a step's are there: whole, but of shards under FSDP2."""
        return self._gradient_bytes * parameters / (layout.shards if self._software.on_fsdp else 1)

    def _alone(self, layout: Layout, dense: float, expert: float, backward: float, whole: float) -> DataParallel:
        message, reduced = min(float(MESSAGE_BYTES), 4 * whole), 0.0
        groups = ((dense, layout.dp * layout.cp, layout.tp), (expert, layout.edp, layout.ep * layout.etp))
        for parameters, ranks, stride in groups:
            if parameters and ranks > 1:
                each = self._comm.collective_seconds("all_reduce", Group(ranks, stride), message)
                reduced += each * 4 * parameters / message + self._compute.copy_seconds(parameters)
        reduced *= self._hardware.correction("dp")
        hidden = 0.0 if layout.pp > 1 else 1.0 - message / (4 * whole)
        exposed = self._hardware.exposed_seconds(reduced, backward)
        return DataParallel(reduce=Seconds(dp=hidden * exposed + (1.0 - hidden) * reduced))

    def _widened(self, parameters: float) -> DataParallel:
        """What FSDP2 does with the weights of one rank alone, where our runtime has it widen them: they are narrowed
        once a step, and their gradients widened as they are packed, and copied (torch 2.13, `foreach_reduce`)."""
        if not self._software.sums_alone or self._weight_bytes == self._gradient_bytes:
            return DataParallel()
        cast, copy = self._compute.cast_seconds(parameters), self._compute.copy_seconds(parameters)
        return DataParallel(gather=Seconds(dp=cast), reduce=Seconds(dp=cast + copy))

    def _messages(self, parameters: float, tensors: int) -> float:
        """Buckets of torch's DDP that the gradients of a part fill, of so many whole tensors.

        One is full with the tensor that reaches the limit, so it holds half a tensor more in the mean.
        """
        size = self._weight_bytes * parameters
        return min(float(tensors), size / (MESSAGE_BYTES + size / tensors / 2))

    def _copied(self, parameters: float, copies: float) -> float:
        """Seconds of moving shards of so many parameters between tensors and messages in so many copies.

        What is gathered is copied into each tensor for each rank; of a bucket each rank's share is joined and copied
        (huggingface/nanotron, src/nanotron/distributed.py: all_gather_coalesced, reduce_scatter_coalesced).
        """
        return copies * self._compute.copy_seconds(parameters / copies)

    def _collectives(
        self, layout: Layout, dense: float, expert: float, tensors: int, whole: float
    ) -> tuple[float, float]:
        """(weights gathered, gradients reduced); of shards of tensors a part has its share of the message that gathers
        the `whole` and of those that reduce a bucket."""
        number, share = 1.0, 1.0
        if whole:
            number, share = self._messages(dense + expert, tensors), min(1.0, (dense + expert) / whole)
        groups = (
            (dense, layout.dp * layout.cp, layout.shards, layout.tp),
            (expert, layout.edp, layout.expert_shards, layout.ep * layout.etp),
        )
        gathered = reduced = 0.0
        for parameters, ranks, shards, stride in groups:
            if parameters and ranks > 1:
                there, _ = self._group(layout, parameters / share, ranks, shards, stride)
                _, back = self._group(layout, parameters / number, ranks, shards, stride)
                gathered, reduced = gathered + share * there, reduced + number * back
        factor = self._hardware.correction("dp")
        return gathered * factor, reduced * factor

    def _group(self, layout: Layout, parameters: float, ranks: int, shards: int, stride: int) -> tuple[float, float]:
        """Gathering weights and reducing gradients over one set of ranks, packing included.

        As FSDP2 was measured to do it; where it was not, the collective and, for FSDP2, a copy of what is packed.
        """
        weights, gradients = self._weight_bytes * parameters, self._gradient_bytes * parameters
        copy = self._compute.copy_seconds(parameters) if self._software.on_fsdp else 0.0
        if layout.zero == 0:
            whole = Group(ranks, stride)
            reduced = self._measured("replicate_all_reduce", whole, gradients)
            if reduced is None:
                reduced = self._comm.collective_seconds("all_reduce", whole, gradients) + copy
            return 0.0, reduced
        inside = Group(shards, stride)
        gathered = self._measured("fsdp_all_gather", inside, weights)
        reduced = self._measured("fsdp_reduce_scatter", inside, gradients)
        if gathered is None:
            gathered = self._comm.collective_seconds("all_gather", inside, weights) + copy
        if reduced is None:
            reduced = self._comm.collective_seconds("reduce_scatter", inside, gradients) + copy
        if ranks > shards:
            across = Group(ranks // shards, stride * shards)
            reduced += self._comm.collective_seconds("all_reduce", across, gradients / shards)
        return gathered, reduced

    def _measured(self, operation: str, group: Group, size_bytes: float) -> float | None:
        return self._comm.fsdp_seconds(operation, group, size_bytes) if self._software.on_fsdp else None
