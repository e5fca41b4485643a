"""CostModel: prices layouts of one job on one cluster, the one place that knows what a step is made of.

Compute, tp, cp and ep of the parts are priced once for all layouts that share them; what a layout adds is data
parallelism, the pipeline and the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.software import Software
from profiles.traced_model import TracedModel

from .axis_cost import AxisModel, Passes
from .better_assignment import quicker_by_neighbours
from .comm_cost import CommModel, Group
from .compile_rules import why_not_compiled
from .compute_cost import ComputeCost
from .contention import Pace, least_pace, ranks_at_work, shares_with_stages
from .data_parallel_cost import DataParallelModel
from .first_assignment import first_assignment
from .gradient_moments import gradients_by_torch
from .in_flight import InFlight, in_flight
from .job import TrainingJob
from .layout import Layout
from .layout_costs import LayoutCosts, SegmentCosts
from .least_memory import LeastMemory
from .local_shapes import joined_tensors
from .memory_bytes import MemoryBytes, PartMemory
from .memory_cost import MemoryModel
from .message_cost import MessageModel
from .offload import transfer_seconds
from .paced_compute import PacedCompute
from .part_seconds import PartSeconds, Seconds, least_of
from .reduction_moments import reduction_moments
from .schedule import ALL_SPLIT, BLOCKING, FORWARDS_FIRST, SPLIT_BACKWARD, Pipeline
from .space import LayoutGroup
from .target_software import compiled_software, eager_software
from .traced_cost import compute_model, traced_parts

# Layers by kind, embedding, head, and what a microbatch costs besides.
_Parts = tuple[dict[str, PartSeconds], PartSeconds, PartSeconds, ComputeCost]
_MOST_PARTS = 4096
_PACE_ROUNDS = 3  # of moved layers before it is counted how many ranks work at once


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
        compiled = compiled_software(job, hardware) if software is None else None
        software = software or eager_software(job)
        self._comm = CommModel(cluster, hardware)
        if isinstance(model, TracedModel):
            software = replace(software, cross_entropy="eager")  # its loss is its own
            self._axes, self._memory = traced_parts(model, hardware, self._comm, job, software)
        else:
            self._axes = AxisModel(model, hardware, self._comm, job, software)
            self._memory = MemoryModel(model, hardware, job, software)
        self._paced = PacedCompute(hardware, partial(compute_model, model, job=job, software=software))
        self._compute = self._paced.measured
        self._compiled: PacedCompute | None = None
        if compiled is not None:
            self._compiled = PacedCompute(hardware, partial(compute_model, model, job=job, software=compiled))
        self._model, self._job, self._hardware, self._software = model, job, hardware, software
        self._dp = DataParallelModel(hardware, self._comm, self._compute, job.precision, software)
        self._messages = MessageModel(hardware, self._comm, self._memory, software)
        self._joined = 0 if software.separate_projections else joined_tensors(model)
        self._paces: dict[Layout, Pace] = {}
        self._part_cache: dict[tuple[Layout, bool | None, Pace], _Parts] = {}
        self._layer_cache: dict[tuple[Layout, bool | None, Pace], dict[str, PartSeconds]] = {}
        self._once_cache: dict[tuple[object, ...], tuple[float, float, float]] = {}

    def price(self, layout: Layout, reshard: Sequence[bool | None] = ()) -> LayoutCosts:
        """Every number of the layout. `reshard` is each stage's choice where stages have one, by default to free
        as far as the job's pin has it."""
        costs, memory, choose = self.price_seconds(layout), self._memory, layout.stages_choose
        choices = self._job.reshard_choices
        costs = replace(
            costs,
            segments=self._with_bytes(layout, self._least_layers(layout), choices[-1] if choose else None),
            embedding_memory=memory.embedding(layout),
            head_memory=memory.head(layout),
            fixed_memory=self._fixed_memory(layout, costs.microbatches),
            in_flight=self._held(costs.pipeline),
        )
        if choose:
            chosen = tuple(reshard) or choices[-1:] * layout.stages
            priced = tuple((each, self._segments(layout, each)) for each in dict.fromkeys((*choices, *reshard)))
            costs = replace(costs, reshard=chosen, choices=priced)
        if not self._software.on_fsdp:
            return costs
        return replace(costs, find_reductions=partial(reduction_moments, over=memory.sums_alone(layout)))

    def _segments(self, layout: Layout, reshard: bool | None) -> tuple[SegmentCosts, ...]:
        """The layers of a stage that has chosen so ([Note: Resharding])."""
        seconds, _, _, _ = self._parts(layout, reshard)
        return self._with_bytes(layout, seconds, reshard)

    def _least_layers(self, layout: Layout, pace: Pace | None = None) -> dict[str, PartSeconds]:
        """Seconds by kind that no layer is below, whatever its stage chooses. Where FSDP2's own work takes nothing, one
        that keeps its weights takes least."""
        hardware, choices = self._hardware, self._job.reshard_choices if layout.stages_choose else (None,)
        if hardware.fsdp_forward_overhead_seconds == hardware.fsdp_backward_overhead_seconds == 0.0:
            choices = choices[:1]
        every = [self._parts(layout, choice, pace)[0] for choice in choices]
        return every[0] if len(every) == 1 else {kind: least_of([e[kind] for e in every]) for kind in every[0]}

    def _with_bytes(
        self, layout: Layout, seconds: dict[str, PartSeconds], reshard: bool | None
    ) -> tuple[SegmentCosts, ...]:
        memory = {kind: self._memory.block(layout, kind, reshard) for kind in seconds}
        return tuple(SegmentCosts(s.kind, s.count, seconds[s.kind], memory[s.kind]) for s in self._model.segments)

    def price_seconds(self, layout: Layout, waits: bool = True, pace: Pace | None = None) -> LayoutCosts:
        """The layout as if it held no bytes, which is much sooner than `price`: most are ruled out by it. Not `waits`:
        and as if no message took anything from an action. With that and the `least_pace` of a group its schedules with
        the same parts do not differ."""
        microbatches = layout.microbatches(self._job.global_batch)
        _, embedding, head, overhead = self._parts(layout, False if layout.stages_choose else None, pace)
        layers = self._least_layers(layout, pace)
        hops, software, nothing = self._messages.hops(layout), self._software, PartMemory()
        # gpipe and 1f1b wait for their messages in the simulation; of the others those trainers that do, and there the
        # ranks at the slowest hop set the pace of all.
        alone = layout.schedule in BLOCKING or software.computes_meanwhile(layout.schedule in SPLIT_BACKWARD)
        each = (self._messages.work(layout) if alone else max(hops, default=0.0)) if waits else 0.0
        return LayoutCosts(
            layout=layout,
            microbatches=microbatches,
            segments=tuple(SegmentCosts(s.kind, s.count, layers[s.kind], nothing) for s in self._model.segments),
            embedding=embedding,
            head=head,
            microbatch=PartSeconds(Seconds(overhead.forward.total, pp=each), Seconds(overhead.backward.total, pp=each)),
            hop_seconds=hops,
            step_seconds=self._tied_seconds(layout) + self._transform_seconds(layout) + self._clip_seconds(layout),
            embedding_memory=nothing,
            head_memory=nothing,
            fixed_memory=(),
            in_flight=(),
            allocator_slack=self._hardware.allocator_slack,
            receives_early=software.posts_receives_early and self._hardware.backend == "gloo",
        )

    def _held(self, pipeline: Pipeline) -> tuple[tuple[InFlight, ...], ...]:
        return (gradients_by_torch if self._software.on_fsdp else in_flight)(pipeline)

    @property
    def least_memory(self) -> LeastMemory:
        """What layouts hold at least."""
        return LeastMemory(self._model, self._job, self._software, self._memory)

    @property
    def slack(self) -> float:
        """Bytes of tensors are multiplied by this for what the allocator loses."""
        return 1.0 + self._hardware.allocator_slack

    def parts_like(self, layout: Layout) -> str:
        """A schedule whose layers, embedding and head take as long as under this layout's."""
        if layout.schedule in ALL_SPLIT and self._hardware.split_overhead_seconds:
            return "zb1p"
        if layout.splits_backward and self._compiled is not None:
            return "zb1p"  # eager, where others are compiled
        return "gpipe" if self._logits_again(layout) else "1f1b"

    def _parts(self, layout: Layout, reshard: bool | None, pace: Pace | None = None) -> _Parts:
        """Seconds of a layer by kind, of embedding and head, and of a microbatch. Of the pipeline they depend on
        nothing but whether logits are computed again and all backwards split, and on its pace, so others share them."""
        microbatches = layout.microbatches(self._job.global_batch)
        pace = pace or self._pace(layout)
        key = (layout.but(virtual_stages=1, schedule=self.parts_like(layout)), reshard, pace)
        if key not in self._part_cache:
            if len(self._part_cache) >= _MOST_PARTS:
                self._part_cache.clear()
            self._part_cache[key] = self._price_parts(*key, microbatches)
        return self._part_cache[key]

    def _price_parts(self, layout: Layout, reshard: bool | None, pace: Pace, microbatches: int) -> _Parts:
        memory, compute = self._memory, self._part_compute(layout, pace)
        layers = self._price_layers(layout, reshard, pace, microbatches, compute)
        (first, last), axes = self._model.end_tensors, self._axes
        embedded, headed = (memory.embedding_parameters(layout), 0.0), (memory.head_parameters(layout), 0.0)
        before, after = {"tp": axes.embedding_tp(layout)}, {"tp": axes.head_tp(layout)}
        embedding = self._part(layout, compute["embedding"], before, embedded, microbatches, first, root=True)
        head = self._part(layout, compute["head"], after, headed, microbatches, last, root=True)
        return layers, embedding, head, self._paced.microbatch(layout, pace)

    def _price_layers(
        self, layout: Layout, reshard: bool | None, pace: Pace, microbatches: int, compute: dict[str, ComputeCost]
    ) -> dict[str, PartSeconds]:
        """Seconds of a layer by kind; whether logits are computed again is nothing to them."""
        key = (layout if layout.schedule in ALL_SPLIT else layout.but(schedule="1f1b"), reshard, pace)
        if key not in self._layer_cache:
            if len(self._layer_cache) >= _MOST_PARTS:
                self._layer_cache.clear()
            self._layer_cache[key] = {
                kind: self._layer(layout, compute[kind], kind, microbatches, reshard)
                for kind in {segment.kind for segment in self._model.segments}
            }
        return self._layer_cache[key]

    def least_work(self, group: LayoutGroup) -> float:
        """Seconds that no layout of the group is below, its compute and what its layers send alone.

        All microbatches' work shared evenly by the stages, or one microbatch through all stages one after the other
        and on some stage the backwards of all others (`bounds._one_stage`). Of several expert grids the least; what ep
        sends is left out then. Of schedules that compute logits again and others the least too.
        """
        layout = group.base
        microbatches = layout.microbatches(self._job.global_batch)
        alike = {(s in FORWARDS_FIRST, s in SPLIT_BACKWARD): s for s, _ in group.pipelines}
        again = {self._head_and_blocks(layout.but(schedule=s)): s for s in alike.values()}
        split = any(schedule in SPLIT_BACKWARD for schedule, _ in group.pipelines)
        stages = layout.pp * max(chunks for _, chunks in group.pipelines)
        grids = {(state[2], state[3]) for state in group.states}
        pace, least = self.least_pace(group), float("inf")
        for (ep, etp), schedule in product(grids, again.values()):
            one = layout.but(ep=ep, etp=etp, schedule=schedule)
            forward, backward, weight = self._once(one, pace, len(grids) == 1)
            shared = microbatches * (forward + backward) / layout.pp
            in_chain = backward - weight if split else backward
            least = min(least, max(shared, forward + in_chain + (microbatches - 1) * in_chain / stages))
        return least

    def _once(self, layout: Layout, pace: Pace, with_ep: bool) -> tuple[float, float, float]:
        """One microbatch through the whole model: (forward, whole backward, of that the weights')."""
        # No stride among what is sent here depends on pp, dp or the state but those of ep.
        key = (
            *(layout.tp, layout.cp, layout.cp_style, layout.sequence_parallel, layout.micro_batch),
            *(layout.ep, layout.etp, self._head_and_blocks(layout), pace, with_ep),
        )
        if key not in self._once_cache:
            compute = self._part_compute(layout, pace)
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

    # ---- compute ---------------------------------------------------------------------------------------

    def least_pace(self, group: LayoutGroup) -> Pace:
        """None of the group's layouts is faster."""
        if not shares_with_stages(self._hardware, group.base):
            return self._pace(group.base)
        grids = {(ep, etp) for _, _, ep, etp in group.states}
        return least_pace(
            [
                self._pace(group.base.but(schedule=schedule, virtual_stages=chunks, ep=ep, etp=etp))
                for schedule, chunks in group.pipelines
                for ep, etp in grids
            ]
        )

    def _pace(self, layout: Layout) -> Pace:
        """That of the slowest rank, while those in their bubble are idle."""
        slowest = self._hardware.straggler_slowdown if layout.world_size > 1 else 1.0
        if not shares_with_stages(self._hardware, layout):
            return Pace(slowest)
        alike = layout.but(zero=0, dp_shard=1)  # what is sharded over dp has no say in it
        if alike not in self._paces:
            alone = self.price_seconds(alike, waits=False, pace=Pace())
            counts = quicker_by_neighbours(alone, first_assignment(alone, float("inf"), ("none",)), _PACE_ROUNDS)
            working = ranks_at_work(self._hardware, alike, alone.pipeline, alone.durations(counts))
            self._paces[alike] = Pace(slowest, working)
        return self._paces[alike]

    def _logits_again(self, layout: Layout) -> bool:
        """What the head's compute depends on besides its shapes."""
        return self._software.loss_in_pieces and layout.logits_again(layout.microbatches(self._job.global_batch))

    def _runs_compiled(self, layout: Layout) -> bool:
        return self._compiled is not None and why_not_compiled(layout, self._model) is None

    def _head_and_blocks(self, layout: Layout) -> tuple[bool, bool]:
        """What compute depends on besides shapes: whether logits are computed again, and whether it is compiled."""
        return self._logits_again(layout), self._runs_compiled(layout)

    def _part_compute(self, layout: Layout, pace: Pace) -> dict[str, ComputeCost]:
        """Compute of a layer by kind, of embedding and head."""
        again = self._logits_again(layout)
        parts = [*{segment.kind for segment in self._model.segments}, "embedding", "head"]
        paced = self._compiled if self._compiled is not None and self._runs_compiled(layout) else self._paced
        return {part: paced.part(layout, part, again, pace) for part in parts}

    # ---- parts -----------------------------------------------------------------------------------------

    def _layer(
        self, layout: Layout, compute: ComputeCost, kind: str, microbatches: int, reshard: bool | None
    ) -> PartSeconds:
        axes = self._axis_passes(layout, compute, kind)
        parameters, tensors = self._memory.block_parameters(layout, kind), self._model.layer_tensors(kind)
        return self._part(layout, compute, axes, parameters, microbatches, tensors, reshard=reshard)

    def _axis_passes(self, layout: Layout, compute: ComputeCost, kind: str) -> dict[str, Passes]:
        axes = {"tp": self._axes.block_tp(layout, compute, kind), "cp": self._axes.block_cp(layout, compute)}
        if kind == "experts":
            axes["ep"] = self._axes.block_ep(layout, compute)
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
        reshard: bool | None = None,
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
        number = self._software.joined_tensors(tensors, self._joined, root)
        whole = self._memory.sent_together(layout)
        dp = self._dp.price(layout, dense, expert, forward, backward, number, whole, root=root, reshard=reshard)
        split = self._hardware.split_overhead_seconds if layout.schedule in ALL_SPLIT else 0.0  # of each operation
        first, second = compute.backward_input, compute.backward_weight
        return PartSeconds(
            forward=Seconds(compute.forward.total, **sent("forward")) + dp.forward,
            backward_input=Seconds(first.total + split * first.operations, **sent("backward")) + dp.backward,
            backward_weight=Seconds(second.total + split * second.operations + accumulate),
            recompute_selective=Seconds(compute.selective.total, **sent("selective")),
            recompute_full=Seconds(compute.forward.total + compute.checkpoint.total, **sent("full")),
            gather=dp.gather,
            reduce=dp.reduce,
            optimizer=Seconds(
                self._compute.optimizer_seconds(kept, tensors, dense + expert)
                + self._compute.overflow_seconds(kept, number)
                + transfer_seconds(self._job, self._hardware, kept)
            ),
        )

    # ---- the pipeline and the step -----------------------------------------------------------------------

    def _fixed_memory(self, layout: Layout, microbatches: int) -> tuple[MemoryBytes, ...]:
        """The ranks between the first and the last count as holding the same: the more of those next to the ends."""
        ends = [self._memory.fixed(layout, rank, microbatches) for rank in sorted({0, layout.pp - 1})]
        inner = [self._memory.fixed(layout, rank, microbatches) for rank in {1, layout.pp - 2} if layout.pp > 2]
        middle = [max(inner, key=lambda held: held.total)] * (layout.pp - 2) if inner else []
        return (ends[0], *middle, *ends[1:])

    def _tied_seconds(self, layout: Layout) -> float:
        """First and last stage sum the gradients of their copies of a tied matrix, of its shards under FSDP2."""
        if layout.pp == 1 or not self._model.tied_embeddings:
            return 0.0
        rows = -(-self._model.vocab_size // layout.tp)
        size = self._dp.summed_bytes(layout, rows * self._model.hidden_size)
        return self._comm.pair_sum_seconds(Group(layout.pp, layout.tp * layout.cp * layout.dp), size)

    def _transform_seconds(self, layout: Layout) -> float:
        """Our ranks of tp sum what each has of the gradients of the head's transform, in fp32, after the last one."""
        if layout.tp == 1 or not (self._model.output_transform and self._software.head_of_predicted):
            return 0.0
        size = 4.0 * (self._model.hidden_size + 1) * self._model.hidden_size / layout.shards
        return self._comm.collective_seconds("all_reduce", Group(layout.tp, 1), size)

    def _clip_seconds(self, layout: Layout) -> float:
        return self._comm.scalars_seconds(Group(layout.world_size, 1))
