"""Bytes of activations that a layer keeps for its backward, by recompute mode (after arXiv 2205.05198, section 4).

For s tokens, b sequences, width h, a heads in 16 bits the paper's layer without recomputation keeps
sbh(34 + 5as/h): what each term is and who keeps it depends on the trainer's kernels, so each is written here once.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiles.model import ModelSpec
from profiles.points import DTYPE_BYTES
from profiles.software import Software

from .backward_moments import BackwardMoment, KeptOfLayer, backward_moments
from .job import TrainingJob
from .layout import Layout
from .local_shapes import local_kv_width, local_linear_shape, local_tokens, outside_tokens, routed_tokens

_MASK_BYTES = 1
_FP32_BYTES = 4
_FORWARD_ORDER = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")


@dataclass(frozen=True)
class KeptBytes:
    """Of one layer and microbatch: `none`, `selective` and `full` by mode; `weight` between the two halves of a
    split backward; `heads` what goes into attention and comes out; `transient` while its backward runs.

    `unclaimed` is what selective recomputation keeps and does not ask for, so that it stays while all else comes back.
    `moments` are those of its backward, of a dense layer under FSDP2, where `transient` is of one.
    `last_input` and `output` are of the last product of its forward; sequence parallelism sums a rearranged copy.
    """

    none: float
    selective: float
    full: float
    weight: float
    heads: float
    transient: float
    unclaimed: float = 0.0
    moments: tuple[BackwardMoment, ...] = ()
    last_input: float = 0.0
    output: float = 0.0

    @property
    def left_between(self) -> float:
        """Of what passes in its backward the gradients that a split one leaves between its halves: there they are held,
        and that moment comes after each input's half."""
        return min(self.transient, self.weight - self.none)

    def in_forward(self, held: float) -> float:
        """The most while its forward runs, of which `held` stays: at its last product, where all else is gone that it
        recomputes."""
        return min(self.none, held + self.last_input) + self.output

    def passing(self, narrow_bytes: float) -> float:
        """The most that its backward has beyond what it keeps; gradients of weights wait in so many bytes each."""
        if not self.moments:
            return self.transient
        return max(one.passing - one.gone + narrow_bytes * one.weights for one in self.moments)


