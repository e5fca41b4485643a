"""ModelSpec: an architecture as embedding, a chain of equal blocks, and head; its parameters and FLOPs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .store import Reader, load_document

SCHEMA = "meshwright.model/v1"
NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh")
POSITIONS = ("rope", "learned")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The frequency scaling of Llama 3.1 (`rope_type: llama3` in a Hugging Face config)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int

    @classmethod
    def from_dict(cls, reader: Reader) -> RopeScaling:
        scaling = cls(
            factor=reader.number("factor", above=0),
            low_frequency_factor=reader.number("low_frequency_factor", above=0),
            high_frequency_factor=reader.number("high_frequency_factor", above=0),
            original_max_positions=reader.integer("original_max_positions", minimum=1),
        )
        reader.finish()
        if scaling.high_frequency_factor <= scaling.low_frequency_factor:
            raise reader.fail(
                "high_frequency_factor",
                f"a number above low_frequency_factor = {scaling.low_frequency_factor:g}",
                scaling.high_frequency_factor,
            )
        return scaling


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A dense decoder. Widths are in elements; `activation` swiglu has three matrices, the gelus two.

    `qkv_bias`, `attention_output_bias` and `mlp_bias` say which linears carry a bias. Norm biases come
    with `norm: layernorm`. `gelu_tanh` is the tanh form of GELU that GPT-2 was trained with.
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

    # ---- parameters: counts, exact --------------------------------------------------------------------

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear of a block, in the order it runs them."""
        h, q, kv, f = self.hidden_size, self.query_width, self.kv_width, self.ffn_hidden_size
        shapes = {"wq": (q, h), "wk": (kv, h), "wv": (kv, h), "wo": (h, q), "w1": (f, h)}
        if self.activation == "swiglu":
            shapes["w3"] = (f, h)
        shapes["w2"] = (h, f)
        return shapes

    def has_bias(self, linear: str) -> bool:
        """Whether the named linear of `linear_shapes` carries a bias."""
        if linear in ("wq", "wk", "wv"):
            return self.qkv_bias
        return self.attention_output_bias if linear == "wo" else self.mlp_bias

    @property
    def block_parameters(self) -> int:
        linears = sum(
            outputs * inputs + (outputs if self.has_bias(name) else 0)
            for name, (outputs, inputs) in self.linear_shapes.items()
        )
        return linears + 2 * self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        learned = self.max_positions * self.hidden_size if self.positions == "learned" else 0
        return self.vocab_size * self.hidden_size + learned

    @property
    def head_parameters(self) -> int:
        """Parameters of the last norm and the output matrix; a tied matrix counts in the embedding."""
        matrix = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return matrix + self.norm_parameters

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.layers * self.block_parameters + self.head_parameters

    # ---- FLOPs ------------------------------------------------------------------------------------------

    def step_flops(self, global_batch: int, sequence: int) -> float:
        """Model FLOPs of one optimizer step, attention counted in full (not causally), no recomputation.

        6 FLOPs per token and matmul weight (2 forward, 4 backward) plus 12 s q per token and layer for the
        two attention products, after arXiv 2104.04473 section 5.1 with grouped queries.
        """
        matmul_weights = self.layers * sum(o * i for o, i in self.linear_shapes.values())
        matmul_weights += self.vocab_size * self.hidden_size
        tokens = global_batch * sequence
        attention = 12.0 * sequence * self.query_width * self.layers
        return tokens * (6.0 * matmul_weights + attention)

    # ---- files -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, reader: Reader) -> ModelSpec:
        """Read the keys of a model from `reader`; contradictions are InputErrors with the key path."""
        heads = reader.integer("heads", minimum=1)
        hidden = reader.integer("hidden_size", minimum=1)
        scaling = reader.anything("rope_scaling", default=None)
        spec = cls(
            name=reader.text("name"),
            family=reader.text("family", default="custom"),
            layers=reader.integer("layers", minimum=1),
            hidden_size=hidden,
            ffn_hidden_size=reader.integer("ffn_hidden_size", minimum=1),
            heads=heads,
            kv_heads=reader.integer("kv_heads", minimum=1, default=heads),
            head_dim=reader.integer("head_dim", minimum=1, default=hidden // heads),
            vocab_size=reader.integer("vocab_size", minimum=2),
            max_positions=reader.integer("max_positions", minimum=1),
            norm=reader.text("norm", choices=NORMS, default="rmsnorm"),
            norm_epsilon=reader.number("norm_epsilon", above=0, default=1e-5),
            activation=reader.text("activation", choices=ACTIVATIONS, default="swiglu"),
            positions=reader.text("positions", choices=POSITIONS, default="rope"),
            rope_theta=reader.number("rope_theta", above=0, default=10000.0),
            rope_scaling=RopeScaling.from_dict(reader.child("rope_scaling")) if scaling is not None else None,
            qkv_bias=reader.boolean("qkv_bias", default=False),
            attention_output_bias=reader.boolean("attention_output_bias", default=False),
            mlp_bias=reader.boolean("mlp_bias", default=False),
            tied_embeddings=reader.boolean("tied_embeddings", default=False),
        )
        reader.finish()
        spec.check(reader)
        return spec

    def check(self, reader: Reader) -> None:
        """Raise an InputError where the numbers contradict each other."""
        if self.heads % self.kv_heads:
            raise reader.fail("kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads)
        if self.positions == "rope" and self.head_dim % 2:
            raise reader.fail("head_dim", "an even number, since RoPE turns pairs", self.head_dim)
        if self.hidden_size % self.heads and "head_dim" not in reader:
            raise reader.fail(
                "heads", f"a divisor of hidden_size = {self.hidden_size}, or an explicit head_dim", self.heads
            )


def load_model_file(path: Path) -> ModelSpec:
    """The model in a Meshwright YAML file."""
    return ModelSpec.from_dict(load_document(path, schema=SCHEMA, kind="model"))
