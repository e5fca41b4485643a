"""Hugging Face configs of dense decoders: llama, mistral, qwen2, qwen3; gpt2; gpt_neox."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .attention_spec import RopeStretch, SlidingWindow
from .hf_parts import (
    FULL,
    GATED_ACTIVATIONS,
    PLAIN_ACTIVATIONS,
    SLIDING,
    aliased_integer,
    integer_or_null,
    is_null,
    refuse_uneven_heads,
    window_by_layer,
    window_of_all,
)
from .hf_rope import DEFAULT_THETA, PartialRotation, read_rope
from .model import ModelSpec
from .store import Reader

NOTHING_ELSE = "nothing else is planned or trained here"


@dataclass(frozen=True, kw_only=True)
class RotaryDefaults:
    """What a missing key means: the fields of a config class in transformers 5.23, here those of LlamaConfig.

    `kv_heads` None: as many as heads. `head_dim` None: the hidden size divided by the heads.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 2048
    norm_epsilon: float = 1e-6
    rope_theta: float = DEFAULT_THETA
    rope_stretch: RopeStretch | None = None


_LLAMA = RotaryDefaults()
_MISTRAL = RotaryDefaults(intermediate_size=14336, kv_heads=8, max_positions=4096 * 32)
_QWEN2 = RotaryDefaults(vocab_size=151936, intermediate_size=22016, kv_heads=32, max_positions=32768)
_QWEN3 = replace(_QWEN2, head_dim=128)


