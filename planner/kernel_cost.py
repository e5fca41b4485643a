"""Seconds of single kernels: a linear, a bias, whatever is bound by memory, each from its shape.

Which of them a trainer launches, and in which form (fused or eager norms, activations and residuals), are facts of the
software (`FACTS` in profiles/software.py); how long each takes, of the hardware.
"""

from __future__ import annotations

from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import DIRECTIONS, ELEMENTWISE, HOST_OPERATIONS, SCALAR_SLOWDOWN
from profiles.software import Software

from .compute_seconds import NO_SECONDS, ComputeCost, ComputeSeconds
from .job import TrainingJob


class Kernels:
    """Prices the kernels of one model as one trainer runs them on one device."""

    def __init__(self, model: ModelSpec, hardware: HardwareProfile, job: TrainingJob, software: Software) -> None:
        self._model = model
        self._hardware = hardware
        self._job = job
        self._software = software
        self._gemm_dtype = job.precision
        self._dtype = "bf16" if job.precision == "fp8" else job.precision
        self._keeps_matmuls = software.selective_keeps_matmuls
        master = not software.on_fsdp and job.precision in ("bf16", "fp16", "fp8")
        self._master_casts = (1 + (software.gradients == "compute")) if master else 0

    def _linear(
        self, tokens: float, outputs: int, inputs: int, count: int = 1, dtype: str = "", again: bool = False
    ) -> ComputeCost:
        """y = x·Wᵀ: one product forward, two backward (Narayanan et al., arXiv 2104.04473, appendix).

        `count` products of `tokens` each run as one where they are those of experts. In fp8 inputs and output
        gradients are cast first. `again`: selective recomputation runs it a second time.
        """
        rows = max(1, round(tokens))
        seconds, dtype = self._hardware.gemm_seconds, dtype or self._gemm_dtype
        there, back = HOST_OPERATIONS["linear"]
        cost = ComputeCost(
            ComputeSeconds(gemm=seconds("forward", dtype, rows, outputs, inputs, count), operations=there),
            ComputeSeconds(gemm=seconds("input_grad", dtype, rows, inputs, outputs, count), operations=back / 2),
            ComputeSeconds(gemm=seconds("weight_grad", dtype, outputs, inputs, rows, count), operations=back / 2),
        )
        if again:
            cost = ComputeCost(cost.forward, cost.backward_input, cost.backward_weight, cost.forward)
        if dtype == "fp8":
            cast, operation = self._hardware.memory_seconds, f"cast_{self._software.fp8_scaling}"
            there = ComputeSeconds(memory=cast(operation, self._dtype, count * rows * inputs))
            back = ComputeSeconds(memory=cast(operation, self._dtype, count * rows * outputs, "backward"))
            cost = cost + ComputeCost(there, back, NO_SECONDS, there if self._keeps_matmuls else NO_SECONDS)
        return cost

    def _biased(self, name: str, tokens: float, shape: tuple[int, int]) -> ComputeCost:
        """A linear by its name: the gradient of a bias is a sum over the tokens besides."""
        cost = self._linear(tokens, *shape, again=name in self._again)
        if self._model.has_bias(name):
            outputs = tokens * shape[0]
            cost = cost + self._bias_gradient(outputs)
            alone = self._software.linear_bias
            if alone == "separate" or (alone == "following" and name == "wq"):
                cost = cost + ComputeCost(self._memory("bias", outputs).forward)
        return cost

    def _bias_gradient(self, elements: float) -> ComputeCost:
        seconds = self._hardware.memory_seconds("bias_gradient", self._dtype, elements, "backward")
        return ComputeCost(backward_weight=ComputeSeconds(memory=seconds))

    @property
    def _again(self) -> tuple[str, ...]:
        """Linears of a layer that selective recomputation runs again: every second one in their order.

        Of fp8, where the policy does not know the products, all. Recomputation stops before the last one's output,
        which no backward needs.
        """
        if self._software.selective != "keep_half_matmuls":
            return ()
        names = tuple(self._model.linear_shapes)
        return names[:-1] if self._gemm_dtype == "fp8" else names[1:-1:2]

    def _memory(self, operation: str, elements: float) -> ComputeCost:
        (there, back), slow = HOST_OPERATIONS["memory"], 1.0
        if self._software.elementwise == "scalar" and operation in ELEMENTWISE and self._dtype != "fp32":
            slow = SCALAR_SLOWDOWN
        forward, backward = (
            slow * self._hardware.memory_seconds(operation, self._dtype, elements, way) for way in DIRECTIONS
        )
        forward = ComputeSeconds(memory=forward, operations=there)
        backward = ComputeSeconds(memory=backward, operations=back)
        return ComputeCost(forward, backward, NO_SECONDS, forward if self._keeps_matmuls else NO_SECONDS)

    def _once(self, operation: str, elements: float) -> ComputeSeconds:
        return self._memory(operation, elements).forward

    def _norm(self, elements: float) -> ComputeCost:
        return self._memory("norm_eager" if self._software.norm == "eager" else self._model.norm, elements)

    def _residual(self, elements: float) -> ComputeCost:
        """The sum into the residual stream, with the dropout before it where there is one."""
        if not self._software.dropout:
            return self._memory("residual", elements)
        if self._software.residual == "fused":
            return self._memory("dropout_add", elements)
        return self._memory("dropout", elements) + self._memory("residual", elements)

    def _activation(self, elements: float) -> ComputeCost:
        """Where gate and input come of one matrix, kernels of torch's leave two gradients, which a copy joins."""
        if self._model.ffn_matrices != 3:
            return self._memory(self._model.activation, elements)
        if self._software.activation == "fused":
            return self._memory("swiglu_fused", elements)
        cost = self._memory(self._model.activation, elements)
        if self._software.separate_projections:
            return cost
        return cost + ComputeCost(backward_input=self._memory("copy", 2 * elements).backward_input)

    def _rope(self, elements: float) -> ComputeCost:
        return self._memory("rope_fused" if self._software.rotation == "fused" else "rope", elements)

    def _meeting_gradients(self, names: set[str], elements: float) -> ComputeCost:
        """Linears of one input (wq, wk and wv; w1 and w3): autograd adds up what each leaves of its gradient.

        Trainers that join such weights into one have nothing to add.
        """
        if not self._software.separate_projections:
            return ComputeCost()
        return self._added(max(0, len(names & set(self._model.linear_shapes)) - 1), elements)

    def _added(self, sums: int, elements: float) -> ComputeCost:
        """So many sums of gradients of an activation."""
        each = self._hardware.memory_seconds("residual", self._dtype, elements)
        return ComputeCost(backward_input=ComputeSeconds(memory=sums * each))
