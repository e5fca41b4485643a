"""Seconds of compute by what bounds them: of one pass, and of a part of the model with its passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from profiles.hardware import HardwareProfile

# Operations of the host, (forward, backward), for attention to one more document of a row, where each is a call
# (runtime/document_attention.py).
DOCUMENT_OPERATIONS = (9, 16)


@dataclass(frozen=True, slots=True)
class ComputeSeconds:
    """Seconds of one pass, by what bounds it; passes add up.

    `overhead` is what no kernel explains, `idle` what the device waits for a host that issues the pass slower than it
    runs. `operations` are those that the host issues meanwhile.
    """

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    overhead: float = 0.0
    idle: float = 0.0
    operations: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory + self.overhead + self.idle

    def __add__(self, other: ComputeSeconds) -> ComputeSeconds:
        return ComputeSeconds(
            self.gemm + other.gemm,
            self.attention + other.attention,
            self.memory + other.memory,
            self.overhead + other.overhead,
            self.idle + other.idle,
            self.operations + other.operations,
        )

    def __mul__(self, factor: float) -> ComputeSeconds:
        """Times as slow: the operations stay as many."""
        return ComputeSeconds(
            self.gemm * factor,
            self.attention * factor,
            self.memory * factor,
            self.overhead * factor,
            self.idle * factor,
            self.operations,
        )

    def with_overhead(self, seconds_each: float) -> ComputeSeconds:
        """With so many seconds more for each operation."""
        return replace(self, overhead=self.overhead + self.operations * seconds_each)

    def repeated(self, number: int) -> ComputeSeconds:
        """So many times one after the other."""
        return replace(self * number, operations=self.operations * number)

    def behind_host(self, seconds_each: float) -> ComputeSeconds:
        """As long as the host takes to issue it, at least."""
        late = max(0.0, self.operations * seconds_each - self.total)
        return self if late == 0.0 else replace(self, idle=self.idle + late, operations=0.0)


NO_SECONDS = ComputeSeconds()


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """One microbatch through one part of the model on one rank.

    A backward is that of the input, then that of the weights; `selective` is what selective recomputation runs
    again, full recomputation runs the whole forward again, and takes `checkpoint` besides.
    """

    forward: ComputeSeconds = NO_SECONDS
    backward_input: ComputeSeconds = NO_SECONDS
    backward_weight: ComputeSeconds = NO_SECONDS
    selective: ComputeSeconds = NO_SECONDS
    checkpoint: ComputeSeconds = NO_SECONDS

    @property
    def backward(self) -> ComputeSeconds:
        return self.backward_input + self.backward_weight

    def __add__(self, other: ComputeCost) -> ComputeCost:
        return ComputeCost(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
            self.selective + other.selective,
            self.checkpoint + other.checkpoint,
        )

    def __mul__(self, factor: float) -> ComputeCost:
        return ComputeCost(
            self.forward * factor,
            self.backward_input * factor,
            self.backward_weight * factor,
            self.selective * factor,
            self.checkpoint * factor,
        )

    def issued(self, hardware: HardwareProfile, compiled: bool = False) -> ComputeCost:
        """With what issuing its operations takes, `compiled` or one by one.

        Where the host is the device each has its overhead, and under selective recomputation the forward's pass through
        a mode in Python. Elsewhere no pass is shorter than the host takes to issue it; the weights' gradient is issued
        with the input's.
        """
        if each := hardware.operation_overhead_seconds:
            passes = (self.forward, self.backward_input, self.backward_weight, self.selective, self.checkpoint)
            cost = ComputeCost(*(one.with_overhead(each) for one in passes))
            modes = ComputeSeconds(overhead=self.forward.operations * hardware.selective_overhead_seconds)
            return replace(cost, selective=cost.selective + modes)
        each = (compiled and hardware.compiled_operation_seconds) or hardware.host_operation_seconds
        if each == 0.0:
            return self
        late = self.backward.behind_host(each).idle
        forward, again = self.forward.behind_host(each), (self.forward + self.checkpoint).behind_host(each)
        return ComputeCost(
            forward,
            self.backward_input + ComputeSeconds(idle=late),
            self.backward_weight,
            self.selective.behind_host(each),
            ComputeSeconds(idle=again.idle - forward.idle),
        )

    def issuing(self, forward: float, backward: float) -> ComputeCost:
        """With so many operations of the host in place of those of its kernels; half of the backward's are for the
        weights, where it has some."""
        for_weights = backward / 2 if self.backward_weight.total else 0.0
        return replace(
            self,
            forward=replace(self.forward, operations=forward),
            backward_input=replace(self.backward_input, operations=backward - for_weights),
            backward_weight=replace(self.backward_weight, operations=for_weights),
            selective=replace(self.selective, operations=forward if self.selective.operations else 0.0),
        )

    def repeated(self, number: int) -> ComputeCost:
        """So many times one after the other."""
        return ComputeCost(
            self.forward.repeated(number),
            self.backward_input.repeated(number),
            self.backward_weight.repeated(number),
            self.selective.repeated(number),
            self.checkpoint.repeated(number),
        )
