"""Seconds of compute: a layer, its experts, the embedding and the head, of the kernels in kernel_cost.py."""

from __future__ import annotations

from collections.abc import Callable

from profiles.experts_spec import Experts
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import CHECKPOINT_OPERATIONS, DTYPE_BYTES, FORK_OPERATIONS, FUNCTION_OPERATIONS, HOST_OPERATIONS
from profiles.software import Software

from .attention_chain import chain_attention
from .compute_seconds import NO_SECONDS, ComputeCost, ComputeSeconds
from .context_seconds import context_work
from .job import TrainingJob
from .kernel_cost import Kernels
from .layout import Layout
from .local_shapes import (
    attended_width,
    expert_linear_shapes,
    local_kv_width,
    local_linear_shape,
    local_tokens,
    loss_pieces,
    outside_tokens,
    predicted_by_head,
    routed_tokens,
)
from .overflow_cost import overflow_seconds
from .packed_cost import attended_documents, document_work


class ComputeModel(Kernels):
    """Prices the parts of one model as one trainer runs them on one device."""

    def __init__(self, model: ModelSpec, hardware: HardwareProfile, job: TrainingJob, software: Software) -> None:
        super().__init__(model, hardware, job, software)
        self._beside: dict[tuple[object, ...], ComputeCost] = {}
        self._around_experts: dict[tuple[object, ...], ComputeCost] = {}
        self._routed: dict[tuple[object, ...], ComputeCost] = {}

    # ---- attention -------------------------------------------------------------------------------------

    def _attention(self, layout: Layout) -> ComputeCost:
        """Scores, softmax and weighted sum of the rank's heads; cp cuts the work, whole sequences count.

        A flash kernel computes the causal half, of each document alone where they are packed; a chain of kernels the
        whole square, which passes through memory.
        """
        model, sequence = self._model, self._job.sequence
        heads, dim = model.heads // layout.tp, (model.head_dim + model.value_head_dim) / 2
        if self._software.attention in ("unfused", "fused_softmax"):
            shape = (layout.micro_batch * heads, sequence, round(dim))
            cost = chain_attention(self._hardware, self._software, self._dtype, self._memory, *shape) * (1 / layout.cp)
        else:
            number, length = attended_documents(layout, self._job)
            share = model.attended_share(length) / layout.cp
            if self._software.cp_shards == "contiguous":
                share *= 2 - 1 / layout.cp  # the last of cp pieces attends to all before it and half of itself
            shape = (self._dtype, number, heads, length, dim, self._software.attention)
            seconds, (there, back) = self._hardware.attention_seconds, HOST_OPERATIONS["flash"]
            cost = ComputeCost(
                ComputeSeconds(attention=seconds("forward", *shape) * share, operations=there),
                ComputeSeconds(attention=seconds("backward", *shape) * share, operations=back),
            )
        if self._keeps_matmuls:
            return cost + self._repeated_heads(layout)
        return ComputeCost(cost.forward, cost.backward_input, cost.backward_weight, cost.forward)

    def _repeated_heads(self, layout: Layout) -> ComputeCost:
        """Copies of keys and values for every query head, and the sums of their gradients."""
        model = self._model
        if self._software.grouped_heads == "native" or model.kv_heads == model.heads:
            return ComputeCost()
        return self._memory("copy", 2 * local_tokens(layout, self._job.sequence) * model.query_width / layout.tp)

    def _heads(self, layout: Layout) -> ComputeCost:
        """What brings queries, keys and values into the form that attention takes, and its outputs back.

        Batched products of four-dimensional views want copies of all three (torch.matmul); where the three come of
        one matrix, their gradients are joined.
        """
        query = local_tokens(layout, self._job.sequence) * self._model.query_width / layout.tp
        if self._software.heads_layout == "sequence_first":
            return self._heads_from_sequence_first(layout, query)
        cost = self._memory("copy", query)
        if self._software.attention == "unfused":
            cost = cost + self._memory("copy", 3 * query)
        if not self._software.separate_projections:
            there, back = HOST_OPERATIONS["joined"]
            cost = cost + ComputeCost(ComputeSeconds(operations=there), ComputeSeconds(operations=back))
        if self._software.attention in ("unfused", "fused_softmax"):
            joined = self._hardware.memory_seconds("copy", self._dtype, 3 * query, "backward")
            cost = cost + ComputeCost(backward_input=ComputeSeconds(memory=joined))
        return cost

    # ---- parts of the model ----------------------------------------------------------------------------

    def block(self, layout: Layout, kind: str = "dense") -> ComputeCost:
        """Norm, attention, norm, feed-forward and two residual sums of one layer, weights cut by tp."""
        model, tokens = self._model, local_tokens(layout, self._job.sequence)
        parts = [self._beside_feed_forward(layout)]
        if kind == "dense":
            shapes = self._products(layout)
            parts += [self._biased(n, tokens, shape) for n, shape in shapes.items() if n not in model.attention_shapes]
            parts.append(self._activation(tokens * model.ffn_hidden_size / layout.tp))
            parts.append(self._meeting_gradients({"w1", "w3"}, tokens * model.hidden_size))
            parts.append(self._moved_along_sequence(layout))
        else:
            assert model.experts is not None
            parts += self._experts(layout, model.experts)
        return _total(parts).issued(self._hardware, self._software.compiled)

    def _beside_feed_forward(self, layout: Layout) -> ComputeCost:
        """All of a layer but its feed-forward, which alone depends on ep and etp."""
        return _kept(self._beside, _outside_experts(layout), lambda: _total(self._attention_and_norms(layout)))

    def _attention_and_norms(self, layout: Layout) -> list[ComputeCost]:
        model, tokens = self._model, local_tokens(layout, self._job.sequence)
        outside = outside_tokens(layout, self._job.sequence)
        hidden, query = outside * model.hidden_size, tokens * model.query_width / layout.tp
        shapes = self._products(layout)
        parts = [self._biased(name, tokens, shapes[name]) for name in shapes if name in model.attention_shapes]
        parts += [self._norm(hidden), self._norm(hidden), self._moved_along_sequence(layout)]
        if model.qk_norm:
            parts.append(self._norm(query + tokens * local_kv_width(model, layout.tp)))
        if model.latent_attention is not None:
            parts.append(self._norm(tokens * model.latent_attention.norm_parameters))
        if model.positions == "rope":
            parts.append(self._rope(query * model.rotary_share))
            parts.append(self._rope(tokens * local_kv_width(model, layout.tp) * model.rotary_share))
        parts += [self._attention(layout), self._heads(layout)]
        if self._software.mpu_layers:
            there, back, fork, checkpoint = (
                ComputeSeconds(operations=n) for n in (*FUNCTION_OPERATIONS, FORK_OPERATIONS, CHECKPOINT_OPERATIONS)
            )
            parts.append(ComputeCost(there + fork, back, selective=fork, checkpoint=checkpoint))
        keys_values, outputs = attended_width(model, layout.tp), tokens * model.attention_output_width / layout.tp
        moved = (query, tokens * keys_values, outputs)
        if self._job.document_length is not None:
            parts.append(document_work(layout, self._job, self._hardware, self._once, *moved, dtype=self._dtype))
        if layout.cp > 1 and self._software.own_context_parallelism:
            parts.append(context_work(layout, self._once, *moved))
        parts += [self._residual(hidden), self._residual(hidden)]
        parts.append(self._meeting_gradients({"wq", "wk", "wv"}, tokens * model.hidden_size))
        if layout.tp > 1:
            moved = [tokens * (outputs + inputs) + outputs * inputs for outputs, inputs in shapes.values()]
            touched = DTYPE_BYTES[self._dtype] * sum(moved) / len(moved)
            shard = ComputeSeconds(overhead=self._hardware.shard_seconds(layout.sequence_parallel, touched))
            parts.append(ComputeCost(shard, shard))
        return parts

    def _heads_from_sequence_first(self, layout: Layout, query: float) -> ComputeCost:
        """All of them brought batch first, keys and values joined and brought side by side, outputs back.

        Gradients go the same way: keys' and values' are joined, all three stacked and brought sequence first, the
        outputs copied for the weights' gradient and theirs for attention (nanotron's models/llama.py).
        """
        keys_values = local_tokens(layout, self._job.sequence) * local_kv_width(self._model, layout.tp) * 2
        there = query + 3 * keys_values + query
        back = 2 * (query + keys_values) + keys_values + 2 * query
        moved = (self._memory("copy", elements) for elements in (there, back))
        forward, backward = next(moved).forward, next(moved).backward_input
        return ComputeCost(forward, backward)

    def _products(self, layout: Layout) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each product of a dense layer on one rank.

        Where the weights of queries, keys and values are one matrix, and those of gate and input, so is the product.
        """
        shapes = {name: local_linear_shape(self._model, name, layout.tp) for name in self._model.linear_shapes}
        if not self._software.separate_projections:
            for first, *others in (("wq", "wk", "wv"), ("w1", "w3")):
                if first in shapes:
                    outputs, inputs = shapes[first]
                    joined = outputs + sum(shapes.pop(name)[0] for name in others if name in shapes)
                    shapes[first] = joined, inputs
        return shapes

    def _experts(self, layout: Layout, experts: Experts) -> list[ComputeCost]:
        """Router, tokens to their experts, the rank's experts on what is sent to them, the way back, shared experts."""
        routed = routed_tokens(layout, self._model, self._job)
        here = (layout.ep, layout.etp, routed)
        parts = [
            _kept(self._around_experts, _outside_experts(layout), lambda: self._routing(layout, experts)),
            _kept(self._routed, here, lambda: self._routed_experts(layout, experts, routed)),
        ]
        for degree in (layout.ep, layout.etp):
            if degree > 1:
                sorted_anew = self._memory("permute", routed * self._model.hidden_size)
                parts.append((sorted_anew + sorted_anew).issuing(*HOST_OPERATIONS["exchange"]))
        return parts

    def _routing(self, layout: Layout, experts: Experts) -> ComputeCost:
        """All but the routed experts and what ep and etp move."""
        tokens, outside = (f(layout, self._job.sequence) for f in (local_tokens, outside_tokens))
        model, hidden = self._model, self._model.hidden_size
        routing = [
            self._linear(outside, experts.number, hidden),
            self._memory("softmax", outside * experts.number),
        ]
        moved = [self._memory(way, outside * experts.top_k * hidden) for way in ("permute", "unpermute")]
        parts = [
            _total(routing).issuing(*HOST_OPERATIONS["router"]),
            _total(moved).issuing(*HOST_OPERATIONS["permute"]),
            self._added(1 + (experts.shared > 0), outside * hidden),  # router, experts and shared ones read the same
        ]
        if experts.shared:
            width = experts.shared_width // layout.tp
            shapes = [(width, hidden)] * (model.ffn_matrices - 1) + [(hidden, width)]
            parts += [self._linear(tokens, *shape) for shape in shapes]
            parts.append(self._activation(tokens * width))
            parts.append(self._memory("residual", outside * hidden))
            parts.append(self._moved_along_sequence(layout))
        return _total(parts)

    def _moved_along_sequence(self, layout: Layout) -> ComputeCost:
        """Copies of a gather in and a scatter out under sequence parallelism, and of their backwards.

        Collectives join and split along the first dimension; DTensor brings what lies along the sequence there and back
        in a copy of the whole, which a gathered single sequence does not need (torch 2.13, `all_gather_single`,
        `reduce_scatter_single`). That the host issues them is in what DTensor was measured to take. Selective
        recomputation gathers again.
        """
        if layout.tp == 1 or not (layout.sequence_parallel and self._software.on_fsdp):
            return ComputeCost()
        elements = local_tokens(layout, self._job.sequence) * self._model.hidden_size
        scattered = ComputeSeconds(memory=self._hardware.memory_seconds("copy", self._dtype, elements))
        gathered = scattered if layout.micro_batch > 1 else NO_SECONDS
        each_way = gathered + scattered
        return ComputeCost(each_way, each_way, selective=gathered if self._keeps_matmuls else NO_SECONDS)

    def _routed_experts(self, layout: Layout, experts: Experts, routed: float) -> ComputeCost:
        """The rank's experts on the rows that the busiest rank of a group sees: one grouped product, or a loop."""
        local = experts.number // layout.ep
        shapes = expert_linear_shapes(self._model, layout.etp)
        parts = [self._linear(routed / local, outputs, inputs, local) for outputs, inputs in shapes]
        parts.append(self._activation(routed * experts.ffn_hidden_size / layout.etp))
        parts.append(self._meeting_gradients({"w1", "w3"}, routed * self._model.hidden_size))
        if self._hardware.operation_overhead_seconds == 0.0:
            return _total(parts)
        # A loop joins its outputs, and backward the gradients of its rows and of its stacked weights.
        parts.append(self._memory("copy", routed * self._model.hidden_size))
        stacked = self._memory("copy", local * sum(outputs * inputs for outputs, inputs in shapes))
        parts.append(ComputeCost(backward_weight=stacked.backward_input))
        around, each = HOST_OPERATIONS["experts"], HOST_OPERATIONS["expert"]
        return _total(parts).issuing(*(once + local * one for once, one in zip(around, each, strict=True)))

    def embedding(self, layout: Layout) -> ComputeCost:
        model, tokens = self._model, local_tokens(layout, self._job.sequence)
        parts = [self._memory("embedding", tokens * model.hidden_size)]
        for _ in range((model.positions == "learned") + (model.token_types > 0)):
            parts.append(self._memory("residual", tokens * model.hidden_size))
        if model.embedding_norm:
            parts.append(self._norm(outside_tokens(layout, self._job.sequence) * model.hidden_size))
        if self._software.dropout:
            parts.append(self._memory("dropout", outside_tokens(layout, self._job.sequence) * model.hidden_size))
        return _total(parts)

    def head(self, layout: Layout) -> ComputeCost:
        """Last norm, the tokens that are predicted, output matrix cut over the vocabulary, cross-entropy in fp32."""
        model, sequence = self._model, self._job.sequence
        tokens = predicted_by_head(layout, model, sequence, self._software)
        rows, hidden = -(-model.vocab_size // layout.tp), tokens * model.hidden_size
        stream = outside_tokens(layout, sequence) * model.hidden_size
        parts = [self._norm(stream)] if model.norm_placement == "pre" else []
        if tokens < local_tokens(layout, sequence):
            parts.append(self._memory("embedding", hidden))  # the same work: rows looked up, their gradients added
        if model.output_transform:
            parts.append(self._linear(tokens, model.hidden_size, model.hidden_size))
            parts += [self._activation(hidden), self._norm(hidden)]
        if self._software.loss_in_pieces:
            parts.append(self._loss_in_pieces(layout, tokens, rows))
        else:
            kernels = {"eager": "cross_entropy"}
            loss = kernels.get(self._software.cross_entropy, f"cross_entropy_{self._software.cross_entropy}")
            parts += [self._logits(tokens, rows), self._memory(loss, tokens * rows)]
        if self._software.loss_metrics:  # cross-entropy and perplexity
            parts += [self._memory("loss_metric", tokens * rows)] * 2
        return _total(parts)

    def _logits(self, tokens: float, rows: int) -> ComputeCost:
        """The last product, which trainers in fp8 keep as it was."""
        product = self._linear(tokens, rows, self._model.hidden_size, dtype=self._dtype)
        return product + self._bias_gradient(tokens * rows) if self._model.output_bias else product

    def _loss_in_pieces(self, layout: Layout, tokens: float, rows: int) -> ComputeCost:
        """Product, loss and gradients of one piece after the other, all in the forward pass ([Note: Loss in pieces]).

        The kernels cross memory as often as those of torch's cross-entropy: cast and log-softmax; exponential, quotient
        and cast. Where the logits are computed again the backward has the gradients, after the product and a
        difference, which is as long as the loss. Of several pieces in 16 bits the weight's gradient is summed in fp32,
        widened and narrowed once; in fp32 the product itself adds up.
        """
        hidden, pieces = self._model.hidden_size, loss_pieces(tokens)
        loss = "cross_entropy_fused" if self._software.compiled else "cross_entropy"
        whole = ComputeCost()
        for size, number in pieces:
            once = self._logits(size, rows) + self._memory(loss, size * rows)
            whole = whole + once.repeated(number)
        weight_sum = ComputeSeconds()
        if (again := sum(number for _, number in pieces) - 1) and self._dtype != "fp32":
            width = self._hardware.memory_seconds("cast", self._state_dtype, rows * hidden)
            weight_sum = ComputeSeconds(memory=again * self.accumulate_seconds(rows * hidden) + 2 * width)
        loss, gradients = whole.forward, whole.backward + weight_sum
        if layout.logits_again(layout.microbatches(self._job.global_batch)):
            return ComputeCost(loss, loss + gradients)
        return ComputeCost(loss + gradients)

    def microbatch(self) -> ComputeCost:
        """What a microbatch costs a rank besides the kernels: starting a forward and a backward."""
        overhead = ComputeSeconds(overhead=self._hardware.microbatch_overhead_seconds)
        return ComputeCost(overhead, overhead)

    # ---- state -----------------------------------------------------------------------------------------

    def accumulate_seconds(self, parameters: float) -> float:
        """Adding one microbatch's gradient to the sum in a kernel of its own, in fp32."""
        if self._software.accumulation == "fused":
            return 0.0
        return self._hardware.memory_seconds("accumulate", self._state_dtype, parameters)

    def optimizer_seconds(self, parameters: float, tensors: int, summed: float = 0.0) -> float:
        """Norm, clipping and AdamW over the parameters whose state this rank holds, in `tensors` tensors; buffers for
        the gradients of `summed` are filled with zeros where the first is added to them."""
        norm = self._hardware.memory_seconds("gradient_norm", self._state_dtype, parameters)
        adamw = "adamw_eager" if self._software.optimizer == "eager" else "adamw"
        update = self._hardware.memory_seconds(adamw, self._state_dtype, parameters)
        casts = self._master_casts and self._hardware.memory_seconds("cast", self._state_dtype, parameters)
        casts *= self._master_casts  # 16-bit gradients to the master copy's width, and its weights back
        zeros = 0.0
        if self._software.adds_first_gradient and summed:
            zeros = self._hardware.memory_seconds("zero", self._state_dtype, summed)
        return norm + update + casts + zeros + tensors * self._hardware.parameter_overhead_seconds

    def overflow_seconds(self, parameters: float, tensors: int) -> float:
        """Looking whether fp16's gradients are finite; other precisions have no loss scale."""
        if self._gemm_dtype != "fp16":
            return 0.0
        return overflow_seconds(self._hardware, self._software, self._state_dtype, parameters, tensors)

    def copy_seconds(self, parameters: float) -> float:
        """Reading and writing each parameter once, as gradients are packed: a part of dp, and corrected as dp is."""
        return self._of_dp("copy", parameters)

    def cast_seconds(self, parameters: float) -> float:
        """Narrowing or widening each parameter once: a part of dp too."""
        return self._of_dp("cast", parameters)

    def _of_dp(self, operation: str, parameters: float) -> float:
        seconds = self._hardware.memory_seconds(operation, self._state_dtype, parameters)
        return seconds / self._hardware.correction("memory")

    @property
    def _state_dtype(self) -> str:
        """fp32 where it was measured or modelled; else the compute dtype's points are the nearest fact."""
        return "fp32" if self._hardware.knows_memory("fp32") else self._dtype


def _outside_experts(layout: Layout) -> tuple[object, ...]:
    """What a layer depends on but for its routed experts."""
    return layout.tp, layout.cp, layout.cp_style, layout.sequence_parallel, layout.micro_batch


def _kept(
    found: dict[tuple[object, ...], ComputeCost], key: tuple[object, ...], price: Callable[[], ComputeCost]
) -> ComputeCost:
    """What was found before, or its price from now on."""
    if key not in found:
        found[key] = price()
    return found[key]


def _total(parts: list[ComputeCost]) -> ComputeCost:
    return sum(parts[1:], parts[0])
