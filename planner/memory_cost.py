"""Bytes on one rank: state by precision and zero level, activations by recompute mode, buffers, reserve.

[Note: In-flight activations]
A stage holds the activations of every microbatch whose forward is done and whose backward is not. How many
that is comes from the schedule's action list alone, so activation bytes are in-flight count × bytes of one
microbatch, and only the latter depends on the layers of the stage.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import DTYPE_BYTES

from .compute_cost import local_kv_width, local_linear_shape
from .layout import Layout

_FP32_BYTES = 4
_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of one rank, by what they are for; they add up and scale."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered_weights: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    transient: float = 0.0
    pipeline_buffers: float = 0.0
    communicators: float = 0.0
    context: float = 0.0
    allocator_slack: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def items(self) -> dict[str, float]:
        return dict(vars(self))

    def __add__(self, other: MemoryBytes) -> MemoryBytes:
        return MemoryBytes(*map(operator.add, vars(self).values(), vars(other).values()))

    def with_slack(self, share: float) -> MemoryBytes:
        """Add what the allocator loses: a share of the tensor bytes."""
        tensors = self.total - self.context - self.communicators
        return self + MemoryBytes(allocator_slack=share * tensors)

    def __mul__(self, factor: float) -> MemoryBytes:
        return MemoryBytes(*(value * factor for value in vars(self).values()))


@dataclass(frozen=True)
class PartMemory:
    """What one part of the model (a block, the embedding, the head) adds to its rank.

    `held` per in-flight microbatch without recomputation, `held_recomputed` with it; `transient` is the
    most that its backward needs at once beyond what is held, and with recomputation the activations that
    come back for one block at a time.
    """

    state: MemoryBytes
    held: MemoryBytes
    held_recomputed: MemoryBytes
    transient: float
    transient_recomputed: float


class MemoryModel:
    """Prices the bytes of one model under one precision on one kind of device."""

    def __init__(self, model: ModelSpec, hardware: HardwareProfile, precision: str) -> None:
        self._model = model
        self._hardware = hardware
        self._precision = precision
        self._element_bytes = DTYPE_BYTES[precision]

    # ---- state -----------------------------------------------------------------------------------------

    def _state(self, layout: Layout, parameters: float, *, root: bool = False) -> MemoryBytes:
        """Weights, gradients and AdamW moments of `parameters` (already cut by tp), in fp32 as FSDP2 keeps them.

        zero 0 keeps all, and torch's `replicate` a second copy of the weights in the compute precision during
        the step; 1 and 2 shard weights and moments over dp and gather the weights for the whole step
        in the compute precision; 1 holds unsharded gradients until the last microbatch, 2 shards them after
        each; 3 gathers a block at a time. Under a pipeline, torch's stage leaves gathered weights and
        unsharded gradients in place from the first backward on, whatever the level (torch 2.13,
        `PipelineStage.backward_maybe_with_nosync`). Embedding and head (`root`) are FSDP2's root group, gathered
        from forward to backward and reduced last.
        """
        shards = layout.dp_shard
        weights = _FP32_BYTES * parameters / shards
        optimizer = _ADAM_MOMENTS * _FP32_BYTES * parameters / shards
        wrapped = layout.dp > 1 or self._precision != "fp32"
        gathered = gradients = 0.0
        if not wrapped:
            gradients = _FP32_BYTES * parameters
        elif layout.zero == 0:
            gradients = _FP32_BYTES * parameters
            gathered = self._element_bytes * parameters
        else:
            stays = layout.zero < 3 or layout.pp > 1 or root
            unsharded = layout.zero == 1 or layout.pp > 1 or root
            gathered = self._element_bytes * parameters if stays else 0.0
            # Unsharded sums and the shard that the reduction leaves exist together at the end.
            gradients = _FP32_BYTES * parameters / shards + (_FP32_BYTES * parameters if unsharded else 0.0)
        return MemoryBytes(weights=weights, gradients=gradients, optimizer=optimizer, gathered_weights=gathered)

    # ---- activations -----------------------------------------------------------------------------------

    def _norm_elements(self, outside: float, inside: float) -> float:
        """Saved by a norm: its input, and the output that the next product needs for its weight gradient.

        torch's CPU rms_norm is made of several operations and keeps the normalised input besides.
        """
        composite = self._model.norm == "rmsnorm" and self._hardware.backend == "gloo"
        return self._model.hidden_size * (outside * (2 if composite else 1) + inside)

    def _block_elements(self, layout: Layout, sequence: int) -> float:
        """Elements that autograd keeps for one block and microbatch (after arXiv 2205.05198, section 4).

        Norm inputs and outputs twice; queries, keys, values and the attention output; gate, up, activated
        and product of SwiGLU, or the two of GELU.
        """
        model, tokens = self._model, layout.micro_batch * sequence
        outside = tokens / layout.tp if layout.sequence_parallel else tokens
        norms = 2 * self._norm_elements(outside, tokens)
        attention = tokens * (2 * model.query_width / layout.tp + 2 * local_kv_width(model, layout.tp))
        ffn = tokens * model.ffn_hidden_size / layout.tp * (4 if model.activation == "swiglu" else 2)
        return norms + attention + ffn

    def block(self, layout: Layout, sequence: int) -> PartMemory:
        model, tokens = self._model, layout.micro_batch * sequence
        outside = tokens / layout.tp if layout.sequence_parallel else tokens
        elements = self._block_elements(layout, sequence)
        # Backward of the MLP: the gradients of product, gate and up at once.
        transient = tokens * model.ffn_hidden_size / layout.tp * (3 if model.activation == "swiglu" else 2)
        parameters = self.block_parameters(layout)
        in_use = 2 * self._element_bytes * parameters if layout.zero == 3 and layout.pp == 1 else 0.0
        return PartMemory(
            state=self._state(layout, parameters),
            held=MemoryBytes(activations=self._element_bytes * elements),
            held_recomputed=MemoryBytes(activations=self._element_bytes * outside * model.hidden_size),
            transient=self._element_bytes * transient + in_use,
            transient_recomputed=self._element_bytes * (transient + elements) + in_use,
        )

    def embedding(self, layout: Layout, sequence: int) -> PartMemory:
        state = self._state(layout, self.embedding_parameters(layout), root=True)
        nothing = MemoryBytes()
        return PartMemory(state, nothing, nothing, 0.0, 0.0)

    def head(self, layout: Layout, sequence: int) -> PartMemory:
        """Last norm, and the logits: as computed, and as log-probabilities in fp32; their gradients on the way back."""
        model, tokens = self._model, layout.micro_batch * sequence
        outside = tokens / layout.tp if layout.sequence_parallel else tokens
        rows = -(-model.vocab_size // layout.tp)
        logits = self._element_bytes * tokens * rows
        log_probabilities = _FP32_BYTES * tokens * rows
        norm = self._element_bytes * self._norm_elements(outside, tokens)
        held = MemoryBytes(activations=norm, logits=logits + log_probabilities)
        gradients = log_probabilities + (logits if self._precision != "fp32" else 0.0)
        state = self._state(layout, self.head_parameters(layout), root=True)
        return PartMemory(state, held, held, gradients, gradients)

    # ---- the rest --------------------------------------------------------------------------------------

    def boundary_bytes(self, layout: Layout, sequence: int) -> float:
        """One microbatch's activations between stages: the rank's share of the sequence, whole hidden width."""
        tokens = layout.micro_batch * sequence / (layout.tp if layout.sequence_parallel else 1)
        return self._element_bytes * tokens * self._model.hidden_size

    def fixed(self, layout: Layout, sequence: int, stage: int, microbatches: int) -> MemoryBytes:
        """What a stage holds whatever its layers: context, communicators, torch's receive buffers.

        torch's pipeline allocates a receive buffer for every microbatch at once: activations on every stage
        but the first, gradients on every stage but the last (torch 2.13, `_setup_forward_recv_info`).
        """
        boundary = self.boundary_bytes(layout, sequence) if layout.pp > 1 else 0.0
        directions = (stage > 0) + (stage < layout.pp - 1)
        groups = sum(axis > 1 for axis in (layout.tp, layout.pp, layout.dp))
        return MemoryBytes(
            pipeline_buffers=boundary * microbatches * directions,
            communicators=groups * self._hardware.communicator_bytes,
            context=self._hardware.context_bytes,
        )

    # ---- parameters of one tp rank ---------------------------------------------------------------------

    def block_parameters(self, layout: Layout) -> float:
        total = 2.0 * self._model.norm_parameters
        for name in self._model.linear_shapes:
            outputs, inputs = local_linear_shape(self._model, name, layout.tp)
            total += outputs * inputs + (outputs if self._model.has_bias(name) else 0)
        return total

    def embedding_parameters(self, layout: Layout) -> float:
        model = self._model
        learned = model.max_positions * model.hidden_size if model.positions == "learned" else 0
        return -(-model.vocab_size // layout.tp) * model.hidden_size + learned

    def head_parameters(self, layout: Layout) -> float:
        """A tied matrix lies in the embedding, but the last stage of a pipeline holds a copy of it."""
        matrix = -(-self._model.vocab_size // layout.tp) * self._model.hidden_size
        if self._model.tied_embeddings and layout.pp == 1:
            matrix = 0
        return matrix + self._model.norm_parameters
