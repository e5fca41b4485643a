"""Bytes on one rank: state (`state_bytes`), activations by recompute mode, buffers, reserve.

[Note: In-flight activations]
A stage holds the activations of every microbatch whose forward is done and whose backward is not. How many
that is comes from the schedule's action list alone, so activation bytes are in-flight count × bytes of one
microbatch, and only the latter depends on the layers of the stage.
"""

from __future__ import annotations

from dataclasses import replace

from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.software import Software

from .activation_bytes import ActivationModel, KeptBytes
from .head_memory import HeadMemory
from .in_flight import input_halves, most_outputs, shortest
from .job import TrainingJob
from .layout import MESSAGE_BYTES, RECOMPUTE_MODES, Layout
from .local_shapes import expert_linear_shapes, local_linear_shape, outside_tokens
from .memory_bytes import NO_BYTES, MemoryBytes, PartMemory
from .offload import passing_moments_bytes
from .schedule import BLOCKING
from .state_bytes import StateBytes

_FP32_BYTES = 4
_MOST_STANDING = 4096


class MemoryModel:
    """Prices the bytes of one model as one trainer keeps them on one kind of device."""

    def __init__(self, model: ModelSpec, hardware: HardwareProfile, job: TrainingJob, software: Software) -> None:
        self._model, self._hardware, self._job, self._software = model, hardware, job, software
        composite = model.norm == "rmsnorm" and hardware.backend == "gloo"
        self._activations = ActivationModel(model, job, software, composite)
        self._element_bytes = self._activations.element_bytes
        self._states = StateBytes(model, self._element_bytes, job, software)
        self._head = HeadMemory(model, job, software, self._activations)
        self._standing: dict[tuple[Layout, str, bool | None], PartMemory] = {}
        self._ends: dict[Layout, tuple[PartMemory, PartMemory]] = {}

    # ---- activations -----------------------------------------------------------------------------------

    def block(self, layout: Layout, kind: str = "dense", reshard: bool | None = None) -> PartMemory:
        """A layer, of a stage that has chosen so where stages choose ([Note: Resharding])."""
        kept, (dense, expert) = self._activations.layer(layout, kind), self.block_parameters(layout, kind)
        held = {"none": kept.none, "selective": kept.selective, "full": kept.full}
        whole = {"none": kept.none, "selective": kept.none + kept.unclaimed, "full": kept.none}

        def passing(summed: bool) -> dict[str, float]:
            return {
                mode: self._transient(layout, dense, expert, kept, held[mode], whole[mode], reshard, summed)
                for mode in RECOMPUTE_MODES
            }

        most = passing(summed=True)
        return replace(
            self.block_standing(layout, kind, reshard),
            transient=most["none"],
            transient_selective=most["selective"],
            transient_recomputed=most["full"],
            transient_first=passing(summed=False) if self._states.after_forwards(layout, reshard) else {},
            passing_turned=self._passing_turned(layout, dense + expert, kept, reshard),
        )

    def _passing_turned(self, layout: Layout, parameters: float, kept: KeptBytes, reshard: bool | None) -> float:
        """What a chunk's first layer, which turns last, has when its backward begins beyond what it leaves: all that it
        recomputes has come back, and its gradients are not there yet."""
        whole, states = kept.passing(self._narrow_bytes(layout)) + kept.none, self._states
        if states.frees(layout, reshard) and layout.zero == 3 and not states.after_forwards(layout, reshard):
            whole += self._element_bytes * parameters
        return max(0.0, whole - states.summed(layout, parameters).total)

    def schedule_like(self, layout: Layout) -> str:
        """A schedule under which parts `standing` are the same."""
        return self._states.schedule_like(layout)

    def block_standing(self, layout: Layout, kind: str = "dense", reshard: bool | None = None) -> PartMemory:
        """The same without what passes in a backward, which is most of the work. Schedules share it."""
        key = (layout.but(schedule=self.schedule_like(layout)), kind, reshard)
        if key not in self._standing:
            if len(self._standing) >= _MOST_STANDING:
                self._standing.clear()
            self._standing[key] = self._block_standing(*key)
        return self._standing[key]

    def _block_standing(self, layout: Layout, kind: str, reshard: bool | None) -> PartMemory:
        kept, states = self._activations.layer(layout, kind), self._states
        dense, expert = self.block_parameters(layout, kind)
        frees = states.frees(layout, reshard)
        state = states.of(layout, dense, frees=frees)
        if expert:
            state = state + states.of(layout, expert, expert=True, frees=frees)
        modes = (kept.none, kept.selective, kept.full)
        held = [MemoryBytes(activations=bytes_) for bytes_ in modes]
        turned = states.turned(layout, dense, expert, reshard)
        gathered = state.gathered_weights + turned.gathered_weights
        left = [states.left(layout, dense + expert, bytes_, reshard) for bytes_ in modes]
        return PartMemory(
            state=state,
            held=held[0],
            held_selective=held[1],
            held_recomputed=held[2],
            held_weight=MemoryBytes(activations=kept.weight),
            left=left[0],
            left_selective=left[1],
            left_recomputed=left[2],
            summed=states.summed(layout, dense, expert),
            reduced=states.reduced(layout, dense, expert) + states.freed(layout, state),
            first=states.not_yet(state),
            nothing=states.not_yet(state),
            turned=turned,
            at_root=turned,
            reducing=turned,
            reduction=states.reduction(layout, dense + expert, gathered),
            ahead=self._element_bytes * (dense + expert) if frees and not layout.stages_choose else 0.0,
        )

    def _transient(
        self,
        layout: Layout,
        dense: float,
        expert: float,
        kept: KeptBytes,
        held: float,
        whole: float,
        reshard: bool | None,
        summed: bool,
    ) -> float:
        """The most that a layer's backward has beyond what its stage holds, `held` of it by this layer, whose
        activations are `whole` once what it recomputes has come back. `summed`: gradients are there already.

        FSDP2 under zero 3 gathers the layer and, ahead of time, the one before it; under a pipeline where nothing has
        been left of them, or activations are more than what has. One that is alone on its stage comes in a buffer that
        stays while its forward runs, unless it has been left or its chunk is gathered as a whole. Under a pipeline
        gradients are reduced when the backwards are over (`reduction_moments`). Without one, where each microbatch's
        are reduced, what went into the reduction of the layer after is alive, in fp32, until this one's (torch 2.13,
        `reduce_scatter_state`), but that layer's activations are gone; for the last layer it is what the microbatch
        before reduced last, the root group. At its end this layer's activations are gone too, and its gradients are in
        the compute precision. Where gradients are reduced after the last microbatch, input and output of one layer's
        reduction come on top of all sums, when all is gone that the layers gather and hold.
        """
        parameters, element = dense + expert, self._element_bytes
        fsdp = self._software.on_fsdp
        gathers = layout.zero == 3 and (layout.pp == 1 or not fsdp or self._states.frees(layout, reshard))
        alone = layout.stages == self._model.layers
        left = self._states.after_forwards(layout, reshard) and summed
        gathered = (1 if alone else 2) * element * parameters if gathers else 0.0
        if left:
            gathered = min(gathered, 2 * held)  # two layers' activations are not yet weights that were left
        start = kept.passing(self._narrow_bytes(layout)) + gathered + whole - held
        if gathers and alone and not left and layout.schedule in BLOCKING:
            start = max(start, 2 * element * parameters + kept.in_forward(held) - held)
        if fsdp and self._states.halves_apart(layout):
            start += self._states.narrow_bytes * parameters - kept.left_between
        if layout.pp > 1 or not fsdp:  # gradients are reduced when the backwards are over
            return max(start, self._gathered_once(layout, parameters))
        if self._states.sums_alone(layout):
            return max(start, self._message(layout, parameters, held))
        if not self._states.wraps(layout):
            return start
        reduced = _FP32_BYTES * parameters
        if self._states.reduces_each_microbatch(layout):
            end = kept.heads + gathered + element * parameters - held
            before = max(self._root_reduction(layout), reduced - held)
            return max(start, end) + before
        return max(start, reduced * (1 + 1 / layout.shards) - self._model.layers * (element * parameters + held))

    def _message(self, layout: Layout, parameters: float, held: float) -> float:
        """Without a pipeline, what the first message of [Note: Gradient sum] has beyond its layers' activations, which
        are gone when it is packed. With one microbatch a layer counts as the more of the two."""
        gradients, layers = _FP32_BYTES * parameters, self._model.layers
        packed = min(float(layers), MESSAGE_BYTES / gradients)
        each = gradients - held
        if self._states.reduces_each_microbatch(layout):
            each = min(2 * gradients - held, gradients)
        ends = _FP32_BYTES * (self.embedding_parameters(layout) + self.head_parameters(layout))
        return packed * each + (min(ends, MESSAGE_BYTES - packed * gradients) if packed == layers else 0.0)

    def _narrow_bytes(self, layout: Layout) -> int:
        """Bytes of a weight's gradient that waits for the end of its layer's backward."""
        return self._states.narrow_bytes if self._states.wraps(layout) else 0

    def embedding(self, layout: Layout) -> PartMemory:
        """A norm behind it keeps its input, as one of a layer does."""
        parameters = self.embedding_parameters(layout)
        moments = passing_moments_bytes(self._job, parameters / layout.shards)
        passing, held = max(self._table_gradient(layout), moments), NO_BYTES
        if self._model.embedding_norm:
            held = MemoryBytes(activations=self.boundary_bytes(layout))
        # Its gradients come last of its chunk, when what passes in the first layer is gone.
        summed = self._states.summed(layout, parameters)
        if layout.pp > 1:
            passes = passing + summed.total
            return self._end(layout, parameters, held, held, passing, turned=NO_BYTES, passing_turned=passes)
        gone = min(self._activations.layer(layout, segment.kind).transient for segment in self._model.segments)
        turned = MemoryBytes(gradients=max(0.0, summed.total - gone))
        return self._end(layout, parameters, held, held, passing, turned=turned)

    def _table_gradient(self, layout: Layout) -> float:
        """The gradient of the embedding's table is a tensor of its own before it is added to the sum."""
        again = self._software.on_fsdp and layout.microbatches(self._job.global_batch) > 1
        return self._element_bytes * self._head_matrix(layout) if again else 0.0

    def head(self, layout: Layout) -> PartMemory:
        """Last norm, product and loss (`HeadMemory`)."""
        parameters = self.head_parameters(layout)
        held, weight, passing = self._head.bytes_of(layout)
        passing += self._root_reduction(layout) + self._last_gather(layout)
        passing = max(passing, passing_moments_bytes(self._job, parameters / layout.shards))
        first, turned = self._states.of_head(layout, parameters, self._head_matrix(layout))
        passes = self._states.summed(layout, parameters).total - turned.total
        return self._end(layout, parameters, held, weight, passing, first, turned, passes)

    def ends_standing(self, layout: Layout) -> tuple[PartMemory, PartMemory]:
        """Embedding and head without what they hold of microbatches and what passes; layouts share them as layers."""
        key = layout.but(schedule=self.schedule_like(layout))
        if key not in self._ends:
            if len(self._ends) >= _MOST_STANDING:
                self._ends.clear()
            parameters = self.embedding_parameters(key), self.head_parameters(key)
            self._ends[key] = (self._end(key, parameters[0]), self._end(key, parameters[1]))
        return self._ends[key]

    def _end(
        self,
        layout: Layout,
        parameters: float,
        held: MemoryBytes = NO_BYTES,
        held_weight: MemoryBytes = NO_BYTES,
        passing: float = 0.0,
        first: MemoryBytes = NO_BYTES,
        turned: MemoryBytes | None = None,
        passing_turned: float = 0.0,
    ) -> PartMemory:
        states = self._states
        state = states.of(layout, parameters, root=True)
        summed, shard = states.summed(layout, parameters), states.reduced(layout, parameters)
        gathered = state.gathered_weights
        return PartMemory(
            state=state,
            held=held,
            held_selective=held,
            held_recomputed=held,
            held_weight=held_weight,
            transient=passing,
            transient_selective=passing,
            transient_recomputed=passing,
            summed=summed,
            reduced=shard + states.freed(layout, state),
            first=first,
            turned=summed if turned is None else turned,
            passing_turned=passing_turned,
            at_root=summed,
            reducing=shard + self._end_reducing(layout, parameters, gathered),
            reduction=0.0 if states.sums_alone(layout) else states.reduction(layout, parameters, gathered),
        )

    def _end_reducing(self, layout: Layout, parameters: float, gathered: float) -> MemoryBytes:
        """What an end has besides its shard of gradients while a layer's are reduced: its weights are not gathered any
        more, or its gradients are in the first message with those of all layers."""
        if not self._states.sums_alone(layout):
            return MemoryBytes(gathered_weights=-gathered)
        layer = max(sum(self.block_parameters(layout, segment.kind)) for segment in self._model.segments)
        left = MESSAGE_BYTES - self._states.reduction(layout, layer, 0.0)
        return MemoryBytes(gradients=min(left, _FP32_BYTES * parameters))

    def _root_reduction(self, layout: Layout) -> float:
        """What went into FSDP2's last reduction of the microbatch before, that of embedding and head, in fp32."""
        if not self._software.on_fsdp or layout.microbatches(self._job.global_batch) == 1:
            return 0.0
        if not self._states.reduces_each_microbatch(layout):
            return 0.0
        return _FP32_BYTES * (self.embedding_parameters(layout) + self.head_parameters(layout))

    def _last_gather(self, layout: Layout) -> float:
        """The buffer that FSDP2 gathered the last layer into, which it keeps to the end of the forward it was for
        (torch 2.13, `all_gather_state`): every microbatch's under zero 3 without a pipeline, else the first's."""
        parameters = sum(self.block_parameters(layout, self._model.segments[-1].kind))
        every = layout.zero == 3 and layout.pp == 1 and self._software.on_fsdp and layout.shards > 1
        return self._element_bytes * parameters if every else self._gathered_once(layout, parameters)

    def _gathered_once(self, layout: Layout, parameters: float) -> float:
        """The same of these parameters in a step of one microbatch, whose forward is the fullest moment of some. Where
        the schedule gathers a chunk as a whole before its forward no buffer stays (torch 2.13, `UNSHARD`)."""
        once = layout.zero > 0 and layout.microbatches(self._job.global_batch) == 1
        once = once and (layout.pp == 1 or layout.schedule in BLOCKING)
        return self._element_bytes * parameters if once and self._software.on_fsdp and layout.shards > 1 else 0.0

    # ---- the rest --------------------------------------------------------------------------------------

    def boundary_bytes(self, layout: Layout) -> float:
        """One microbatch's activations between stages: the rank's share of the sequence, whole hidden width."""
        return self._element_bytes * outside_tokens(layout, self._job.sequence) * self._model.hidden_size

    def fixed(self, layout: Layout, rank: int, microbatches: int) -> MemoryBytes:
        """What a pipeline rank holds whatever its layers: context, communicators, receive buffers.

        torch's pipeline allocates a receive buffer for every microbatch at once: activations on every stage
        but the first, gradients on every stage but the last (torch 2.13, `_setup_forward_recv_info`). Others
        receive into a buffer or two.
        """
        stages = layout.pp * layout.virtual_stages
        boundary = self.boundary_bytes(layout) if layout.pp > 1 else 0.0
        directions = sum((stage > 0) + (stage < stages - 1) for stage in layout.stages_of(rank))
        buffers = microbatches if self._software.on_torch_pipeline else 2
        beside = self._beside_buffers(layout, rank, microbatches) if self._software.on_torch_pipeline else 0
        groups = sum(
            axis > 1 for axis in (layout.tp, layout.cp, layout.pp, layout.dp * layout.cp, layout.ep * layout.etp)
        )
        return MemoryBytes(
            pipeline_buffers=boundary * buffers * directions,
            activations=boundary * beside,
            transient=self._first_stage_passing(layout) if rank == 0 else 0.0,
            communicators=groups * self._hardware.communicator_bytes,
            context=self._hardware.context_bytes,
        )

    def _first_stage_passing(self, layout: Layout) -> float:
        """The first stage has no input's half: what `left_between` takes off its layers' backward passes there, as far
        as the table's gradient does not pass anyway."""
        if not (self._software.on_torch_pipeline and self._states.halves_apart(layout)):
            return 0.0
        most, table = 0.0, self._table_gradient(layout)
        for kind in {segment.kind for segment in self._model.segments}:
            kept, parameters = self._activations.layer(layout, kind), sum(self.block_parameters(layout, kind))
            whole = kept.transient + self._states.narrow_bytes * parameters
            most = max(most, min(kept.left_between, whole - table))
        return most

    def _beside_buffers(self, layout: Layout, rank: int, microbatches: int) -> int:
        """Activations of a stage boundary that torch's pipeline holds on a rank beside its receive buffers."""
        if layout.pp == 1:
            return 0
        # What a stage's first norm or recomputation keeps is a receive buffer, unless the norm widens it first.
        widens = self._activations.composite_norm and self._element_bytes != _FP32_BYTES
        pipeline, held = layout.pipeline(microbatches), layout.stages_of(rank)
        outputs = most_outputs(shortest(pipeline), rank, not widens)
        if not layout.splits_backward:
            return outputs
        # An input's half leaves the gradient of each input it was for until the step is over (torch 2.13,
        # `stage_backward_input`, `clear_runtime_states`).
        halves = input_halves(pipeline, rank)
        return outputs + sum(n for s, n in zip(held, halves, strict=True) if s > 0 and s - 1 not in held)

    # ---- parameters of one rank --------------------------------------------------------------------------

    def block_parameters(self, layout: Layout, kind: str = "dense") -> tuple[float, float]:
        """(those reduced over dp and cp, those of experts) of one layer on one rank."""
        model = self._model
        shapes = model.linear_shapes if kind == "dense" else model.attention_shapes
        total = 2.0 * model.norm_parameters + model.attention_extra_parameters
        for name in shapes:
            outputs, inputs = local_linear_shape(model, name, layout.tp)
            total += outputs * inputs + (outputs if model.has_bias(name) else 0)
        if kind == "dense":
            return total, 0.0
        experts = model.experts
        assert experts is not None
        total += experts.number * (model.hidden_size + (1 if experts.router_bias else 0))
        total += model.ffn_matrices * model.hidden_size * experts.shared_width / layout.tp
        own = sum(
            outputs * (inputs + experts.expert_bias) for outputs, inputs in expert_linear_shapes(model, layout.etp)
        )
        return total, own * experts.number / layout.ep

    def sums_alone(self, layout: Layout) -> bool:
        """Whether gradients are summed over the ranks that have the same weights without FSDP2."""
        return self._states.sums_alone(layout)

    def sent_together(self, layout: Layout) -> float:
        """A rank's share of all parameters if its pipeline held as many on each rank, where messages are of more than a
        part or of less: gradients summed without FSDP2, or in buckets of torch's DDP; else 0."""
        if self._software.shards != "of_tensors" and not self._states.sums_alone(layout):
            return 0.0
        blocks = sum(s.count * sum(self.block_parameters(layout, s.kind)) for s in self._model.segments)
        return (blocks + self.embedding_parameters(layout) + self.head_parameters(layout)) / layout.pp

    def embedding_parameters(self, layout: Layout) -> float:
        model = self._model
        rows = -(-model.vocab_size // layout.tp) + model.token_types
        rows += model.max_positions + model.position_offset if model.positions == "learned" else 0
        return rows * model.hidden_size + (model.norm_parameters if model.embedding_norm else 0)

    def head_parameters(self, layout: Layout) -> float:
        """A tied matrix lies in the embedding, but the last stage of a pipeline holds a copy of it."""
        model, matrix = self._model, self._head_matrix(layout)
        beside = model.head_parameters
        if model.output_bias:
            beside += -(-model.vocab_size // layout.tp) - model.vocab_size
        if model.tied_embeddings:
            return beside + (matrix if layout.pp > 1 else 0)
        return matrix + beside - model.vocab_size * model.hidden_size

    def _head_matrix(self, layout: Layout) -> int:
        return -(-self._model.vocab_size // layout.tp) * self._model.hidden_size
