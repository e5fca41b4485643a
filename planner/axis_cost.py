"""Seconds of what the axes inside a layer send: tp around its products, cp around its attention, ep around experts.

Per microbatch, as (forward, backward, recomputation) of each part. tp and ep wait for their collectives; cp's ring
passes keys and values on while the attention of the ones before runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import DTYPE_BYTES
from profiles.software import Software

from .comm_cost import CommModel, Group
from .compute_cost import ComputeCost
from .compute_seconds import ComputeSeconds
from .job import TrainingJob
from .layout import Layout
from .local_shapes import attended_width, cut_shares, local_tokens, loss_pieces, outside_tokens, predicted_by_head

_FP32_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class Passes:
    """Seconds of one axis in the forward, the backward and each recomputation of a part."""

    forward: float = 0.0
    backward: float = 0.0
    selective: float = 0.0
    full: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.selective + other.selective,
            self.full + other.full,
        )


class AxisModel:
    """Prices tp, cp and ep of one model as one trainer runs them."""

    def __init__(
        self, model: ModelSpec, hardware: HardwareProfile, comm: CommModel, job: TrainingJob, software: Software
    ) -> None:
        self._model, self._hardware, self._comm = model, hardware, comm
        self._job, self._software = job, software
        self._cut = {segment.kind: cut_shares(model, segment.kind) for segment in model.segments}
        self._element_bytes = DTYPE_BYTES["bf16" if job.precision == "fp8" else job.precision]

    def _wait(self, compute: ComputeSeconds, meetings: int) -> float:
        """For the slowest rank, each of so many times in a pass of a block."""
        return self._hardware.wait_seconds(compute.total / meetings)

    # ---- tp --------------------------------------------------------------------------------------------

    def _whole_bytes(self, layout: Layout) -> float:
        return self._element_bytes * local_tokens(layout, self._job.sequence) * self._model.hidden_size

    def _tp(self, operation: str, layout: Layout, size_bytes: float) -> float:
        seconds = self._comm.collective_seconds(operation, Group(layout.tp, 1), size_bytes)
        return seconds * self._hardware.correction("tp")

    def block_tp(self, layout: Layout, compute: ComputeCost, kind: str) -> Passes:
        """Attention and feed-forward each: all-reduce once a pass, or all-gather in and reduce-scatter out with SP.

        In each the ranks meet after half of the block's compute and wait for the slowest.
        Recomputation as needed leaves out the sum that ends the feed-forward, unless a norm follows, which reads it.
        Routed experts take the sequence as it lies; only shared ones are cut over tp as a dense feed-forward is.
        """
        if layout.tp == 1:
            return Passes()
        there, back = self._wait(compute.forward, 2), self._wait(compute.backward, 2)
        size, shared = self._whole_bytes(layout), self._model.experts is not None and bool(self._model.experts.shared)
        halves = 2 if kind == "dense" or shared else 1
        sums_again = halves - (self._software.recomputed == "as_needed" and self._model.norm_placement == "pre")
        if not layout.sequence_parallel:
            reduce = self._tp("all_reduce", layout, size)
            again = sums_again * (reduce + there)
            sums = Passes(halves * (reduce + there), halves * (reduce + back), 0.0, again)
            return self._behind_host(self._overlapped(sums, compute, kind), compute, halves)
        gather, scatter = (self._tp(operation, layout, size) for operation in ("all_gather", "reduce_scatter"))
        # Megatron keeps the sequence's share of each input and gathers it again for the weights' gradient, behind
        # the input's (arXiv 2205.05198, section 4.2.2).
        again = halves * gather + sums_again * (scatter + there)
        selective = halves * gather if self._software.selective_keeps_matmuls else 0.0
        one_way = halves * (gather + scatter)
        if self._software.tp_overlap == "own_shard":
            passes = self._beside_own_shard(layout, halves * gather, halves * scatter, compute, kind)
        elif self._software.tp_overlap == "input_gradient":
            backward = self._beside_weights(halves * gather, halves * scatter, compute, kind) + halves * back
            passes = Passes(one_way + halves * there, backward, selective, again)
        else:
            passes = Passes(one_way + halves * there, one_way + halves * back, selective, again)
            passes = self._overlapped(passes, compute, kind)
        return self._behind_host(passes, compute, 2 * halves)

    def _behind_host(self, passes: Passes, compute: ComputeCost, calls: int) -> Passes:
        """Where the host issues a pass slower than the device runs it, collectives fall into the device's idle time,
        and `calls` of them are operations more that the host issues."""
        issue = calls * self._hardware.host_operation_seconds

        def beyond(sent: float, idle: float) -> float:
            return max(sent - idle, min(sent, issue)) if idle else sent

        there, back = compute.forward.idle, compute.backward.idle
        return Passes(
            beyond(passes.forward, there),
            beyond(passes.backward, back),
            beyond(passes.selective, compute.selective.idle),
            beyond(passes.full, there + compute.checkpoint.idle),
        )

    def _beside_own_shard(
        self, layout: Layout, gather: float, scatter: float, compute: ComputeCost, kind: str
    ) -> Passes:
        """Gathers of inputs and of output gradients run beside the product of the rank's own share, 1/tp of it.

        Inputs are gathered for the products cut by columns, and again beside their input's gradient; the sums run
        beside their weights' gradient. Output gradients are gathered for those cut by rows, wo and w2, whose own sums
        in the forward stand alone (nanotron's tensor_parallel/functional.py).
        """
        exposed, (by_columns, by_rows) = self._hardware.exposed_seconds, self._cut[kind]
        own = 1.0 / layout.tp
        forward = exposed(gather, compute.forward.gemm * by_columns * own) + scatter
        backward = exposed(gather, compute.backward_input.gemm * by_rows * own)
        backward += exposed(gather, compute.backward_input.gemm * by_columns)
        backward += exposed(scatter, compute.backward_weight.gemm * by_columns)
        return Passes(forward, backward, 0.0, forward)

    def _beside_weights(self, gather: float, scatter: float, compute: ComputeCost, kind: str) -> float:
        """Seconds of a backward whose input's gradients are summed beside the weights'.

        Output gradients are gathered for the products cut by rows, behind nothing; inputs again beside their gradient
        (NVIDIA/Megatron-LM, core/tensor_parallel/layers.py and mappings.py).
        """
        exposed, by_columns = self._hardware.exposed_seconds, self._cut[kind][0]
        again = exposed(gather, compute.backward_input.gemm * by_columns)
        return gather + again + exposed(scatter, compute.backward_weight.gemm * by_columns)

    def _overlapped(self, passes: Passes, compute: ComputeCost, kind: str) -> Passes:
        """With tp overlap the pieces of a collective hide behind the product that they belong to.

        What goes with the input's gradient hides behind that of the same weights, which waits for nothing (arXiv
        2205.05198, section 4.2.2).
        """
        exposed = self._hardware.exposed_seconds
        if self._software.tp_overlap == "none":
            return passes
        if self._software.tp_overlap == "input_gradient":
            backward = exposed(passes.backward, compute.backward_weight.gemm * self._cut[kind][0])
            return Passes(passes.forward, backward, passes.selective, passes.full)
        return Passes(
            exposed(passes.forward, compute.forward.gemm),
            exposed(passes.backward, compute.backward.gemm),
            passes.selective,
            exposed(passes.full, compute.forward.gemm),
        )

    def embedding_tp(self, layout: Layout) -> Passes:
        """The vocabulary-parallel lookup is summed over tp; with SP its gradient is gathered."""
        size = self._whole_bytes(layout)
        if layout.sequence_parallel:
            return Passes(self._tp("reduce_scatter", layout, size), self._tp("all_gather", layout, size))
        return Passes(self._tp("all_reduce", layout, size))

    def head_tp(self, layout: Layout) -> Passes:
        """Input gathered (SP) or its gradient summed, and what the ranks tell each other for the loss.

        Three reductions of one number a token (maximum, sum, the target's logit; arXiv 1909.08053, section 3). In
        pieces one gather a piece, of the logarithm of each rank's sum for each token.
        """
        size = self._whole_bytes(layout)
        tokens = predicted_by_head(layout, self._model, self._job.sequence, self._software)
        if self._software.loss_in_pieces:
            loss = sum(
                number * self._tp("all_gather", layout, _FP32_BYTES * layout.tp * rows)
                for rows, number in loss_pieces(tokens)
            )
        else:
            loss = 3 * self._tp("all_reduce", layout, _FP32_BYTES * tokens)
        if layout.sequence_parallel:
            forward = self._tp("all_gather", layout, size)
            return Passes(forward + loss, self._tp("reduce_scatter", layout, size))
        return Passes(loss, self._tp("all_reduce", layout, size))

    # ---- cp --------------------------------------------------------------------------------------------

    def block_cp(self, layout: Layout, compute: ComputeCost) -> Passes:
        """Ring: cp - 1 exchanges of keys and values (and of their gradients), each behind one step's attention.

        All-to-all (arXiv 2309.14509): queries, keys, values in, outputs out, and their gradients back; the ranks meet
        before attention and after it.
        """
        if layout.cp == 1:
            return Passes()
        model, group = self._model, Group(layout.cp, layout.tp)
        tokens = self._element_bytes * local_tokens(layout, self._job.sequence)
        keys_values = tokens * attended_width(model, layout.tp)
        if layout.cp_style == "ring":
            return self._ring(layout, group, keys_values, compute)
        queries = tokens * model.query_width / layout.tp
        outputs = tokens * model.attention_output_width / layout.tp
        sent = sum(self._comm.collective_seconds("all_to_all", group, s) for s in (queries, keys_values, outputs))
        forward, backward = sent + 2 * self._wait(compute.forward, 2), sent + 2 * self._wait(compute.backward, 2)
        return Passes(forward, backward, forward, forward)

    def _ring(self, layout: Layout, group: Group, keys_values: float, compute: ComputeCost) -> Passes:
        """Our own starts its backward with the keys that the rank holds: the gradients of others set out a step later
        than their keys, are alone in the last step, and come home behind nothing ([Note: Ring] in
        runtime/ring_attention.py). Its selective recomputation keeps what comes of the ring."""
        one, both = (self._comm.neighbour_seconds(group, times * keys_values) for times in (1, 2))
        exposed, steps = self._hardware.exposed_seconds, layout.cp - 1
        there, back = compute.forward.attention / layout.cp, compute.backward.attention / layout.cp
        forward = steps * exposed(one, there) + self._wait(compute.forward, 1)
        if not self._software.own_context_parallelism:
            return Passes(forward, steps * exposed(both, back), forward, forward)
        alone = 1 if layout.cp == 2 else 3  # keys in the first two steps, gradients in the last
        backward = alone * exposed(one, back) + max(0, layout.cp - 3) * exposed(both, back) + one
        backward += self._wait(compute.backward, 1)
        return Passes(forward, backward, 0.0, forward)

    # ---- ep --------------------------------------------------------------------------------------------

    def block_ep(self, layout: Layout, compute: ComputeCost) -> Passes:
        """Tokens to their experts and back, two all-to-alls each way; with etp gathered and summed over it besides.

        The rank whose experts are asked for most receives `expert_imbalance` times its share. The ranks meet before
        the experts and after them.
        """
        experts = self._model.experts
        if experts is None or layout.ep * layout.etp == 1:
            return Passes()
        fullest = self._job.expert_capacity or self._job.expert_imbalance
        rows = outside_tokens(layout, self._job.sequence) * experts.top_k * fullest
        size = self._element_bytes * rows * self._model.hidden_size
        each = self._comm.collective_seconds("all_to_all", Group(layout.ep, layout.etp), size)
        one_way = 2 * each
        if layout.etp > 1:
            inner = Group(layout.etp, 1)
            for operation in ("all_gather", "reduce_scatter"):
                one_way += self._comm.collective_seconds(operation, inner, layout.etp * size)
        forward, backward = one_way + 2 * self._wait(compute.forward, 2), one_way + 2 * self._wait(compute.backward, 2)
        return Passes(forward, backward, forward if self._software.selective_keeps_matmuls else 0.0, forward)
