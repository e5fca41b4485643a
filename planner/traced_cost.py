"""Seconds and bytes of a traced module: its own products, attention and kernels, in place of what ModelSpec implies.

All of a part's work is proportional to the samples of a microbatch. What tp cuts are the products that the module's
tp_plan names, the heads, and of the bytes those that go out of a column-wise product or into a row-wise one.
"""

from __future__ import annotations

from dataclasses import replace

from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import DTYPE_BYTES, HOST_OPERATIONS
from profiles.software import Software
from profiles.traced_model import AttentionWork, Product, TracedModel, TracedPart

from .activation_bytes import ActivationModel, KeptBytes
from .axis_cost import AxisModel, Passes
from .comm_cost import CommModel
from .compute_cost import ComputeModel
from .compute_seconds import ComputeCost, ComputeSeconds
from .head_memory import HeadMemory
from .job import TrainingJob
from .layout import Layout
from .memory_bytes import MemoryBytes, PartMemory
from .memory_cost import MemoryModel

# Bytes that the backward of pointwise operations moves over those of their forward: two gradients for a product's one
# output, one for most others, and sums where branches meet.
_BACKWARD_BYTES = 2.0
_WHOLE_OVER_CAUSAL = 2.0  # scores of a query with every key, over those with the keys up to its own


def local_product(model: TracedModel, product: Product, tp: int) -> tuple[int, int]:
    """(outputs, inputs) of a block's product on one tp rank."""
    style = model.style_of(product)
    outputs = product.outputs // tp if style == "colwise" else product.outputs
    return outputs, product.inputs // tp if style == "rowwise" else product.inputs


def whole_share(model: TracedModel, precision: str, tp: int) -> float:
    """Of the bytes that a block keeps or moves, what one tp rank has of them."""
    if tp == 1:
        return 1.0
    element = DTYPE_BYTES["fp32" if precision == "fp32" else "bf16"]
    cut = {"colwise": lambda p: p.outputs, "rowwise": lambda p: p.inputs}
    inside = sum(p.rows * cut[style](p) for p in model.block.products if (style := model.style_of(p)) in cut)
    share = min(1.0, element * inside / max(1, model.block.kept_bytes.of(precision)))
    return 1.0 - share * (1.0 - 1.0 / tp)


class TracedCompute(ComputeModel):
    """Prices the parts of a traced module."""

    def __init__(self, model: TracedModel, hardware: HardwareProfile, job: TrainingJob, software: Software) -> None:
        super().__init__(model, hardware, job, software)
        self._traced = model

    def block(self, layout: Layout, kind: str = "dense") -> ComputeCost:
        cost = self._part(self._traced.block, layout, layout.tp)
        if layout.tp > 1:
            products = self._traced.block.products
            moved = [layout.micro_batch * p.rows * (p.inputs + p.outputs / layout.tp) for p in products]
            touched = DTYPE_BYTES[self._dtype] * sum(moved) / max(1, len(moved))
            cut = ComputeSeconds(overhead=self._hardware.shard_seconds(False, touched))
            cost = cost + ComputeCost(cut, cut)
        return cost.issued(self._hardware)

    def embedding(self, layout: Layout) -> ComputeCost:
        return self._part(self._traced.before, layout)

    def head(self, layout: Layout) -> ComputeCost:
        return self._part(self._traced.after, layout)

    def _part(self, part: TracedPart, layout: Layout, tp: int = 1) -> ComputeCost:
        samples, share = layout.micro_batch, whole_share(self._traced, self._job.precision, tp)
        costs = [self._product(product, samples, tp) for product in part.products]
        costs += [self._traced_attention(work, samples, tp) for work in part.attention]
        costs += [self._memory(kernel.operation, share * samples * kernel.elements) for kernel in part.kernels]
        if moved := samples * share * part.moved_bytes.of(self._job.precision):
            passes = moved / (2 * DTYPE_BYTES[self._dtype])  # a copy reads and writes each element once
            forward, backward = self._memory("copy", passes), self._memory("copy", _BACKWARD_BYTES * passes)
            costs.append(ComputeCost(forward.forward, backward.backward))
        return sum(costs, ComputeCost())

    def _product(self, product: Product, samples: int, tp: int) -> ComputeCost:
        if not product.weight:
            seconds = self._hardware.batched_gemm_seconds(
                self._dtype, samples * product.matrices // tp or 1, product.rows, product.outputs, product.inputs
            )
            there, back = HOST_OPERATIONS["linear"]
            backward = ComputeSeconds(gemm=2 * seconds, operations=back)
            return ComputeCost(ComputeSeconds(gemm=seconds, operations=there), backward)
        outputs, inputs = local_product(self._traced, product, tp)
        cost = self._linear(samples * product.rows, outputs, inputs, product.matrices)
        if product.bias:
            elements = float(samples * product.rows * outputs)
            gradient = self._hardware.memory_seconds("bias_gradient", self._dtype, elements, "backward")
            cost = cost + ComputeCost(backward_weight=ComputeSeconds(memory=gradient))
        return cost

    def _traced_attention(self, work: AttentionWork, samples: int, tp: int) -> ComputeCost:
        length = round((work.queries * work.keys) ** 0.5)
        dim, seconds = (work.head_dim + work.value_dim) / 2, self._hardware.attention_seconds
        share = 1.0 if work.causal else _WHOLE_OVER_CAUSAL
        heads = work.heads // tp if self._traced.tp_heads else work.heads
        shape = (self._dtype, samples, heads, length, dim, self._software.attention)
        there, back = HOST_OPERATIONS["flash"]
        return ComputeCost(
            ComputeSeconds(attention=share * seconds("forward", *shape), operations=there),
            ComputeSeconds(attention=share * seconds("backward", *shape), operations=back),
        )


