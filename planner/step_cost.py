"""LayoutCosts: every second and byte of one layout as numbers per block, from which any assignment is priced.

[Note: Linear in the assignment]
For a fixed layout each duration on a stage (forward, backward, gather, reduce, optimizer) and each byte is a
sum over the layers it holds, so it is linear in how many blocks of each recompute mode it has. What is not
linear, such as how much of a collective hides behind compute, is settled per block beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import DTYPE_BYTES

from .comm_cost import CommModel, Group
from .compute_cost import ComputeCost, ComputeModel
from .job import TrainingJob
from .layout import Layout
from .memory_cost import MemoryBytes, MemoryModel, PartMemory
from .part_seconds import PartSeconds, Seconds
from .schedule import Pipeline, in_flight
from .simulation import Simulation, StageSeconds, simulate


@dataclass(frozen=True)
class StageCount:
    """Blocks of one stage by recompute mode."""

    none: int
    full: int

    @property
    def blocks(self) -> int:
        return self.none + self.full


@dataclass(frozen=True)
class LayoutCosts:
    """One layout, priced. `microbatch` is what a microbatch costs any stage besides its layers."""

    layout: Layout
    microbatches: int
    layers: int
    block: PartSeconds
    embedding: PartSeconds
    head: PartSeconds
    microbatch: PartSeconds
    send_seconds: float
    step_seconds: float
    block_memory: PartMemory
    embedding_memory: PartMemory
    head_memory: PartMemory
    fixed_memory: tuple[MemoryBytes, ...]
    in_flight: tuple[int, ...]
    allocator_slack: float

    # ---- one stage -------------------------------------------------------------------------------------

    def stage_seconds(self, stage: int, count: StageCount) -> PartSeconds:
        """All phases of a stage; `recompute` is apart from `backward`."""
        total = self.block * count.blocks + self.ends_seconds(stage)
        return replace(total, recompute=self.block.recompute * count.full)

    def ends_seconds(self, stage: int) -> PartSeconds:
        """What the stage costs before it holds any block."""
        total = self.microbatch
        if stage == 0:
            total = total + self.embedding
        if stage == self.layout.pp - 1:
            total = total + self.head
        return total

    def stage_memory(self, stage: int, count: StageCount) -> MemoryBytes:
        """Itemised bytes of a stage's rank at its peak."""
        parts = [(self.block_memory, count.none, False), (self.block_memory, count.full, True)]
        if stage == 0:
            parts.append((self.embedding_memory, 1, False))
        if stage == self.layout.pp - 1:
            parts.append((self.head_memory, 1, False))
        used, transient = self.fixed_memory[stage], 0.0
        for part, number, recomputed in parts:
            if number:
                held = part.held_recomputed if recomputed else part.held
                used = used + part.state * number + held * (number * self.in_flight[stage])
                transient = max(transient, part.transient_recomputed if recomputed else part.transient)
        return (used + MemoryBytes(transient=transient)).with_slack(self.allocator_slack)

    # ---- an assignment ---------------------------------------------------------------------------------

    def durations(self, counts: Sequence[StageCount]) -> list[StageSeconds]:
        """What the simulation needs of each stage."""
        durations = []
        for stage, count in enumerate(counts):
            cost = self.stage_seconds(stage, count)
            durations.append(
                StageSeconds(
                    forward=cost.forward.total,
                    backward_input=cost.backward.total + cost.recompute.total,
                    backward_weight=0.0,
                    gather=cost.gather.total,
                    reduce=cost.reduce.total,
                )
            )
        return durations

    def optimizer_seconds(self, counts: Sequence[StageCount]) -> float:
        """The slowest stage's update; clipping has made every rank wait for every other before."""
        return max(self.stage_seconds(s, count).optimizer.total for s, count in enumerate(counts))

    def simulate(self, counts: Sequence[StageCount]) -> Simulation:
        """The step up to the last gradient reduction."""
        pipeline = Pipeline(self.layout.schedule, self.layout.pp, 1, self.microbatches)
        return simulate(pipeline, self.durations(counts), self.send_seconds)

    def step(self, counts: Sequence[StageCount]) -> float:
        """Seconds of the optimizer step under this assignment: the one objective of planner and brute force."""
        return self.simulate(counts).seconds + self.optimizer_seconds(counts) + self.step_seconds

    def breakdown(self, counts: Sequence[StageCount]) -> dict[str, float]:
        """Seconds of the step by cause, as the busiest stage lives them; they sum to `step`.

        That stage's own work by cause, then what the critical path spends on point-to-point, and the rest of
        the time as bubble.
        """
        simulation = self.simulate(counts)
        costs = [self.stage_seconds(s, count) for s, count in enumerate(counts)]
        per_stage = [
            (cost.forward + cost.backward + cost.recompute) * self.microbatches + cost.gather + cost.reduce
            for cost in costs
        ]
        busiest = max(range(len(counts)), key=lambda s: per_stage[s].total)
        work, recompute = per_stage[busiest], costs[busiest].recompute.compute * self.microbatches
        waiting = max(0.0, simulation.seconds - work.total) if self.layout.pp > 1 else 0.0
        sends = min(waiting, simulation.critical_path.sends * self.send_seconds)
        return {
            "compute": work.compute - recompute,
            "recompute": recompute,
            "tp": work.tp,
            "cp": 0.0,
            "ep": 0.0,
            "pp": sends,
            "bubble": waiting - sends,
            "dp_exposed": work.dp,
            "optimizer": self.optimizer_seconds(counts) + self.step_seconds,
        }

    def memory(self, counts: Sequence[StageCount]) -> list[MemoryBytes]:
        """Itemised peak bytes of each pipeline rank."""
        return [self.stage_memory(s, count) for s, count in enumerate(counts)]


