"""CostModel: prices layouts of one job on one cluster, the one place that knows what a step is made of.

Compute, tp, cp and ep of the parts are priced once for all layouts that share them; what a layout adds is data
parallelism, the pipeline and the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product

from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.software import Software, load_software

from .axis_cost import AxisModel, Passes
from .bounds import ROUNDING
from .capabilities import CAPABILITIES
from .comm_cost import CommModel, Group
from .compute_cost import ComputeCost, ComputeModel
from .data_parallel_cost import DataParallelModel
from .job import TrainingJob
from .layout import Layout
from .layout_costs import LayoutCosts, SegmentCosts
from .layout_seconds import LayoutSeconds, SegmentSeconds
from .memory_bytes import MemoryBytes, PartMemory
from .memory_cost import STAGES_GATHERED, MemoryModel
from .part_seconds import PartSeconds, Seconds
from .schedule import BLOCKING, FORWARDS_FIRST, SPLIT_BACKWARD, first_flight, held_by_torch, in_flight
from .space import LayoutGroup

# Seconds and bytes of a layer by its kind, of "embedding" and "head"; the seconds besides of "microbatch".
_PartSeconds = dict[str, PartSeconds]
_PartBytes = dict[str, PartMemory]
_MOST_PARTS = 2048


class CostModel:
    """Prices layouts as `software` runs them; by default as the job's target does."""

    def __init__(
        self,
        model: ModelSpec,
        cluster: ClusterSpec,
        hardware: HardwareProfile,
        job: TrainingJob,
        software: Software | None = None,
    ) -> None:
        software = software or load_software(CAPABILITIES[job.target].software).software
        self._model, self._job, self._hardware, self._software = model, job, hardware, software
        self._devices_per_node = cluster.devices_per_node
        self._compute = ComputeModel(model, hardware, job, software)
        self._comm = CommModel(cluster, hardware)
        self._axes = AxisModel(model, hardware, self._comm, job, software)
        self._dp = DataParallelModel(hardware, self._comm, self._compute, job.precision, software)
        self._memory = MemoryModel(model, hardware, job, software)
        self._seconds_cache: dict[Layout, _PartSeconds] = {}
        self._bytes_cache: dict[Layout, _PartBytes] = {}
        self._step_cache: dict[Layout, tuple[float, float]] = {}
        self._once_cache: dict[tuple[object, ...], tuple[float, float, float]] = {}
        self._compute_cache: dict[tuple[object, ...], dict[str, ComputeCost]] = {}

    def time(self, layout: Layout) -> LayoutSeconds:
        """The seconds of the layout alone, much sooner than with its bytes."""
        microbatches = layout.microbatches(self._job.global_batch)
        parts, send, software = self._part_seconds(layout, microbatches), self._send(layout), self._software
        # gpipe and 1f1b wait for their messages in the simulation; of the others those trainers that do.
        alone = layout.schedule in BLOCKING or software.on_torch_pipeline or software.p2p == "overlapped"
        waits = Seconds(pp=0.0 if alone else send)
        return LayoutSeconds(
            layout=layout,
            microbatches=microbatches,
            segments=tuple(SegmentSeconds(s.kind, s.count, parts[s.kind]) for s in self._model.segments),
            embedding=parts["embedding"],
            head=parts["head"],
            microbatch=parts["microbatch"] + PartSeconds(waits, waits),
            send_seconds=send,
            step_seconds=self._tied_seconds(layout) + self._clip_seconds(layout),
        )

    def price(self, layout: Layout) -> LayoutCosts:
        """Every number of the layout."""
        return self.price_bytes(self.time(layout))

    def price_bytes(self, timed: LayoutSeconds) -> LayoutCosts:
        """The timed layout with its bytes."""
        layout, memory = timed.layout, self._part_bytes(timed.layout)
        seconds = {field.name: getattr(timed, field.name) for field in fields(timed)}
        segments = tuple(SegmentCosts(s.kind, s.layers, s.seconds, memory[s.kind]) for s in timed.segments)
        return LayoutCosts(
            **(seconds | {"segments": segments}),
            embedding_memory=memory["embedding"],
            head_memory=memory["head"],
            fixed_memory=self._fixed_memory(layout, timed.microbatches),
            in_flight=(held_by_torch if self._software.on_torch_pipeline else in_flight)(timed.pipeline),
            allocator_slack=self._hardware.allocator_slack,
        )

    def _part_seconds(self, layout: Layout, microbatches: int) -> _PartSeconds:
        """What takes the same time with any number of chunks in every schedule that computes logits as often."""
        schedule = "gpipe" if self._logits_again(layout) else "1f1b"
        same = layout.schedule == schedule and layout.virtual_stages == 1
        key = layout if same else replace(layout, schedule=schedule, virtual_stages=1)
        if key not in self._seconds_cache:
            if len(self._seconds_cache) >= _MOST_PARTS:
                self._seconds_cache.clear()
            self._seconds_cache[key] = self._price_parts(layout, microbatches)
        return self._seconds_cache[key]

    def _price_parts(self, layout: Layout, microbatches: int) -> _PartSeconds:
        pace, memory, axes = self._pace(layout, microbatches), self._memory, self._axes
        compute = {name: cost * pace for name, cost in self._part_compute(layout).items()}
        kinds, (first, last) = {segment.kind for segment in self._model.segments}, self._model.end_tensors
        embedded, headed = (memory.embedding_parameters(layout), 0.0), (memory.head_parameters(layout), 0.0)
        sent_first, sent_last = {"tp": axes.embedding_tp(layout)}, {"tp": axes.head_tp(layout)}
        parts = {kind: self._layer(layout, compute[kind], kind, microbatches) for kind in kinds}
        for name, sent, parameters, tensors in (
            ("embedding", sent_first, embedded, first),
            ("head", sent_last, headed, last),
        ):
            parts[name] = self._part(layout, compute[name], sent, parameters, microbatches, tensors, root=True)
        overhead = self._compute.microbatch() * pace
        parts["microbatch"] = PartSeconds(Seconds(overhead.forward.total), Seconds(overhead.backward.total))
        return parts

    def _part_bytes(self, layout: Layout) -> _PartBytes:
        """What does not depend on the number of chunks, but where torch's pipeline keeps only some chunks' weights
        gathered, or gradients of some chunks apart."""
        some = self._software.on_torch_pipeline and (layout.virtual_stages > STAGES_GATHERED or layout.splits_backward)
        key = layout if some or layout.virtual_stages == 1 else replace(layout, virtual_stages=1)
        if key not in self._bytes_cache:
            if len(self._bytes_cache) >= _MOST_PARTS:
                self._bytes_cache.clear()
            memory, kinds = self._memory, {segment.kind for segment in self._model.segments}
            parts = {kind: memory.block(layout, kind) for kind in kinds}
            parts |= {"embedding": memory.embedding(layout), "head": memory.head(layout)}
            self._bytes_cache[key] = parts
        return self._bytes_cache[key]

    def least_work(self, group: LayoutGroup) -> float:
        """Seconds that no layout of the group is below, its compute and what its layers send alone.

        All microbatches' work shared evenly by the stages, or one microbatch through all stages one after the other
        and on some stage the backwards of all others (`bounds._one_stage`). Of several expert grids the least; what ep
        sends is left out then. Of schedules that compute logits again and others the least too.
        """
        layout = group.base
        microbatches = layout.microbatches(self._job.global_batch)
        again = {self._logits_again(replace(layout, schedule=s)): s for s, _ in group.pipelines}
        split = any(schedule in SPLIT_BACKWARD for schedule, _ in group.pipelines)
        stages = layout.pp * max(chunks for _, chunks in group.pipelines)
        grids = {(state[2], state[3]) for state in group.states}
        pace, least = self._pace(layout, microbatches), float("inf")
        for (ep, etp), schedule in product(grids, again.values()):
            one = replace(layout, ep=ep, etp=etp, schedule=schedule)
            forward, backward, weight = self._once(one, pace, len(grids) == 1)
            shared = microbatches * (forward + backward) / layout.pp
            in_chain = backward - weight if split else backward
            least = min(least, max(shared, forward + in_chain + (microbatches - 1) * in_chain / stages))
        return least

    def least_step(self, group: LayoutGroup) -> float:
        """Seconds that no layout of a group with one state is below: what its ranks work on average.

        Any rank's own work, the reduction of its gradients included, is a path of any schedule, and the slowest update
        takes the mean of the ranks' at least.
        """
        if group.base not in self._step_cache:
            self._step_cache[group.base] = self._mean_step(group.base)
        fixed, each_chunk = self._step_cache[group.base]
        return fixed + each_chunk * min(chunks for _, chunks in group.pipelines)

    def _mean_step(self, layout: Layout) -> tuple[float, float]:
        """(seconds whatever the chunks, seconds more for each chunk) of the mean rank."""
        microbatches = layout.microbatches(self._job.global_batch)
        parts = self._part_seconds(layout, microbatches)
        total, bare = 0.0, parts["microbatch"]
        numbers = [*((s.kind, s.count) for s in self._model.segments), ("embedding", 1), ("head", 1)]
        for kind, number in numbers:
            part = parts[kind]
            once = part.gather.total + part.reduce.total + part.optimizer.total
            total += number * (microbatches * (part.forward.total + part.backward.total) + once)
        fixed = total / layout.pp + self._tied_seconds(layout) + self._clip_seconds(layout)
        return fixed, microbatches * (bare.forward.total + bare.backward.total)

    def _once(self, layout: Layout, pace: float, with_ep: bool) -> tuple[float, float, float]:
        """One microbatch through the whole model: (forward, whole backward, of that the weights')."""
        # No stride among what is sent here depends on pp, dp or the state but those of ep.
        key = (
            *(layout.tp, layout.cp, layout.cp_style, layout.sequence_parallel, layout.micro_batch),
            *(layout.ep, layout.etp, self._logits_again(layout), pace, with_ep),
        )
        if key not in self._once_cache:
            compute = {name: cost * pace for name, cost in self._part_compute(layout).items()}
            forward = backward = weight = 0.0
            for kind, number in [*((s.kind, s.count) for s in self._model.segments), ("embedding", 1), ("head", 1)]:
                cost = compute[kind]
                passes: dict[str, Passes] = {}
                if kind not in ("embedding", "head"):
                    passes = self._axis_passes(layout, cost, kind)
                    if not with_ep:
                        passes.pop("ep", None)
                forward += number * (cost.forward.total + sum(p.forward for p in passes.values()))
                backward += number * (cost.backward.total + sum(p.backward for p in passes.values()))
                weight += number * cost.backward_weight.total
            self._once_cache[key] = (forward, backward, weight)
        return self._once_cache[key]

    def least_state_bytes(self, group: LayoutGroup) -> float:
        """Weights, gradients and optimizer of a whole pipeline, of a group with one state: no layout of it and no
        assignment holds less on all its ranks together."""
        least = float("inf")
        # Gradients come late where all forwards are first, more chunks have fewer weights gathered at once, and split
        # backwards have gradients besides (`memory_cost`).
        most = {"gpipe": 0, "1f1b": 0}
        for schedule, chunks in group.pipelines:
            like = "gpipe" if schedule in FORWARDS_FIRST else "1f1b"
            most[like] = max(most[like], chunks)
        for schedule, chunks in most.items():
            if not chunks:
                continue
            memory = self._part_bytes(replace(group.base, schedule=schedule, virtual_stages=chunks))
            total = sum(segment.count * memory[segment.kind].totals.state for segment in self._model.segments)
            least = min(least, total + memory["embedding"].totals.state + memory["head"].totals.state)
        return least

    def is_too_big(self, layout: Layout, limit_bytes: float, modes: Sequence[str]) -> bool:
        """Whether no assignment of the layout fits, by what ranks hold when their first backward begins.

        It takes no in-flight vectors but those of that moment, and leaves out buffers and what is transient.
        """
        memory, pipeline = self._part_bytes(layout), layout.pipeline(layout.microbatches(self._job.global_batch))
        slack, room = 1.0 + self._hardware.allocator_slack, 0.0
        flights = first_flight(pipeline)
        layers = sum(segment.count for segment in self._model.segments)
        kinds = [memory[segment.kind].totals for segment in self._model.segments]
        state = min(kind.state for kind in kinds)
        held = min(kind.held[mode] for kind in kinds for mode in modes)
        for rank, flight in enumerate(flights):
            free = (limit_bytes * (1 + ROUNDING) - self._hardware.context_bytes) / slack
            free -= memory["embedding"].totals.state if rank == 0 else 0.0
            free -= memory["head"].totals.state if rank == pipeline.rank_of(pipeline.stages - 1) else 0.0
            if free < 0:
                return True
            each = state + flight * held
            room += free // each if each > 0 else layers
        return room < layers

    # ---- compute ---------------------------------------------------------------------------------------

    def _pace(self, layout: Layout, microbatches: int) -> float:
        """How many times its measured seconds compute takes: the slowest of the ranks, and those that are idle.

        Points were measured with all ranks computing. Where stages share cores, memory bandwidth or power, a stage in
        its bubble leaves them to the others: of M + p - 1 slots, slot t has min(t + 1, p, M, M + p - 1 - t) stages
        at work (arXiv 2104.04473, figure 3) and is as long as that many make it; the step is the sum of the slots. How
        many ranks share anything is what contention was measured up to, whether or not they are one node.
        """
        pace = self._hardware.straggler_slowdown if layout.world_size > 1 else 1.0
        points = self._hardware.contention_points
        ranks = min(layout.world_size, max((point.active for point in points), default=1))
        in_stage = layout.world_size // layout.pp
        if layout.pp > 1 and ranks > in_stage:
            most, slots = ranks // in_stage, microbatches + layout.pp - 1
            busy = [min(t + 1, layout.pp, microbatches, slots - t) * most / layout.pp for t in range(slots)]
            spent = sum(self._hardware.contention(stages * in_stage) for stages in busy)
            pace *= spent / slots / self._hardware.contention(ranks)
        return pace

    def _logits_again(self, layout: Layout) -> bool:
        """What the head's compute depends on besides its shapes."""
        return self._software.loss_in_pieces and layout.logits_again(layout.microbatches(self._job.global_batch))

    def _part_compute(self, layout: Layout) -> dict[str, ComputeCost]:
        key = (
            *(layout.tp, layout.cp, layout.sequence_parallel, layout.micro_batch, layout.ep, layout.etp),
            self._logits_again(layout),
        )
        if key not in self._compute_cache:
            costs = {segment.kind: self._compute.block(layout, segment.kind) for segment in self._model.segments}
            costs |= {"embedding": self._compute.embedding(layout), "head": self._compute.head(layout)}
            self._compute_cache[key] = costs
        return self._compute_cache[key]

    # ---- parts -----------------------------------------------------------------------------------------

    def _layer(self, layout: Layout, compute: ComputeCost, kind: str, microbatches: int) -> PartSeconds:
        axes = self._axis_passes(layout, compute, kind)
        parameters, tensors = self._memory.block_parameters(layout, kind), self._model.layer_tensors(kind)
        return self._part(layout, compute, axes, parameters, microbatches, tensors)

    def _axis_passes(self, layout: Layout, compute: ComputeCost, kind: str) -> dict[str, Passes]:
        axes = {"tp": self._axes.block_tp(layout, compute, kind), "cp": self._axes.block_cp(layout, compute)}
        if kind == "experts":
            axes["ep"] = self._axes.block_ep(layout)
        return axes

    def _part(
        self,
        layout: Layout,
        compute: ComputeCost,
        axes: dict[str, Passes],
        parameters: tuple[float, float],
        microbatches: int,
        tensors: int,
        root: bool = False,
    ) -> PartSeconds:
        """Phases of one part: a layer, or (`root`) embedding and head; `parameters` dense and of experts."""

        def sent(way: str) -> dict[str, float]:
            return {axis: getattr(passes, way) for axis, passes in axes.items()}

        dense, expert = parameters
        accumulate = self._compute.accumulate_seconds(dense + expert)
        if not self._software.adds_first_gradient:
            accumulate *= (microbatches - 1) / microbatches
        kept = dense / layout.shards + expert / layout.expert_shards
        # dp's collectives hide behind all that a pass lasts, what the other axes send included.
        forward = compute.forward.total + sum(sent("forward").values())
        backward = compute.backward.total + accumulate + sum(sent("backward").values())
        number = self._software.joined_tensors(tensors, root)
        dp = self._dp.price(layout, dense, expert, forward, backward, tensors=number, root=root)
        return PartSeconds(
            forward=Seconds(compute.forward.total, **sent("forward")) + dp.forward,
            backward_input=Seconds(compute.backward_input.total, **sent("backward")) + dp.backward,
            backward_weight=Seconds(compute.backward_weight.total + accumulate),
            recompute_selective=Seconds(compute.selective.total, **sent("selective")),
            recompute_full=Seconds(compute.forward.total, **sent("full")),
            gather=dp.gather,
            reduce=dp.reduce,
            optimizer=Seconds(self._compute.optimizer_seconds(kept, tensors)),
        )

    # ---- the pipeline and the step -----------------------------------------------------------------------

    def _fixed_memory(self, layout: Layout, microbatches: int) -> tuple[MemoryBytes, ...]:
        """The ranks between the first and the last count as holding the same: the more of those next to the ends."""
        ends = [self._memory.fixed(layout, rank, microbatches) for rank in sorted({0, layout.pp - 1})]
        inner = [self._memory.fixed(layout, rank, microbatches) for rank in {1, layout.pp - 2} if layout.pp > 2]
        middle = [max(inner, key=lambda held: held.total)] * (layout.pp - 2) if inner else []
        return (ends[0], *middle, *ends[1:])

    def _send(self, layout: Layout) -> float:
        """One message between stages; cut over tp and gathered again where the trainer does so."""
        if layout.pp == 1:
            return 0.0
        group, size = Group(layout.pp, layout.tp * layout.cp * layout.dp), self._memory.boundary_bytes(layout)
        if self._software.scatter_gather and layout.tp > 1 and not layout.sequence_parallel:
            gathered = self._comm.collective_seconds("all_gather", Group(layout.tp, 1), size)
            return self._comm.send_seconds(group, size / layout.tp) + gathered
        return self._comm.send_seconds(group, size)

    def _tied_seconds(self, layout: Layout) -> float:
        """First and last stage sum the gradients of their copies of a tied matrix: each sends its own to the other."""
        if layout.pp == 1 or not self._model.tied_embeddings:
            return 0.0
        rows = -(-self._model.vocab_size // layout.tp)
        size = 4.0 * rows * self._model.hidden_size / layout.shards
        return self._comm.pair_sum_seconds(Group(layout.pp, layout.tp * layout.cp * layout.dp), size)

    def _clip_seconds(self, layout: Layout) -> float:
        """Loss and gradient norm, two float64 numbers, summed over all ranks."""
        return self._comm.collective_seconds("all_reduce", Group(layout.world_size, 1), 16.0)