class TracedAxes(AxisModel):
    """Prices what tp sends around the linears that it cuts; the ends of such a module are whole on every tp rank."""

    def block_tp(self, layout: Layout, compute: ComputeCost, kind: str) -> Passes:
        """A sum after each row-wise linear, in the backward one for each column-wise linear's input."""
        model = self._model
        assert isinstance(model, TracedModel)
        if layout.tp == 1:
            return Passes()
        styles = [style for _, style in model.tp_plan]
        rows, columns = styles.count("rowwise"), styles.count("colwise")
        reduce, wait = self._tp("all_reduce", layout, self._whole_bytes(layout)), self._hardware.wait_seconds
        there, back = (wait(seconds.total / max(1, rows)) for seconds in (compute.forward, compute.backward))
        again = max(0, rows - 1) * (reduce + there)  # recomputation ends before the last sum (AxisModel.block_tp)
        return Passes(rows * (reduce + there), columns * reduce + rows * back, 0.0, again)

    def embedding_tp(self, layout: Layout) -> Passes:
        return Passes()

    def head_tp(self, layout: Layout) -> Passes:
        return Passes()


class TracedActivations(ActivationModel):
    """Bytes that a block of a traced module keeps for its backward."""

    def layer(self, layout: Layout, kind: str) -> KeptBytes:
        model, precision = self._model, self._job.precision
        assert isinstance(model, TracedModel)
        samples, share = layout.micro_batch, whole_share(model, precision, layout.tp)
        kept = samples * share * model.block.kept_bytes.of(precision)
        passing = samples * share * model.block.passing_bytes.of(precision)
        stream = self.element_bytes * samples * model.tokens * model.hidden_size
        return KeptBytes(none=kept, selective=kept, full=stream, weight=kept, heads=0.0, transient=passing)


class TracedHead(HeadMemory):
    """Bytes of what is after the blocks ([Note: When the head's bytes are there] in head_memory.py)."""

    def bytes_of(self, layout: Layout) -> tuple[MemoryBytes, MemoryBytes, float]:
        model, precision = self._model, self._job.precision
        assert isinstance(model, TracedModel)
        kept = layout.micro_batch * model.after.kept_bytes.of(precision)
        share = self._held_share(layout)
        held = MemoryBytes(logits=share * kept)
        passing = layout.micro_batch * model.after.passing_bytes.of(precision)
        return held, held, (1.0 - share) * kept + passing


class TracedMemory(MemoryModel):
    """Prices the bytes of a traced module."""

    def __init__(self, model: TracedModel, hardware: HardwareProfile, job: TrainingJob, software: Software) -> None:
        super().__init__(model, hardware, job, software)
        self._traced = model
        self._activations = TracedActivations(model, job, software, composite_norm=False)
        self._head = TracedHead(model, job, software, self._activations)

    def embedding(self, layout: Layout) -> PartMemory:
        """State, and what the forward up to the first block leaves: the stream, and what blocks take beside it."""
        plain = super().embedding(layout)
        held = MemoryBytes(activations=layout.micro_batch * self._traced.before.kept_bytes.of(self._job.precision))
        return replace(plain, held=held, held_selective=held, held_recomputed=held, held_weight=held)

    def block_parameters(self, layout: Layout, kind: str = "dense") -> tuple[float, float]:
        model = self._traced
        total = float(model.block.parameters)
        for product in model.block.products:
            outputs, inputs = local_product(model, product, layout.tp)
            total -= product.outputs * product.inputs - outputs * inputs
            total -= product.outputs - outputs if product.bias else 0
        return total, 0.0

    def embedding_parameters(self, layout: Layout) -> float:
        return self._traced.before.parameters

    def head_parameters(self, layout: Layout) -> float:
        """Of a parameter that both ends use the last stage of a pipeline holds a copy."""
        copy = self._traced.before.largest_parameter if self._traced.tied_embeddings and layout.pp > 1 else 0
        return self._traced.after.parameters + copy

    def _head_matrix(self, layout: Layout) -> int:
        return self._traced.before.largest_parameter


def compute_model(model: ModelSpec, hardware: HardwareProfile, job: TrainingJob, software: Software) -> ComputeModel:
    """What prices compute of a traced module, or of any other model."""
    if isinstance(model, TracedModel):
        return TracedCompute(model, hardware, job, software)
    return ComputeModel(model, hardware, job, software)


def traced_parts(
    model: TracedModel, hardware: HardwareProfile, comm: CommModel, job: TrainingJob, software: Software
) -> tuple[TracedAxes, TracedMemory]:
    """What prices axes and bytes of a traced module."""
    return (
        TracedAxes(model, hardware, comm, job, software),
        TracedMemory(model, hardware, job, software),
    )