def read_rotary(reader: Reader, family: str, name: str, defaults: RotaryDefaults) -> ModelSpec:
    """What the llama-like families share: RMSNorm, SwiGLU, RoPE, grouped queries, no bias."""
    hidden = reader.integer("hidden_size", minimum=1, default=defaults.hidden_size)
    heads = reader.integer("num_attention_heads", minimum=1, default=defaults.heads)
    kv_heads = integer_or_null(reader, "num_key_value_heads", missing=defaults.kv_heads or heads, null=heads)
    if is_null(reader, "head_dim") or ("head_dim" not in reader and defaults.head_dim is None):
        refuse_uneven_heads(reader, "num_attention_heads", heads, hidden, "hidden_size", ", or an explicit head_dim")
    width = hidden // heads
    head_dim = integer_or_null(reader, "head_dim", missing=defaults.head_dim or width, null=width)
    if heads % kv_heads:
        raise reader.fail("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    if head_dim % 2:
        raise reader.fail("head_dim", "an even number, since RoPE turns pairs", head_dim)
    max_positions = reader.integer("max_position_embeddings", minimum=1, default=defaults.max_positions)
    rope = read_rope(reader, max_positions, default_theta=defaults.rope_theta, default_stretch=defaults.rope_stretch)
    return ModelSpec(
        name=name,
        family=family,
        layers=reader.integer("num_hidden_layers", minimum=1, default=defaults.layers),
        hidden_size=hidden,
        ffn_hidden_size=reader.integer("intermediate_size", minimum=1, default=defaults.intermediate_size),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size", minimum=2, default=defaults.vocab_size),
        max_positions=max_positions,
        norm="rmsnorm",
        norm_epsilon=reader.number("rms_norm_eps", above=0, default=defaults.norm_epsilon),
        activation=GATED_ACTIVATIONS[reader.text("hidden_act", choices=GATED_ACTIVATIONS, default="silu")],
        positions="rope",
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_stretch=rope.stretch,
        tied_embeddings=reader.boolean("tie_word_embeddings", default=False),
    )


def with_attention_bias(reader: Reader, spec: ModelSpec, *, default: bool = False) -> ModelSpec:
    """The model with a bias on all four linears of the attention if `attention_bias` says so."""
    bias = reader.boolean("attention_bias", default=default)
    return replace(spec, qkv_bias=bias, attention_output_bias=bias)


def read_llama(reader: Reader, family: str, name: str) -> ModelSpec:
    spec = with_attention_bias(reader, read_rotary(reader, family, name, _LLAMA))
    return replace(spec, mlp_bias=reader.boolean("mlp_bias", default=False))


def read_mistral(reader: Reader, family: str, name: str) -> ModelSpec:
    """Llama with a window in every layer unless `sliding_window` is null."""
    spec = read_rotary(reader, family, name, _MISTRAL)
    return replace(spec, sliding_window=window_of_all(reader, spec.layers, missing=4096))


def read_qwen2(reader: Reader, family: str, name: str) -> ModelSpec:
    """Llama with a bias on queries, keys and values, whatever the file says."""
    spec = read_rotary(reader, family, name, _QWEN2)
    return replace(spec, qkv_bias=True, sliding_window=_qwen_window(reader, spec.layers))


def read_qwen3(reader: Reader, family: str, name: str) -> ModelSpec:
    """Llama with a norm over each head of queries and keys."""
    spec = with_attention_bias(reader, read_rotary(reader, family, name, _QWEN3))
    return replace(spec, qk_norm=True, sliding_window=_qwen_window(reader, spec.layers))


def qwen_window_length(reader: Reader) -> int | None:
    """The window's length, None unless `use_sliding_window`."""
    if not reader.boolean("use_sliding_window", default=False) or is_null(reader, "sliding_window"):
        return None
    return reader.integer("sliding_window", minimum=1, default=4096)


def _qwen_window(reader: Reader, layers: int) -> SlidingWindow | None:
    """The window of the layers from `max_window_layers` on, unless `layer_types` lists them."""
    length = qwen_window_length(reader)
    first = layers if length is None else min(reader.integer("max_window_layers", default=28), layers)
    if reader.anything("layer_types", default=None) is None and 0 < first < layers:
        expected = f"0 or at least num_hidden_layers = {layers}: a window in the last layers alone is not planned here"
        raise reader.fail("max_window_layers", expected, first)
    return window_by_layer(reader, [FULL] * first + [SLIDING] * (layers - first), length=length)


# ---- GPT-2 and GPT-NeoX --------------------------------------------------------------------------------


def read_gpt2(reader: Reader, family: str, name: str) -> ModelSpec:
    """GPT-2: LayerNorm, GELU, learned positions, a bias on every linear."""
    for key, refused, default in (
        ("scale_attn_weights", False, True),
        ("scale_attn_by_inverse_layer_idx", True, False),
        ("add_cross_attention", True, False),
    ):
        if reader.boolean(key, default=default) is refused:
            raise reader.fail(key, f"{str(default).lower()}: {NOTHING_ELSE}", refused)
    # GPT2Config.attribute_map: transformers reads either name.
    hidden = aliased_integer(reader, "n_embd", "hidden_size", default=768)
    heads = aliased_integer(reader, "n_head", "num_attention_heads", default=12)
    refuse_uneven_heads(reader, "n_head", heads, hidden, "n_embd")
    activation = reader.text("activation_function", choices=PLAIN_ACTIVATIONS, default="gelu_new")
    return ModelSpec(
        name=name,
        family=family,
        layers=aliased_integer(reader, "n_layer", "num_hidden_layers", default=12),
        hidden_size=hidden,
        ffn_hidden_size=integer_or_null(reader, "n_inner", missing=4 * hidden, null=4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=reader.integer("vocab_size", minimum=2, default=50257),
        max_positions=aliased_integer(reader, "n_positions", "max_position_embeddings", default=1024),
        norm="layernorm",
        norm_epsilon=reader.number("layer_norm_epsilon", above=0, default=1e-5),
        activation=PLAIN_ACTIVATIONS[activation],
        positions="learned",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied_embeddings=reader.boolean("tie_word_embeddings", default=True),
    )


def read_gpt_neox(reader: Reader, family: str, name: str) -> ModelSpec:
    """GPT-NeoX: LayerNorm, GELU, RoPE on a part of each head, attention and feed-forward side by side, biases."""
    hidden = reader.integer("hidden_size", minimum=1, default=6144)
    heads = reader.integer("num_attention_heads", minimum=1, default=64)
    refuse_uneven_heads(reader, "num_attention_heads", heads, hidden, "hidden_size")
    head_dim = hidden // heads
    max_positions = reader.integer("max_position_embeddings", minimum=1, default=2048)
    partial = PartialRotation(key="rotary_pct", default=0.25, head_dim=head_dim)
    rope = read_rope(reader, max_positions, theta_key="rotary_emb_base", partial=partial)
    attention_bias = reader.boolean("attention_bias", default=True)
    return ModelSpec(
        name=name,
        family=family,
        layers=reader.integer("num_hidden_layers", minimum=1, default=44),
        hidden_size=hidden,
        ffn_hidden_size=reader.integer("intermediate_size", minimum=1, default=24576),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size", minimum=2, default=50432),
        max_positions=max_positions,
        norm="layernorm",
        norm_epsilon=reader.number("layer_norm_eps", above=0, default=1e-5),
        activation=PLAIN_ACTIVATIONS[reader.text("hidden_act", choices=PLAIN_ACTIVATIONS, default="gelu")],
        positions="rope",
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_stretch=rope.stretch,
        rotary_fraction=rope.fraction,
        parallel_residual=reader.boolean("use_parallel_residual", default=True),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=True,
        tied_embeddings=reader.boolean("tie_word_embeddings", default=False),
    )
