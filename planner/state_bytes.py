"""Bytes of weights, gradients and optimizer on one rank, by precision and zero level, and when they are there."""

from __future__ import annotations

from profiles.model import ModelSpec
from profiles.software import Software

from .gradient_moments import STAGES_GATHERED
from .head_memory import reduces_each_microbatch
from .job import TrainingJob
from .layout import MESSAGE_BYTES, Layout
from .memory_bytes import NO_BYTES, MemoryBytes

_FP32_BYTES = 4
_ADAM_MOMENTS = 2


class StateBytes:
    """Prices the state of parameters of a layer or an end, as one trainer keeps it."""

    def __init__(self, model: ModelSpec, element_bytes: int, job: TrainingJob, software: Software) -> None:
        self._model, self._element_bytes, self._job, self._software = model, element_bytes, job, software

    def of(
        self, layout: Layout, parameters: float, *, root: bool = False, expert: bool = False, frees: bool = False
    ) -> MemoryBytes:
        """Weights, gradients and AdamW moments of `parameters` (already cut by tp or by ep and etp)."""
        shards = layout.expert_shards if expert else layout.shards
        if self._software.on_fsdp:
            return self._fsdp2_state(layout, parameters, shards, root, frees)
        return self._master_state(layout, parameters, shards)

    def _fsdp2_state(self, layout: Layout, parameters: float, shards: int, root: bool, frees: bool) -> MemoryBytes:
        """fp32 shards, as FSDP2 keeps them.

        zero 0 keeps all, and torch's `replicate`, where it is used, a second copy of the weights in the compute
        precision during the step. Shards are gathered a block at a time. Under a pipeline, torch's stage leaves
        gathered weights and unsharded gradients in place from the first backward on, whatever the level (torch 2.13,
        `PipelineStage.backward_maybe_with_nosync`); where it `frees` them `left` says what is left. Embedding and head
        (`root`) are FSDP2's root group, gathered from forward to backward. Gradients are in `summed`, but those that
        split backwards leave in the compute precision.
        """
        weights = _FP32_BYTES * parameters / shards
        optimizer = 0.0 if self._job.offload == "optimizer" else _ADAM_MOMENTS * _FP32_BYTES * parameters / shards
        wrapped = self.wraps(layout)
        stays = wrapped and (layout.zero < 3 or (layout.pp > 1 and not frees) or root)
        gathered = self._element_bytes * parameters if stays else 0.0
        if not root:  # of even chunks; which of them has the root's cannot be said
            gathered *= min(1.0, STAGES_GATHERED / layout.virtual_stages)
        gradients = 0.0
        if wrapped and self.halves_apart(layout):
            others = 1.0 - 1.0 / layout.virtual_stages
            gradients = others * self.narrow_bytes * parameters
        return MemoryBytes(weights=weights, gradients=gradients, optimizer=optimizer, gathered_weights=gathered)

    def wraps(self, layout: Layout) -> bool:
        """Whether FSDP2 keeps the weights, be it for their precision alone."""
        experts, precision = self._model.experts is not None, self._job.precision
        gives = layout.on_fsdp(precision, experts=experts) or layout.sums_alone(precision, experts=experts)
        return gives and not self.sums_alone(layout)

    def sums_alone(self, layout: Layout) -> bool:
        """Whether gradients are summed over the ranks that have the same weights without FSDP2."""
        alone = layout.sums_alone(self._job.precision, experts=self._model.experts is not None)
        return alone and self._software.sums_alone

    def gradient_bytes(self, layout: Layout, parameters: float, shards: int) -> float:
        """fp32 gradients at the end of the backward passes: sharded where each microbatch's are reduced."""
        return _FP32_BYTES * parameters / (shards if self.reduces_each_microbatch(layout) else 1)

    def reduces_each_microbatch(self, layout: Layout) -> bool:
        return reduces_each_microbatch(layout, self._job)

    def summed(self, layout: Layout, dense: float, expert: float = 0.0) -> MemoryBytes:
        """fp32 gradients of FSDP2 before they are reduced. Unsharded sums are freed group by group as they are, when
        activations are gone, so their shards do not count besides."""
        if not self._software.on_fsdp:
            return NO_BYTES  # among the state
        gradients = self.gradient_bytes(layout, dense, layout.shards)
        return MemoryBytes(gradients=gradients + self.gradient_bytes(layout, expert, layout.expert_shards))

    def reduced(self, layout: Layout, dense: float, expert: float = 0.0) -> MemoryBytes:
        """This rank's shards of them, from the last backward of a chunk on."""
        if not self._software.on_fsdp:
            return NO_BYTES
        return MemoryBytes(gradients=_FP32_BYTES * (dense / layout.shards + expert / layout.expert_shards))

    def not_yet(self, state: MemoryBytes) -> MemoryBytes:
        """Gradients among the state that no backward has left yet."""
        return MemoryBytes(gradients=-state.gradients) if self._software.on_fsdp else NO_BYTES

    def freed(self, layout: Layout, state: MemoryBytes) -> MemoryBytes:
        """The part of the state that goes when a chunk is reduced under a pipeline: gradients in the compute precision,
        and gathered weights (torch 2.13, `post_backward` of the last backward). With more chunks than are gathered at
        once others are gathered in their place."""
        if layout.pp == 1 or not self._software.on_fsdp:
            return NO_BYTES
        stays = layout.virtual_stages > STAGES_GATHERED
        return self.not_yet(state) + MemoryBytes(gathered_weights=0.0 if stays else -state.gathered_weights)

    def halves_apart(self, layout: Layout) -> bool:
        """Whether weights' halves of backwards leave gradients in the compute precision, which FSDP2 widens and adds to
        its sums at the end of the layer's next input's half. By then those of the rank's other chunks have had theirs.
        DualPipeV splits backwards at its ends only."""
        return layout.splits_backward and layout.schedule != "dualpipev"

    @property
    def narrow_bytes(self) -> int:
        """Bytes of a gradient that must be widened."""
        return self._element_bytes if self._element_bytes != _FP32_BYTES else 0

    def turned(self, layout: Layout, dense: float, expert: float, reshard: bool | None) -> MemoryBytes:
        """A layer's gradients after its chunk's first backward, and the gathered weights that this leaves."""
        stayed = self._element_bytes * (dense + expert) if self.after_forwards(layout, reshard) else 0.0
        return self.summed(layout, dense, expert) + MemoryBytes(gathered_weights=stayed)

    def of_head(self, layout: Layout, parameters: float, matrix: float) -> tuple[MemoryBytes, MemoryBytes]:
        """A head's gradients when its layers' backwards begin, and when the last of a first one does. Those of 16 bits
        are widened when all of the chunk is over; the matrix's is first with what the head holds, which without a
        pipeline says when."""
        summed, narrow = self.summed(layout, parameters), self.narrow_bytes
        if layout.pp == 1:
            return NO_BYTES, summed
        if not (self.wraps(layout) and narrow):
            return summed, summed
        beside = max(0.0, parameters - matrix)
        return MemoryBytes(gradients=narrow * beside), MemoryBytes(gradients=narrow * parameters)

    def reduction(self, layout: Layout, parameters: float, gathered: float) -> float:
        """What FSDP2's reduction of a group has besides all its gradients when they have been copied together, and the
        group's `gathered` weights are gone. Where replicas are summed they are divided in a third copy first (torch
        2.13, `foreach_reduce`). Without FSDP2 the first message of [Note: Gradient sum]."""
        reduced = _FP32_BYTES * parameters
        if self.sums_alone(layout):
            layers = max(1, self._model.layers // layout.pp)
            return min(layers * reduced, MESSAGE_BYTES)
        if not self._software.on_fsdp or not self.wraps(layout):
            return 0.0
        divided = layout.shards == 1 < layout.dp * layout.cp
        return reduced * (2 if divided else 1) - gathered

    def _master_state(self, layout: Layout, parameters: float, shards: int) -> MemoryBytes:
        """Weights in the compute precision, a master copy and moments in fp32, as Megatron-LM keeps them.

        With fp32 gradients 18 bytes a parameter in 16 bits, 6 + 12/d under the distributed optimizer over d ranks.
        Gradients kept in 16 bits: 16, and 4 + 12/d; the fp32 copy of them that the update takes is made when the
        activations are gone and freed before they return, so it is not there at the peak. All in fp32: 16, and 8 + 8/d.
        """
        compute = self._element_bytes
        cut = [1.0 / shards if layout.zero >= level else 1.0 for level in (1, 2, 3)]  # optimizer, gradients, weights
        if compute == _FP32_BYTES:
            kept, copies = _FP32_BYTES, _ADAM_MOMENTS * _FP32_BYTES
        elif self._software.gradients == "fp32" and self._job.precision != "fp16":
            kept, copies = _FP32_BYTES, (1 + _ADAM_MOMENTS) * _FP32_BYTES
        else:
            kept, copies = compute, (1 + _ADAM_MOMENTS) * _FP32_BYTES
        return MemoryBytes(
            weights=compute * parameters * cut[2],
            gradients=kept * parameters * cut[1],
            optimizer=copies * parameters * cut[0],
        )

    def schedule_like(self, layout: Layout) -> str:
        """A schedule under which a layer's state and gradients are the same."""
        if self.halves_apart(layout):
            return "zb1p"
        if layout.stages_choose:
            return "1f1b"
        return "looped-bfs" if self._bfs_frees(layout) else "interleaved-1f1b"

    def frees(self, layout: Layout, reshard: bool | None) -> bool:
        """Whether a layer's weights go after its forward, under a pipeline: where its stage has chosen so, and in
        looped BFS. Interleaved schedules count as keeping them."""
        return (layout.stages_choose and reshard is not False) or self._bfs_frees(layout)

    def _bfs_frees(self, layout: Layout) -> bool:
        return self._software.on_fsdp and layout.zero == 3 and layout.pp > 1 and layout.schedule == "looped-bfs"

    def after_forwards(self, layout: Layout, reshard: bool | None) -> bool:
        """Whether layers free their weights after forwards and leave them after backwards."""
        chosen = layout.stages_choose and reshard is None
        return self._software.on_fsdp and (chosen or self._bfs_frees(layout))

    def left(self, layout: Layout, parameters: float, activations: float, reshard: bool | None) -> float:
        """Weights that backwards leave, where gradients are there already: the layers of a stage change over from
        activations to weights one by one, and the next forward changes them back."""
        if not self.after_forwards(layout, reshard):
            return 0.0
        return max(0.0, self._element_bytes * parameters - activations)
