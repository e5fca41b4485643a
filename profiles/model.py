"""ModelSpec: an architecture as embedding, a chain of layers, and head; its parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from .attention_spec import LatentAttention, RopeScaling, RopeStretch, SlidingWindow
from .experts_spec import Experts
from .model_features import features_of
from .store import Reader, load_document

SCHEMA = "meshwright.model/v1"
NORMS = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post")
GATED_ACTIVATIONS = ("swiglu", "clamped_swiglu")
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu", "clamped_swiglu")
POSITIONS = ("rope", "learned", "alibi")
LAYER_KINDS = ("dense", "experts")

Part = TypeVar("Part")


@dataclass(frozen=True)
class Segment:
    """`count` layers in a row of one kind of LAYER_KINDS; a window or none makes no other kind."""

    kind: str
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A transformer of one stack. Widths are in elements; the swiglus have three matrices, the others two.

    `qkv_bias`, `attention_output_bias` and `mlp_bias` say which linears carry a bias. Norm biases come
    with `norm: layernorm`. `gelu_tanh` is the tanh form of GELU that GPT-2 was trained with. The defaults of
    what follows `tied_embeddings` are the dense, causal pre-norm decoder; `features` names what differs.

    `ffn_hidden_size` is the width of a dense layer, and that of an expert where no layer is dense. With
    `latent_attention`, `head_dim` is its width of a query's head.
    """

    name: str
    family: str
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-5
    activation: str = "swiglu"
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    # What a layer may be besides.
    rope_stretch: RopeStretch | None = None
    experts: Experts | None = None
    latent_attention: LatentAttention | None = None
    sliding_window: SlidingWindow | None = None
    qk_norm: bool = False  # an RMSNorm over each head of queries and keys; heads share its weight
    attention_sinks: bool = False  # a learned number per head, one more summand under the softmax
    bidirectional: bool = False
    rotary_fraction: float = 1.0  # the share of each head that RoPE turns
    parallel_residual: bool = False  # attention and feed-forward read the same input
    norm_placement: str = "pre"
    # What embedding and head may be besides.
    position_offset: int = 0  # rows of the learned positions before the first token's
    token_types: int = 0
    embedding_norm: bool = False
    output_transform: bool = False  # linear, activation and norm before the output matrix
    output_bias: bool = False
    next_sentence_head: bool = False  # pooler and two classes, on the first token of a sequence

    # ---- the chain -----------------------------------------------------------------------------------------

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of layers of one kind, in order: DeepSeek-V3 is 3 dense layers, then 58 with experts."""
        if self.experts is None:
            return (Segment("dense", self.layers),)
        runs = groupby(map(self.experts.in_layer, range(self.layers)))
        return tuple(Segment("experts" if has else "dense", len(list(run))) for has, run in runs)

    @property
    def features(self) -> tuple[str, ...]:
        """What the model has and the dense, causal pre-norm decoder has not, in words for people."""
        return features_of(self)

    # ---- parameters: counts, exact --------------------------------------------------------------------

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def attention_output_width(self) -> int:
        """Width of all heads' outputs, which `wo` reads."""
        return self.heads * (self.latent_attention.v_head_dim if self.latent_attention else self.head_dim)

    @property
    def value_head_dim(self) -> int:
        return self.latent_attention.v_head_dim if self.latent_attention else self.head_dim

    @property
    def rotary_share(self) -> float:
        """The share of a query's head that RoPE turns."""
        if self.latent_attention is not None:
            return self.latent_attention.qk_rope_head_dim / self.head_dim
        return self.rotary_fraction

    def attended_share(self, sequence: float) -> float:
        """Scores that attention needs, in those of the causal half s²/2, as the mean over the layers."""
        if self.bidirectional:
            return 2.0
        if self.sliding_window is None or self.sliding_window.length >= sequence:
            return 1.0
        share = self.sliding_window.length / sequence
        windowed = self.sliding_window.windowed_layers(self.layers) / self.layers
        return 1.0 - windowed * (1.0 - share) ** 2

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.activation in GATED_ACTIVATIONS else 2

    @property
    def norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    @cached_property
    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear of the attention, in the order it runs them."""
        h, q, kv = self.hidden_size, self.query_width, self.kv_width
        if self.latent_attention is not None:
            return self.latent_attention.linear_shapes(h, self.heads)
        return {"wq": (q, h), "wk": (kv, h), "wv": (kv, h), "wo": (h, q)}

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear of a dense layer, in the order it runs them."""
        h, f = self.hidden_size, self.ffn_hidden_size
        shapes = {**self.attention_shapes, "w1": (f, h)}
        if self.ffn_matrices == 3:
            shapes["w3"] = (f, h)
        shapes["w2"] = (h, f)
        return shapes

    def has_bias(self, linear: str) -> bool:
        """Whether the named linear of `linear_shapes` carries a bias."""
        if linear in ("w1", "w2", "w3"):
            return self.mlp_bias
        return self.attention_output_bias if linear == "wo" else self.qkv_bias

    @property
    def block_parameters(self) -> int:
        """Parameters of a dense layer; `layer_parameters` knows the other kinds too."""
        return self._layer_parameters(self.linear_shapes)

    @property
    def block_tensors(self) -> int:
        """Parameter tensors of a dense layer: its linears, their biases, sinks, its two norms."""
        biases = sum(self.has_bias(name) for name in self.linear_shapes)
        biases += self.attention_sinks
        return len(self.linear_shapes) + biases + 2 * (2 if self.norm == "layernorm" else 1)

    def layer_tensors(self, kind: str) -> int:
        """Parameter tensors of a layer of a kind that `segments` holds; experts lie stacked, one tensor a matrix."""
        if kind == "dense":
            return self.block_tensors
        beside = len(self.linear_shapes) - len(self.attention_shapes)
        shared = self.ffn_matrices if self.experts is not None and self.experts.shared else 0
        biased = (self.experts.router_bias + self.ffn_matrices * self.experts.expert_bias) if self.experts else 0
        return self.block_tensors - beside + self.ffn_matrices + 1 + shared + biased

    @property
    def end_tensors(self) -> tuple[int, int]:
        """Parameter tensors of the embedding and of the head (of a tied matrix, one in each)."""
        norm = 2 if self.norm == "layernorm" else 1
        embedding = 1 + (self.positions == "learned") + (self.token_types > 0) + norm * self.embedding_norm
        head = 1 + norm * (self.norm_placement == "pre") + (2 + norm) * self.output_transform + self.output_bias
        return embedding, head

    def layer_parameters(self, kind: str) -> int:
        """Parameters of one layer of a kind that `segments` holds."""
        assert kind in LAYER_KINDS, kind
        if kind == "dense":
            return self.block_parameters
        assert self.experts is not None, f"{self.name} has no experts"
        experts = self.experts.parameters(self.hidden_size, self.ffn_matrices)
        return self._layer_parameters(self.attention_shapes) + experts

    def _layer_parameters(self, shapes: dict[str, tuple[int, int]]) -> int:
        """Parameters of a layer with these linears: two norms, wherever they stand, and the attention's extras."""
        linears = sum(o * i + (o if self.has_bias(name) else 0) for name, (o, i) in shapes.items())
        return linears + 2 * self.norm_parameters + self.attention_extra_parameters

    @property
    def attention_extra_parameters(self) -> int:
        """Norms of queries, keys and latents, and sinks."""
        extras = 2 * self.head_dim if self.qk_norm else 0
        extras += self.heads if self.attention_sinks else 0
        return extras + (self.latent_attention.norm_parameters if self.latent_attention else 0)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of token, position and type rows and of the embedding's norm."""
        rows = self.vocab_size + self.token_types
        if self.positions == "learned":
            rows += self.max_positions + self.position_offset
        return rows * self.hidden_size + (self.norm_parameters if self.embedding_norm else 0)

    @property
    def head_parameters(self) -> int:
        """Parameters of the last norm (a post-norm layer ends with its own), the output matrix and what is beside.

        A tied matrix counts in the embedding.
        """
        h = self.hidden_size
        total = 0 if self.tied_embeddings else self.vocab_size * h
        total += self.norm_parameters if self.norm_placement == "pre" else 0
        total += h * h + h + self.norm_parameters if self.output_transform else 0
        total += self.vocab_size if self.output_bias else 0
        total += (h * h + h) + (2 * h + 2) if self.next_sentence_head else 0
        return total

    @property
    def parameters(self) -> int:
        layers = sum(segment.count * self.layer_parameters(segment.kind) for segment in self.segments)
        return self.embedding_parameters + layers + self.head_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: of the routed experts top_k, all else in full, embedding and head too."""
        if self.experts is None:
            return self.parameters
        idle = self.experts.parameters(self.hidden_size, self.ffn_matrices)
        idle -= self.experts.active_parameters(self.hidden_size, self.ffn_matrices)
        return self.parameters - self.experts.layers_of(self.layers) * idle

    # ---- FLOPs ------------------------------------------------------------------------------------------

    def step_flops(self, global_batch: int, sequence: int) -> float:
        """Model FLOPs of one optimizer step, attention counted in full (not causally), no recomputation.

        6 FLOPs per token and matmul weight (2 forward, 4 backward) plus 6 s (q + o) per token and layer for the
        two attention products, q the width of the queries and o of the outputs: arXiv 2104.04473 section 5.1
        (12 s h, where q = o = h) with grouped queries. Of experts the weights are those a token is sent to:
        top_k, the shared ones and the router. A layer with a window has its length for s, if shorter. The
        pooler and the next-sentence classes see one token a sequence.
        """
        h, tokens = self.hidden_size, global_batch * sequence
        matmul_weights = sum(segment.count * self._active_matmul_weights(segment.kind) for segment in self.segments)
        matmul_weights += self.vocab_size * h + (h * h if self.output_transform else 0)
        window = self.sliding_window or SlidingWindow(length=sequence)
        windowed = window.windowed_layers(self.layers)
        keys = windowed * min(window.length, sequence) + (self.layers - windowed) * sequence
        attention = 6.0 * keys * (self.query_width + self.attention_output_width)
        next_sentence = 6.0 * global_batch * (h * h + 2 * h) if self.next_sentence_head else 0.0
        return tokens * (6.0 * matmul_weights + attention) + next_sentence

    def _active_matmul_weights(self, kind: str) -> int:
        shapes = self.linear_shapes if kind == "dense" else self.attention_shapes
        weights = sum(outputs * inputs for outputs, inputs in shapes.values())
        if kind == "experts" and self.experts is not None:
            weights += self.experts.active_matmul_weights(self.hidden_size, self.ffn_matrices)
        return weights

    # ---- files -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, reader: Reader) -> ModelSpec:
        """Read the keys of a model from `reader`; contradictions are InputErrors with the key path."""
        heads = reader.integer("heads", minimum=1)
        hidden = reader.integer("hidden_size", minimum=1)
        experts = _part(reader, "experts", Experts.from_dict)
        latent = _part(reader, "latent_attention", LatentAttention.from_dict)
        ffn = {"default": experts.ffn_hidden_size} if experts and experts.everywhere else {}
        spec = cls(
            name=reader.text("name"),
            family=reader.text("family", default="custom"),
            layers=reader.integer("layers", minimum=1),
            hidden_size=hidden,
            ffn_hidden_size=reader.integer("ffn_hidden_size", minimum=1, **ffn),
            heads=heads,
            kv_heads=reader.integer("kv_heads", minimum=1, default=heads),
            head_dim=reader.integer("head_dim", minimum=1, default=latent.qk_head_dim if latent else hidden // heads),
            vocab_size=reader.integer("vocab_size", minimum=2),
            max_positions=reader.integer("max_positions", minimum=1),
            norm=reader.text("norm", choices=NORMS, default="rmsnorm"),
            norm_epsilon=reader.number("norm_epsilon", above=0, default=1e-5),
            activation=reader.text("activation", choices=ACTIVATIONS, default="swiglu"),
            positions=reader.text("positions", choices=POSITIONS, default="rope"),
            rope_theta=reader.number("rope_theta", above=0, default=10000.0),
            rope_scaling=_part(reader, "rope_scaling", RopeScaling.from_dict),
            qkv_bias=reader.boolean("qkv_bias", default=False),
            attention_output_bias=reader.boolean("attention_output_bias", default=False),
            mlp_bias=reader.boolean("mlp_bias", default=False),
            tied_embeddings=reader.boolean("tied_embeddings", default=False),
            rope_stretch=_part(reader, "rope_stretch", RopeStretch.from_dict),
            experts=experts,
            latent_attention=latent,
            sliding_window=_part(reader, "sliding_window", SlidingWindow.from_dict),
            qk_norm=reader.boolean("qk_norm", default=False),
            attention_sinks=reader.boolean("attention_sinks", default=False),
            bidirectional=reader.boolean("bidirectional", default=False),
            rotary_fraction=reader.number("rotary_fraction", above=0, default=1.0),
            parallel_residual=reader.boolean("parallel_residual", default=False),
            norm_placement=reader.text("norm_placement", choices=NORM_PLACEMENTS, default="pre"),
            position_offset=reader.integer("position_offset", default=0),
            token_types=reader.integer("token_types", default=0),
            embedding_norm=reader.boolean("embedding_norm", default=False),
            output_transform=reader.boolean("output_transform", default=False),
            output_bias=reader.boolean("output_bias", default=False),
            next_sentence_head=reader.boolean("next_sentence_head", default=False),
        )
        reader.finish()
        spec.check(reader)
        return spec

    def check(self, reader: Reader) -> None:
        """Raise an InputError where the numbers contradict each other."""
        if self.heads % self.kv_heads:
            raise reader.fail("kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads)
        if self.latent_attention is not None:
            self._check_latent(reader, self.latent_attention)
        elif self.hidden_size % self.heads and "head_dim" not in reader:
            raise reader.fail(
                "heads", f"a divisor of hidden_size = {self.hidden_size}, or an explicit head_dim", self.heads
            )
        self._check_positions(reader)
        experts = self.experts
        if experts is not None and experts.dense_layers >= self.layers:
            raise reader.fail("experts.dense_layers", f"fewer than layers = {self.layers}", experts.dense_layers)
        if experts is not None and not experts.layers_of(self.layers):
            expected = f"at most the {self.layers - experts.dense_layers} layers after the first dense ones"
            raise reader.fail("experts.every", expected, experts.every)
        if experts is not None and experts.everywhere and self.ffn_hidden_size != experts.ffn_hidden_size:
            expected = f"that of the experts, {experts.ffn_hidden_size}, since no layer is dense"
            raise reader.fail("ffn_hidden_size", expected, self.ffn_hidden_size)

    def _check_latent(self, reader: Reader, latent: LatentAttention) -> None:
        for key, expected in (
            ("kv_heads", self.heads),
            ("head_dim", latent.qk_head_dim),
            ("positions", "rope"),
            ("rotary_fraction", 1.0),
            ("qkv_bias", False),
            ("qk_norm", False),
        ):
            got = getattr(self, key)
            if got != expected:
                shown = str(expected).lower() if isinstance(expected, bool) else expected
                raise reader.fail(key, f"{shown}, as latent_attention has it", got)

    def _check_positions(self, reader: Reader) -> None:
        if self.position_offset and self.positions != "learned":
            raise reader.fail("position_offset", f"0, since positions = {self.positions}", self.position_offset)
        if self.rope_stretch is not None and (self.positions != "rope" or self.rope_scaling is not None):
            other = f"positions = {self.positions}" if self.positions != "rope" else "there is a rope_scaling"
            raise reader.fail("rope_stretch", f"none, since {other}", self.rope_stretch.kind)
        if self.positions != "rope":
            if self.rotary_fraction != 1.0:
                raise reader.fail("rotary_fraction", f"1, since positions = {self.positions}", self.rotary_fraction)
        elif self.rotary_fraction != 1.0:
            if self.rotary_fraction > 1.0 or (self.head_dim * self.rotary_fraction) % 2:
                expected = f"an even number of the {self.head_dim} elements of a head, since RoPE turns pairs"
                raise reader.fail("rotary_fraction", expected, self.rotary_fraction)
        elif self.head_dim % 2 and self.latent_attention is None:
            raise reader.fail("head_dim", "an even number, since RoPE turns pairs", self.head_dim)


def _part(reader: Reader, key: str, read: Callable[[Reader], Part]) -> Part | None:
    """The mapping under `key`, which may be left out or null."""
    return None if reader.anything(key, default=None) is None else read(reader.child(key))


def load_model_file(path: Path) -> ModelSpec:
    """The model in a Meshwright YAML file."""
    return ModelSpec.from_dict(load_document(path, schema=SCHEMA, kind="model"))
