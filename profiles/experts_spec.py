"""Experts: the feed-forward part of a mixture-of-experts layer, its parameters in all and per token."""

from __future__ import annotations

from dataclasses import dataclass

from .store import Reader

ROUTER_SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """`number` routed experts of which a token takes `top_k`, beside `shared` ones that every token takes.

    The first `dense_layers` layers of the model have the dense feed-forward instead, and of those that follow all but
    each `every`-th: with dense_layers=1 and every=2 layers 2, 4, 6, ... (from 0) have experts.

    The router scores each expert. With `groups` a token takes its experts from the best `top_groups` of them only
    (arXiv 2405.04434, section 2.1.2). The chosen scores become weights: they are made to sum to 1 if
    `normalize_top_k`, and are multiplied by `router_scale`. `router_bias` and `expert_bias` are learned;
    `selection_bias` (arXiv 2412.19437, section 2.1.2) only steers which experts are chosen, is set by a rule and not
    by a gradient, and so is a buffer that no count here holds.
    """

    number: int
    top_k: int
    ffn_hidden_size: int
    shared: int = 0
    shared_ffn_hidden_size: int | None = None  # of one shared expert; None: that of a routed one
    dense_layers: int = 0
    every: int = 1
    router_score: str = "softmax"
    router_bias: bool = False
    expert_bias: bool = False
    selection_bias: bool = False
    normalize_top_k: bool = True
    router_scale: float = 1.0
    groups: int = 1
    top_groups: int = 1

    @property
    def everywhere(self) -> bool:
        """Whether no layer of the model is dense."""
        return not self.dense_layers and self.every == 1

    def in_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) has experts."""
        return index >= self.dense_layers and (index - self.dense_layers + 1) % self.every == 0

    def layers_of(self, layers: int) -> int:
        """How many of a model's `layers` layers have experts."""
        return max(layers - self.dense_layers, 0) // self.every

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together: they run as one feed-forward."""
        return self.shared * (self.shared_ffn_hidden_size or self.ffn_hidden_size)

    def parameters(self, hidden: int, matrices: int) -> int:
        """Parameters of one layer's router and experts, each expert of `matrices` matrices."""
        return self._parameters(hidden, matrices, self.number)

    def active_parameters(self, hidden: int, matrices: int) -> int:
        """Those of them that one token meets: the whole router, top_k experts and the shared ones."""
        return self._parameters(hidden, matrices, self.top_k)

    def active_matmul_weights(self, hidden: int, matrices: int) -> int:
        """`active_parameters` without the biases."""
        return self.number * hidden + matrices * hidden * (self.top_k * self.ffn_hidden_size + self.shared_width)

    def _parameters(self, hidden: int, matrices: int, experts: int) -> int:
        expert = matrices * hidden * self.ffn_hidden_size
        if self.expert_bias:  # on every matrix: all but the last end in the expert's width
            expert += (matrices - 1) * self.ffn_hidden_size + hidden
        router = self.number * (hidden + (1 if self.router_bias else 0))
        return experts * expert + router + matrices * hidden * self.shared_width

    @classmethod
    def from_dict(cls, reader: Reader) -> Experts:
        width = reader.anything("shared_ffn_hidden_size", default=None)
        experts = cls(
            number=reader.integer("number", minimum=2),
            top_k=reader.integer("top_k", minimum=1),
            ffn_hidden_size=reader.integer("ffn_hidden_size", minimum=1),
            shared=reader.integer("shared", default=0),
            shared_ffn_hidden_size=None if width is None else reader.integer("shared_ffn_hidden_size", minimum=1),
            dense_layers=reader.integer("dense_layers", default=0),
            every=reader.integer("every", minimum=1, default=1),
            router_score=reader.text("router_score", choices=ROUTER_SCORES, default="softmax"),
            router_bias=reader.boolean("router_bias", default=False),
            expert_bias=reader.boolean("expert_bias", default=False),
            selection_bias=reader.boolean("selection_bias", default=False),
            normalize_top_k=reader.boolean("normalize_top_k", default=True),
            router_scale=reader.number("router_scale", above=0, default=1.0),
            groups=reader.integer("groups", minimum=1, default=1),
            top_groups=reader.integer("top_groups", minimum=1, default=1),
        )
        reader.finish()
        if experts.top_k > experts.number:
            raise reader.fail("top_k", f"at most number = {experts.number}", experts.top_k)
        if experts.number % experts.groups:
            raise reader.fail("groups", f"a divisor of number = {experts.number}", experts.groups)
        if experts.top_groups > experts.groups:
            raise reader.fail("top_groups", f"at most groups = {experts.groups}", experts.top_groups)
        if experts.top_k > (within := experts.number // experts.groups * experts.top_groups):
            raise reader.fail(
                "top_k", f"at most the {within} experts of top_groups = {experts.top_groups}", experts.top_k
            )
        if experts.shared_ffn_hidden_size is not None and not experts.shared:
            raise reader.fail("shared_ffn_hidden_size", "no width, since shared = 0", experts.shared_ffn_hidden_size)
        return experts
