"""A Hugging Face config.json -> ModelSpec, for llama, qwen2 and gpt2; what cannot be expressed is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from .model import ModelSpec, RopeScaling
from .store import Reader, load_json

CONFIG_FILE = "config.json"

# What a missing key means: the defaults of LlamaConfig and Qwen2Config in transformers 5.23. Their
# num_key_value_heads: a llama without the key has as many as heads, a qwen2 without it has 32.
_ROTARY_DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_positions": 2048, "kv_heads": None},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_positions": 32768, "kv_heads": 32},
}
_DEFAULT_ROPE_THETA = 10000.0  # RotaryEmbeddingConfigMixin.default_theta in transformers 5.23

# transformers' names of the activations -> ours. gelu_new and gelu_pytorch_tanh are the same tanh formula.
_GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
_PLAIN_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

# GPT2Config.attribute_map: transformers reads either name.
_GPT2_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}


def read_hf_config(path: Path) -> ModelSpec:
    """The architecture in `path`, a config.json or a folder that holds one; the folder's name is the model's.

    Keys that are left out take the defaults of transformers' config class for the model_type. Keys that do
    not shape the network (dropout, token ids, dtype ...) are ignored.

    Raises:
        InputError: no such file, not JSON, a model_type that is not read, a value out of range, a
            contradiction, or a feature that ModelSpec cannot express; with the key path.
    """
    file = path / CONFIG_FILE if os.path.isdir(path) else path
    reader = Reader(load_json(file, "Hugging Face config.json"), source=str(file))
    family = reader.text("model_type", choices=_FAMILIES)
    absolute = Path(os.path.abspath(file))
    name = absolute.parent.name if absolute.name == CONFIG_FILE else absolute.stem
    return _FAMILIES[family](reader, family, name or family)


def _read_rotary(reader: Reader, family: str, name: str) -> ModelSpec:
    """The llama family: RMSNorm, SwiGLU, RoPE, grouped queries."""
    defaults = _ROTARY_DEFAULTS[family]
    hidden = reader.integer("hidden_size", minimum=1, default=4096)
    heads = reader.integer("num_attention_heads", minimum=1, default=32)
    kv_heads = _integer_or_null(reader, "num_key_value_heads", missing=defaults["kv_heads"] or heads, null=heads)
    if "head_dim" not in reader or _is_null(reader, "head_dim"):
        _refuse_uneven_heads(reader, "num_attention_heads", heads, hidden, "hidden_size", ", or an explicit head_dim")
    head_dim = _integer_or_null(reader, "head_dim", missing=hidden // heads, null=hidden // heads)
    if heads % kv_heads:
        raise reader.fail("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    if head_dim % 2:
        raise reader.fail("head_dim", "an even number, since RoPE turns pairs", head_dim)
    if family == "qwen2":
        _refuse_sliding_window(reader)
    max_positions = reader.integer("max_position_embeddings", minimum=1, default=defaults["max_positions"])
    theta, scaling = _read_rope(reader, max_positions)
    attention_bias = family == "llama" and reader.boolean("attention_bias", default=False)
    return ModelSpec(
        name=name,
        family=family,
        layers=reader.integer("num_hidden_layers", minimum=1, default=32),
        hidden_size=hidden,
        ffn_hidden_size=reader.integer("intermediate_size", minimum=1, default=defaults["intermediate_size"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size", minimum=2, default=defaults["vocab_size"]),
        max_positions=max_positions,
        norm="rmsnorm",
        norm_epsilon=reader.number("rms_norm_eps", above=0, default=1e-6),
        activation=_GATED_ACTIVATIONS[reader.text("hidden_act", choices=_GATED_ACTIVATIONS, default="silu")],
        positions="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=family == "llama" and reader.boolean("mlp_bias", default=False),
        tied_embeddings=reader.boolean("tie_word_embeddings", default=False),
    )


def _read_gpt2(reader: Reader, family: str, name: str) -> ModelSpec:
    """GPT-2: LayerNorm, GELU, learned positions, a bias on every linear."""
    for key, refused, default in (
        ("scale_attn_weights", False, True),
        ("scale_attn_by_inverse_layer_idx", True, False),
        ("add_cross_attention", True, False),
    ):
        if reader.boolean(key, default=default) is refused:
            raise reader.fail(key, f"{str(default).lower()}: nothing else is planned or trained here", refused)
    hidden = _gpt2_integer(reader, "n_embd", 768)
    heads = _gpt2_integer(reader, "n_head", 12)
    _refuse_uneven_heads(reader, "n_head", heads, hidden, "n_embd")
    activation = reader.text("activation_function", choices=_PLAIN_ACTIVATIONS, default="gelu_new")
    return ModelSpec(
        name=name,
        family=family,
        layers=_gpt2_integer(reader, "n_layer", 12),
        hidden_size=hidden,
        ffn_hidden_size=_integer_or_null(reader, "n_inner", missing=4 * hidden, null=4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=reader.integer("vocab_size", minimum=2, default=50257),
        max_positions=_gpt2_integer(reader, "n_positions", 1024),
        norm="layernorm",
        norm_epsilon=reader.number("layer_norm_epsilon", above=0, default=1e-5),
        activation=_PLAIN_ACTIVATIONS[activation],
        positions="learned",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied_embeddings=reader.boolean("tie_word_embeddings", default=True),
    )


_FAMILIES: Mapping[str, Callable[[Reader, str, str], ModelSpec]] = {
    "gpt2": _read_gpt2,
    "llama": _read_rotary,
    "qwen2": _read_rotary,
}


# ---- parts ---------------------------------------------------------------------------------------------


def _is_null(reader: Reader, key: str) -> bool:
    return key in reader and reader.anything(key) is None


def _integer_or_null(reader: Reader, key: str, *, missing: int, null: int) -> int:
    """A count that the file may leave out or, as transformers writes what follows from other keys, set to null."""
    return null if _is_null(reader, key) else reader.integer(key, minimum=1, default=missing)


def _gpt2_integer(reader: Reader, key: str, default: int) -> int:
    """A count of GPT-2 under its own name or the general one; the two must not disagree."""
    alias = _GPT2_ALIASES[key]
    if alias not in reader:
        return reader.integer(key, minimum=1, default=default)
    general = reader.integer(alias, minimum=1)
    if reader.integer(key, minimum=1, default=general) != general:
        raise reader.fail(alias, f"the same as {key} = {reader.integer(key)}, its other name", general)
    return general


def _refuse_uneven_heads(reader: Reader, key: str, heads: int, hidden: int, hidden_key: str, way_out: str = "") -> None:
    if hidden % heads:
        raise reader.fail(key, f"a divisor of {hidden_key} = {hidden}{way_out}", heads)


def _refuse_sliding_window(reader: Reader) -> None:
    expected = "full attention in every layer: a sliding window is not planned or trained here"
    if reader.boolean("use_sliding_window", default=False):
        raise reader.fail("use_sliding_window", expected, True)
    types = None if _is_null(reader, "layer_types") else reader.anything("layer_types", default=None)
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        raise reader.fail("layer_types", expected, types)


def _read_rope(reader: Reader, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE, where transformers looks for them.

    Before transformers 5 the base stands at the top and the scaling in `rope_scaling`; since then both
    stand in `rope_parameters`. A base inside the mapping outranks the one at the top.
    """
    theta = reader.number("rope_theta", above=0, default=_DEFAULT_ROPE_THETA)
    _refuse_partial_rotation(reader)
    scaling, parameters = (reader.anything(key, default=None) for key in ("rope_scaling", "rope_parameters"))
    if scaling and parameters and scaling != parameters:
        raise reader.fail("rope_scaling", "the same as rope_parameters, which this file has too", scaling)
    key = "rope_scaling" if scaling else "rope_parameters"
    if not (scaling or parameters):
        return theta, None
    rope = reader.child(key)
    theta = rope.number("rope_theta", above=0, default=theta)
    _refuse_partial_rotation(rope)
    kinds = ("default", "llama3")
    older = rope.text("type", choices=kinds, default="default")  # its name before transformers 4.43
    if rope.text("rope_type", choices=kinds, default=older) == "default":
        rope.finish()
        return theta, None
    llama3 = RopeScaling(
        factor=rope.number("factor", above=0),
        low_frequency_factor=rope.number("low_freq_factor", above=0),
        high_frequency_factor=rope.number("high_freq_factor", above=0),
        original_max_positions=rope.integer("original_max_position_embeddings", minimum=1, default=max_positions),
    )
    rope.finish()
    if llama3.high_frequency_factor <= llama3.low_frequency_factor:
        expected = f"more than low_freq_factor = {llama3.low_frequency_factor:g}, since their difference divides"
        raise rope.fail("high_freq_factor", expected, llama3.high_frequency_factor)
    return theta, llama3


def _refuse_partial_rotation(reader: Reader) -> None:
    key = "partial_rotary_factor"
    if not _is_null(reader, key) and reader.number(key, default=1.0) != 1.0:
        raise reader.fail(key, "1: every element of a head is rotated here", reader.anything(key))