class CostModel:
    """Prices layouts of one job on one cluster; compute is priced once per (tp, sp, micro batch)."""

    def __init__(self, model: ModelSpec, cluster: ClusterSpec, hardware: HardwareProfile, job: TrainingJob) -> None:
        self._model, self._job, self._hardware = model, job, hardware
        self._compute = ComputeModel(model, hardware, job.precision)
        self._comm = CommModel(cluster, hardware)
        self._devices_per_node = cluster.devices_per_node
        self._memory = MemoryModel(model, hardware, job.precision)
        self._compute_cache: dict[tuple[int, bool, int], tuple[ComputeCost, ComputeCost, ComputeCost]] = {}

    def price(self, layout: Layout) -> LayoutCosts:
        """Every number of the layout."""
        sequence = self._job.sequence
        microbatches = layout.microbatches(self._job.global_batch)
        pace = self._pace(layout, microbatches)
        block, embedding, head = (part * pace for part in self._part_compute(layout))
        memory = self._memory
        tensors, (first, last) = self._model.block_tensors, self._model.end_tensors
        embedded, headed = memory.embedding_parameters(layout), memory.head_parameters(layout)
        overhead = self._compute.microbatch() * pace
        return LayoutCosts(
            layout=layout,
            microbatches=microbatches,
            layers=self._model.layers,
            block=self._part(
                layout, block, self._block_tp(layout, block), memory.block_parameters(layout), microbatches, tensors
            ),
            embedding=self._part(
                layout, embedding, self._embedding_tp(layout), embedded, microbatches, first, root=True
            ),
            head=self._part(layout, head, self._head_tp(layout), headed, microbatches, last, root=True),
            microbatch=PartSeconds(Seconds(overhead.forward.total), Seconds(overhead.backward.total)),
            send_seconds=self._send(layout),
            step_seconds=self._tied_seconds(layout) + self._clip_seconds(layout),
            block_memory=memory.block(layout, sequence),
            embedding_memory=memory.embedding(layout, sequence),
            head_memory=memory.head(layout, sequence),
            fixed_memory=self._fixed_memory(layout, microbatches),
            in_flight=self._in_flight(layout, microbatches),
            allocator_slack=self._hardware.allocator_slack,
        )

    # ---- what layouts share ------------------------------------------------------------------------------

    def _in_flight(self, layout: Layout, microbatches: int) -> tuple[int, ...]:
        pipeline = Pipeline(layout.schedule, layout.pp, 1, microbatches)
        return tuple(moment.full[0] for (moment,) in in_flight(pipeline))

    def _fixed_memory(self, layout: Layout, microbatches: int) -> tuple[MemoryBytes, ...]:
        """The stages between the first and the last hold the same."""
        kinds = [0, *[1] * (layout.pp - 2), layout.pp - 1][: layout.pp]
        fixed = {s: self._memory.fixed(layout, self._job.sequence, s, microbatches) for s in set(kinds)}
        return tuple(fixed[s] for s in kinds)

    # ---- compute ---------------------------------------------------------------------------------------

    def _pace(self, layout: Layout, microbatches: int) -> float:
        """How many times its measured seconds compute takes: the slowest of the ranks, and those that are idle.

        Points were measured with all ranks computing. Where stages share a node, a stage in its bubble leaves cores,
        memory bandwidth or power to the others: of M + p - 1 slots, slot t has min(t + 1, p, M, M + p - 1 - t) stages
        at work (arXiv 2104.04473, figure 3), and the mean over all that work counts.
        """
        pace = self._hardware.straggler_slowdown if layout.world_size > 1 else 1.0
        ranks = min(self._devices_per_node, layout.world_size)
        in_stage = layout.world_size // layout.pp
        if layout.pp > 1 and ranks > in_stage and self._hardware.contention_points:
            most, slots = ranks // in_stage, microbatches + layout.pp - 1
            busy = [min(t + 1, layout.pp, microbatches, slots - t) * most / layout.pp for t in range(slots)]
            spent = sum(stages * self._hardware.contention(stages * in_stage) for stages in busy)
            pace *= spent / sum(busy) / self._hardware.contention(ranks)
        return pace

    def _part_compute(self, layout: Layout) -> tuple[ComputeCost, ComputeCost, ComputeCost]:
        key = (layout.tp, layout.sequence_parallel, layout.micro_batch)
        if key not in self._compute_cache:
            sequence = self._job.sequence
            self._compute_cache[key] = (
                self._compute.block(layout, sequence),
                self._compute.embedding(layout, sequence),
                self._compute.head(layout, sequence),
            )
        return self._compute_cache[key]

    # ---- tensor parallelism: (forward, backward, recompute) seconds per microbatch -----------------------

    def _whole_bytes(self, layout: Layout) -> float:
        tokens = layout.micro_batch * self._job.sequence
        return float(DTYPE_BYTES[self._job.precision] * tokens * self._model.hidden_size)

    def _tp_seconds(self, operation: str, layout: Layout, size_bytes: float) -> float:
        seconds = self._comm.collective_seconds(operation, Group(layout.tp, 1), size_bytes)
        return seconds * self._hardware.correction("tp")

    def _block_tp(self, layout: Layout, compute: ComputeCost) -> tuple[float, float, float]:
        """Attention and MLP each: all-reduce once a pass, or all-gather in and reduce-scatter out with SP.

        In each the ranks meet after half of the block's compute and wait for the slowest.
        Recomputation stops when it has all that backward needs, which the sum that ends the MLP is not part of
        (torch's non-reentrant checkpoint; the counts are asserted in tests/distributed/test_collectives.py).
        """
        wait = self._hardware.wait_seconds if layout.tp > 1 else lambda seconds: 0.0
        there, back = wait(compute.forward.total / 2), wait(compute.backward.total / 2)
        size = self._whole_bytes(layout)
        if layout.sequence_parallel:
            gather = self._tp_seconds("all_gather", layout, size)
            scatter = self._tp_seconds("reduce_scatter", layout, size)
            return 2 * (gather + scatter + there), 2 * (gather + scatter + back), 2 * gather + scatter + there
        reduce = self._tp_seconds("all_reduce", layout, size)
        return 2 * (reduce + there), 2 * (reduce + back), reduce + there

    def _embedding_tp(self, layout: Layout) -> tuple[float, float, float]:
        """The vocabulary-parallel lookup is summed over tp; with SP its gradient is gathered."""
        size = self._whole_bytes(layout)
        if layout.sequence_parallel:
            forward = self._tp_seconds("reduce_scatter", layout, size)
            return forward, self._tp_seconds("all_gather", layout, size), 0.0
        return self._tp_seconds("all_reduce", layout, size), 0.0, 0.0

    def _head_tp(self, layout: Layout) -> tuple[float, float, float]:
        """Input gathered (SP) or its gradient summed; three reductions of one number a token for the loss."""
        size = self._whole_bytes(layout)
        loss = 3 * self._tp_seconds("all_reduce", layout, 4.0 * layout.micro_batch * self._job.sequence)
        if layout.sequence_parallel:
            forward = self._tp_seconds("all_gather", layout, size)
            return forward + loss, self._tp_seconds("reduce_scatter", layout, size), 0.0
        return loss, self._tp_seconds("all_reduce", layout, size), 0.0

    # ---- data parallelism and the step -------------------------------------------------------------------

    def _part(
        self,
        layout: Layout,
        compute: ComputeCost,
        tp: tuple[float, float, float],
        parameters: float,
        microbatches: int,
        tensors: int,
        root: bool = False,
    ) -> PartSeconds:
        """Phases of one part: a block, or (`root`) embedding and head.

        FSDP2 keeps embedding and head in the root group: gathered first and reduced last, they hide behind
        nothing, and zero 3 keeps them gathered from forward to backward.
        """
        forward, backward = Seconds(compute.forward.total, tp[0]), Seconds(compute.backward.total, tp[1])
        recompute = Seconds(compute.forward.total, tp[2])
        accumulate = self._compute.accumulate_seconds(parameters) * (microbatches - 1) / microbatches
        backward = backward + Seconds(compute=accumulate)
        optimizer = Seconds(compute=self._compute.optimizer_seconds(parameters / layout.dp_shard, tensors))
        gather = reduce = Seconds()
        if layout.dp > 1:
            gathered, reduced = self._data_parallel(layout, parameters)
            exposed = self._hardware.exposed_seconds
            pipelined = layout.pp > 1
            once_or_each = Seconds(dp=exposed(gathered, 0.0 if root else forward.total))
            again = Seconds(dp=exposed(gathered, backward.total))
            # torch's pipeline reduces once, after the last action, behind nothing.
            behind = Seconds(dp=exposed(reduced, 0.0 if root or pipelined else backward.total))
            if layout.zero in (0, 1) or pipelined:
                reduce = behind
            else:
                backward = backward + behind
            if layout.zero in (1, 2) or (layout.zero == 3 and pipelined):
                gather = once_or_each
            elif layout.zero == 3:
                forward = forward + once_or_each
            if layout.zero == 3 and not root:
                backward = backward + again
        return PartSeconds(forward, backward, recompute, gather, reduce, optimizer)

    def _data_parallel(self, layout: Layout, parameters: float) -> tuple[float, float]:
        """Seconds of gathering a part's weights and of reducing its gradients over dp, packing included.

        As FSDP2 was measured to do it; where it was not, the collective and a copy of what is packed.
        """
        group = Group(layout.dp, layout.tp * layout.cp)
        weights_bytes, gradient_bytes = DTYPE_BYTES[self._job.precision] * parameters, 4.0 * parameters
        gathered = self._comm.fsdp_seconds("fsdp_all_gather", group, weights_bytes)
        whole = "replicate_all_reduce" if layout.zero == 0 else "fsdp_reduce_scatter"
        reduced = self._comm.fsdp_seconds(whole, group, gradient_bytes)
        copy = self._compute.copy_seconds(parameters)
        if gathered is None:
            gathered = self._comm.collective_seconds("all_gather", group, weights_bytes) + copy
        if reduced is None:
            operation = "all_reduce" if layout.zero == 0 else "reduce_scatter"
            reduced = self._comm.collective_seconds(operation, group, gradient_bytes) + copy
        factor = self._hardware.correction("dp")
        return gathered * factor, reduced * factor

    def _send(self, layout: Layout) -> float:
        if layout.pp == 1:
            return 0.0
        group = Group(layout.pp, layout.tp * layout.cp * layout.dp)
        return self._comm.send_seconds(group, self._memory.boundary_bytes(layout, self._job.sequence))

    def _tied_seconds(self, layout: Layout) -> float:
        """First and last stage sum the gradients of their copies of a tied matrix: each sends its own to the other."""
        if layout.pp == 1 or not self._model.tied_embeddings:
            return 0.0
        rows = -(-self._model.vocab_size // layout.tp)
        size = 4.0 * rows * self._model.hidden_size / layout.dp_shard
        return self._comm.pair_sum_seconds(Group(layout.pp, layout.tp * layout.cp * layout.dp), size)

    def _clip_seconds(self, layout: Layout) -> float:
        """Loss and gradient norm, two float64 numbers, summed over all ranks."""
        return self._comm.collective_seconds("all_reduce", Group(layout.world_size, 1), 16.0)
