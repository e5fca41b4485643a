"""Seconds of compute: the kernels of a block, the embedding and the head, each from its shape."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec

from .layout import Layout


@dataclass(frozen=True)
class ComputeSeconds:
    """Seconds of one pass, by what bounds it; passes add up."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory + self.overhead

    def __add__(self, other: ComputeSeconds) -> ComputeSeconds:
        return ComputeSeconds(
            self.gemm + other.gemm,
            self.attention + other.attention,
            self.memory + other.memory,
            self.overhead + other.overhead,
        )

    def __mul__(self, factor: float) -> ComputeSeconds:
        return ComputeSeconds(self.gemm * factor, self.attention * factor, self.memory * factor, self.overhead * factor)


@dataclass(frozen=True)
class ComputeCost:
    """One microbatch through one part of the model on one rank."""

    forward: ComputeSeconds
    backward: ComputeSeconds

    def __mul__(self, factor: float) -> ComputeCost:
        return ComputeCost(self.forward * factor, self.backward * factor)


class ComputeModel:
    """Prices the parts of one model on one device at one precision."""

    def __init__(self, model: ModelSpec, hardware: HardwareProfile, precision: str) -> None:
        self._model = model
        self._hardware = hardware
        self._dtype = precision

    # ---- kernels ---------------------------------------------------------------------------------------

    def _linear(self, tokens: int, outputs: int, inputs: int) -> ComputeCost:
        """y = x·Wᵀ: one product forward, two backward (Narayanan et al., arXiv 2104.04473, appendix)."""
        seconds = self._hardware.gemm_seconds
        forward = seconds("forward", self._dtype, tokens, outputs, inputs)
        input_grad = seconds("input_grad", self._dtype, tokens, inputs, outputs)
        weight_grad = seconds("weight_grad", self._dtype, outputs, inputs, tokens)
        return ComputeCost(ComputeSeconds(gemm=forward), ComputeSeconds(gemm=input_grad + weight_grad))

    def _memory(self, operation: str, elements: float) -> ComputeCost:
        seconds = self._hardware.memory_seconds
        return ComputeCost(
            ComputeSeconds(memory=seconds(operation, self._dtype, elements, "forward")),
            ComputeSeconds(memory=seconds(operation, self._dtype, elements, "backward")),
        )

    def _attention(self, layout: Layout, sequence: int) -> ComputeCost:
        heads = self._model.heads // layout.tp
        shape = (self._dtype, layout.micro_batch, heads, sequence, self._model.head_dim)
        seconds = self._hardware.attention_seconds
        return ComputeCost(
            ComputeSeconds(attention=seconds("forward", *shape)), ComputeSeconds(attention=seconds("backward", *shape))
        )

    # ---- parts of the model ----------------------------------------------------------------------------

    def block(self, layout: Layout, sequence: int) -> ComputeCost:
        """Norm, attention, norm, MLP and two residual sums of one block, weights cut by tp."""
        model, tokens = self._model, layout.micro_batch * sequence
        kv_width = local_kv_width(model, layout.tp)
        # Between the sharded pairs each rank holds the whole sequence, or its share with sequence parallelism.
        outside = tokens / layout.tp if layout.sequence_parallel else tokens
        hidden, query = outside * model.hidden_size, tokens * model.query_width / layout.tp
        parts = [self._linear(tokens, *local_linear_shape(model, name, layout.tp)) for name in model.linear_shapes]
        parts += [self._memory(model.norm, hidden), self._memory(model.norm, hidden)]
        if model.positions == "rope":
            parts.append(self._memory("rope", query))
            parts.append(self._memory("rope", tokens * kv_width))
        parts.append(self._attention(layout, sequence))
        parts.append(self._memory("copy", query))
        parts.append(self._memory(model.activation, tokens * model.ffn_hidden_size / layout.tp))
        parts += [self._memory("residual", hidden), self._memory("residual", hidden)]
        # wq, wk and wv have one input, w1 and w3 another: autograd adds up what each leaves of its gradient.
        sharing = ({"wq", "wk", "wv"}, {"w1", "w3"})
        sums = sum(max(0, len(names & set(model.linear_shapes)) - 1) for names in sharing)
        added = self._hardware.memory_seconds("residual", self._dtype, tokens * model.hidden_size)
        parts.append(ComputeCost(ComputeSeconds(), ComputeSeconds(memory=sums * added)))
        if layout.tp > 1:
            hardware = self._hardware
            cut = (
                hardware.sequence_shard_overhead_seconds
                if layout.sequence_parallel
                else hardware.shard_overhead_seconds
            )
            shard = ComputeSeconds(overhead=cut)
            parts.append(ComputeCost(shard, shard))
        return _total(parts)

    def embedding(self, layout: Layout, sequence: int) -> ComputeCost:
        model, tokens = self._model, layout.micro_batch * sequence
        parts = [self._memory("embedding", tokens * model.hidden_size)]
        if model.positions == "learned":
            parts.append(self._memory("residual", tokens * model.hidden_size))
        return _total(parts)

    def head(self, layout: Layout, sequence: int) -> ComputeCost:
        """Last norm, output matrix cut over the vocabulary, cross-entropy in fp32."""
        model, tokens = self._model, layout.micro_batch * sequence
        outside = tokens / layout.tp if layout.sequence_parallel else tokens
        rows = -(-model.vocab_size // layout.tp)
        return _total(
            [
                self._memory(model.norm, outside * model.hidden_size),
                self._linear(tokens, rows, model.hidden_size),
                self._memory("cross_entropy", tokens * rows),
            ]
        )

    def microbatch(self) -> ComputeCost:
        """What a microbatch costs a rank besides the kernels: starting a forward and a backward."""
        overhead = ComputeSeconds(overhead=self._hardware.microbatch_overhead_seconds)
        return ComputeCost(overhead, overhead)

    # ---- state -----------------------------------------------------------------------------------------

    def accumulate_seconds(self, parameters: float) -> float:
        """Adding one microbatch's gradient to the sum, in fp32."""
        return self._hardware.memory_seconds("accumulate", self._state_dtype, parameters)

    def optimizer_seconds(self, parameters: float, tensors: int) -> float:
        """Norm, clipping and AdamW over the parameters whose state this rank holds, in `tensors` tensors."""
        norm = self._hardware.memory_seconds("gradient_norm", self._state_dtype, parameters)
        update = self._hardware.memory_seconds("adamw", self._state_dtype, parameters)
        return norm + update + tensors * self._hardware.parameter_overhead_seconds

    def copy_seconds(self, parameters: float) -> float:
        """Reading and writing each parameter once: FSDP2 packs and unpacks its flat buffers so."""
        return self._hardware.memory_seconds("copy", self._state_dtype, parameters)

    @property
    def _state_dtype(self) -> str:
        """fp32 where it was measured or modelled; else the compute dtype's points are the nearest fact."""
        return "fp32" if self._hardware.knows_memory("fp32") else self._dtype


def local_kv_width(model: ModelSpec, tp: int) -> int:
    """Key (or value) elements per token that a rank uses: its share, one head at least."""
    return max(model.kv_width // tp, model.head_dim)


def local_linear_shape(model: ModelSpec, name: str, tp: int) -> tuple[int, int]:
    """(outputs, inputs) of a block's linear on one tp rank: colwise but for wo and w2, which are rowwise.

    With fewer key-value heads than tp every rank holds wk and wv whole.
    """
    outputs, inputs = model.linear_shapes[name]
    if name in ("wo", "w2"):
        return outputs, inputs // tp
    if name in ("wk", "wv") and model.kv_heads % tp:
        return outputs, inputs
    return outputs // tp, inputs


def _total(parts: list[ComputeCost]) -> ComputeCost:
    forward = sum((part.forward for part in parts), ComputeSeconds())
    backward = sum((part.backward for part in parts), ComputeSeconds())
    return ComputeCost(forward, backward)