class ActivationModel:
    """Prices the activations of one model as one trainer keeps them."""

    def __init__(self, model: ModelSpec, job: TrainingJob, software: Software, composite_norm: bool) -> None:
        self._model, self._job, self._software = model, job, software
        self.element_bytes = DTYPE_BYTES["bf16" if job.precision == "fp8" else job.precision]
        self.composite_norm = composite_norm
        self._layers: dict[tuple[object, ...], KeptBytes] = {}

    def norm(self, layout: Layout) -> float:
        """A norm keeps its input, and its output for the products after it.

        DTensor gathers the output before it keeps it; Megatron keeps the share and gathers again (the paper's
        section 4.2.2). torch's CPU rms_norm is made of several operations: it keeps its input widened to fp32 and the
        normalised input, in fp32 too.
        """
        outside = outside_tokens(layout, self._job.sequence)
        inside = local_tokens(layout, self._job.sequence) if self._software.on_fsdp else outside
        kept = 2 * _FP32_BYTES if self.composite_norm else self.element_bytes
        return self._model.hidden_size * (kept * outside + self.element_bytes * inside)

    def layer(self, layout: Layout, kind: str) -> KeptBytes:
        key = (
            *(kind, layout.tp, layout.cp, layout.cp_style, layout.sequence_parallel, layout.micro_batch),
            *(layout.ep, layout.etp, layout.splits_backward),
        )
        if key not in self._layers:  # the state and the chunks have no say in it
            self._layers[key] = self._layer(layout, kind)
        return self._layers[key]

    def _layer(self, layout: Layout, kind: str) -> KeptBytes:
        model, software, e = self._model, self._software, self.element_bytes
        tokens, outside = (f(layout, self._job.sequence) for f in (local_tokens, outside_tokens))
        stream = e * outside * model.hidden_size
        norms = 2 * self.norm(layout)
        masks = 2 * _MASK_BYTES * outside * model.hidden_size if software.dropout else 0.0
        heads = self._heads(layout, tokens)
        scores = self._scores(layout)
        feed_forward, transient = self._feed_forward(layout, kind, tokens, outside)
        none = norms + masks + heads + scores + feed_forward
        unclaimed = 0.0
        if software.selective_keeps_matmuls:
            products, unclaimed = self._kept_products(layout, kind, tokens, outside)
            selective = stream + products
        else:
            selective = none - scores  # Megatron: core attention runs again
        if software.on_torch_pipeline and kind == "dense":
            weight = none + self._gradients_between(layout, tokens, outside)
        else:
            products = self._products(layout, kind, tokens, outside)
            weight = norms / 2 + feed_forward / 2 + e * tokens * model.attention_output_width / layout.tp + products
            weight = min(none, weight)
        moments: tuple[BackwardMoment, ...] = ()
        if software.on_torch_pipeline and kind == "dense" and model.latent_attention is None:
            parts = KeptOfLayer(none, feed_forward, norms / 2, heads, transient)
            moments = backward_moments(model, layout, tokens, outside, e, parts, self.composite_norm)
        output = stream + (2 * e * tokens * model.hidden_size if layout.sequence_parallel else 0.0)
        last = e * tokens * model.ffn_hidden_size / layout.tp if kind == "dense" else none
        return KeptBytes(none, selective, stream, weight, heads, transient, unclaimed, moments, last, output)

    def _gradients_between(self, layout: Layout, tokens: float, outside: float) -> float:
        """What torch's split backward holds of a layer besides all that it kept, from the input's half to the weights'.

        The first half runs with `retain_graph`, so nothing saved is freed. It leaves the gradient of the output of
        every operation that has a parameter: of each product, and of both norms (torch 2.13, `stage_backward_input`).
        """
        model = self._model
        widths = [local_linear_shape(model, name, layout.tp)[0] for name in model.linear_shapes]
        each = _FP32_BYTES if self.composite_norm else self.element_bytes
        return self.element_bytes * tokens * sum(widths) + 2 * each * outside * model.hidden_size

    def _heads(self, layout: Layout, tokens: float) -> float:
        """Queries, keys, values and the heads' outputs; of latent attention the latents and their norms besides.

        On torch the exchange of heads over cp leaves two outputs: attention keeps its own, the product after it the
        one that has come back.
        """
        model, twice = self._model, self._software.on_fsdp and layout.cp_style == "all-to-all"
        width = (model.query_width + model.attention_output_width * (1 + twice)) / layout.tp
        latent = model.latent_attention
        if latent is None:
            width += 2 * local_kv_width(model, layout.tp)
        else:
            width += model.heads * (latent.qk_head_dim + latent.v_head_dim) / layout.tp
            width += 2 * latent.norm_parameters
        return self.element_bytes * tokens * width

    def _scores(self, layout: Layout) -> float:
        """A chain of kernels keeps the softmax, and under dropout its mask and what it leaves; flash two rows."""
        heads = layout.micro_batch * self._model.heads / layout.tp
        rows = heads * self._job.sequence / layout.cp
        if self._software.attention not in ("unfused", "fused_softmax"):
            return _FP32_BYTES * rows if not self._software.on_fsdp else 0.0
        each = self.element_bytes + ((self.element_bytes + _MASK_BYTES) if self._software.dropout else 0)
        return rows * self._job.sequence * each

    def _feed_forward(self, layout: Layout, kind: str, tokens: float, outside: float) -> tuple[float, float]:
        """(kept, most at once in backward): what goes into the activation and what comes out of it."""
        model, e = self._model, self.element_bytes
        gated = model.ffn_matrices == 3
        kept = (3 if self._software.activation == "fused" else 4) if gated else 2
        if model.activation == "clamped_swiglu" and self._software.activation != "fused":
            kept += 3  # the clamped gate, its sigmoid, and the clamped input
        passing = 3 if gated else 2  # gradients of product, gate and up at once
        if kind == "dense":
            width = tokens * model.ffn_hidden_size / layout.tp
            return e * kept * width, e * passing * width
        experts = model.experts
        assert experts is not None
        routed = routed_tokens(layout, model, self._job)
        width = routed * experts.ffn_hidden_size / layout.etp + tokens * experts.shared_width / layout.tp
        sorted_rows = (routed + outside * experts.top_k) * model.hidden_size  # sent to the experts, and come back
        scores = 2 * _FP32_BYTES * outside * experts.number
        # Within etp each rank's rows come from all of it: on the way back they are there in the order of experts, and
        # as they are sent.
        sent_back = ((layout.ep > 1) + 1) * routed * model.hidden_size if layout.etp > 1 else 0.0
        return e * (kept * width + sorted_rows) + scores, e * (passing * width + sent_back)

    def _kept_products(self, layout: Layout, kind: str, tokens: float, outside: float) -> tuple[float, float]:
        """(what selective recomputation keeps of attention and products, what of it nothing asks for again).

        Our own keeps attention's output, all products, and what tp sums of two of them. torchtitan's keeps of the
        products in the order of the forward (queries, keys, values, output, up, gate, down) the first, third and so on
        (pytorch/torchtitan, `_custom_policy`: all but every second mm). Of latent attention and of experts, all
        products. The recomputation ends where it has all that the backward needs, which is before the last product,
        unless a norm follows it.
        """
        model, e = self._model, self.element_bytes
        if kind != "dense" or model.latent_attention is not None:
            return self._heads(layout, tokens) + self._products(layout, kind, tokens, outside), 0.0
        names = sorted(model.linear_shapes, key=_FORWARD_ORDER.index)
        kept = names[::2] if self._software.selective == "keep_half_matmuls" else names
        widths = [local_linear_shape(model, name, layout.tp)[0] for name in kept]
        products = e * tokens * (model.attention_output_width / layout.tp + sum(widths))
        last = e * tokens * model.hidden_size if names[-1] in kept else 0.0
        summed = e * outside * model.hidden_size if kept == names and layout.tp > 1 else 0.0
        unclaimed = last + summed if model.norm_placement == "pre" else 0.0
        return products + 2 * summed, unclaimed

    def _products(self, layout: Layout, kind: str, tokens: float, outside: float) -> float:
        """Outputs of the products outside of attention: of the output projection, and of the feed-forward."""
        model, e = self._model, self.element_bytes
        outputs = float(model.hidden_size)
        if kind == "dense":
            names = [name for name in model.linear_shapes if name not in model.attention_shapes]
            outputs += sum(local_linear_shape(model, name, layout.tp)[0] for name in names)
            return e * tokens * outputs
        experts = model.experts
        assert experts is not None
        routed = routed_tokens(layout, model, self._job)
        up = model.ffn_matrices - 1
        width = routed * (up * experts.ffn_hidden_size / layout.etp + model.hidden_size)
        width += tokens * (up * experts.shared_width / layout.tp + (model.hidden_size if experts.shared else 0))
        return e * (tokens * outputs + width) + _FP32_BYTES * outside * experts.number
