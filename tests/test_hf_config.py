"""read_hf_config against transformers' own config classes and models, and the exact text of its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from profiles.hf_config import read_hf_config
from profiles.input_error import InputError
from profiles.model import RopeScaling

MODELS = {LlamaConfig: LlamaForCausalLM, Qwen2Config: Qwen2ForCausalLM, GPT2Config: GPT2LMHeadModel}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 77,
}
LLAMA3_SCALES = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_ROPE = {"rope_type": "llama3", **LLAMA3_SCALES}
FAMILIES = (
    "bert, deepseek_v2, deepseek_v3, gpt2, gpt_neox, gpt_oss, llama, megatron-bert, mistral, mixtral, qwen2, qwen3, "
    "qwen3_moe"
)


def write(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def meta_parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    return sum(parameter.numel() for parameter in model.parameters())


def refusal(folder: Path, config: object) -> list[tuple[str, str]]:
    """Label and text of each part of the error, the file's name cut to config.json."""
    path = write(folder, config)
    with pytest.raises(InputError) as caught:
        read_hf_config(path)
    return [(label, text.replace(str(path), "config.json")) for label, text in caught.value.lines()]


def rope_of_transformers(folder: Path) -> dict[str, Any]:
    return dict(LlamaConfig.from_pretrained(folder).rope_parameters or {})


# ---- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_missing_keys_take_the_defaults_of_transformers(tmp_path: Path, kind: type[Any]) -> None:
    theirs = kind()
    ours = read_hf_config(write(tmp_path, {"model_type": kind.model_type}))
    assert ours.layers == theirs.num_hidden_layers
    assert ours.hidden_size == theirs.hidden_size
    assert ours.ffn_hidden_size == theirs.intermediate_size
    assert ours.heads == theirs.num_attention_heads
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.vocab_size == theirs.vocab_size
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope_scaling is None


def test_missing_keys_of_gpt2_take_the_defaults_of_transformers(tmp_path: Path) -> None:
    theirs = GPT2Config()
    ours = read_hf_config(write(tmp_path, {"model_type": "gpt2"}))
    assert (ours.layers, ours.hidden_size, ours.heads) == (theirs.n_layer, theirs.n_embd, theirs.n_head)
    assert (ours.vocab_size, ours.max_positions) == (theirs.vocab_size, theirs.n_positions)
    assert ours.norm_epsilon == theirs.layer_norm_epsilon
    assert (ours.activation, theirs.activation_function) == ("gelu_tanh", "gelu_new")
    assert ours.tied_embeddings is theirs.tie_word_embeddings is True
    assert (ours.norm, ours.positions, ours.kv_heads, ours.ffn_hidden_size) == ("layernorm", "learned", 12, 3072)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        LlamaConfig(**LLAMA),
        LlamaConfig(**LLAMA, attention_bias=True),
        LlamaConfig(**LLAMA, mlp_bias=True),
        LlamaConfig(**LLAMA, tie_word_embeddings=True),
        LlamaConfig(**LLAMA, head_dim=40, attention_bias=True, mlp_bias=True),
        LlamaConfig(**{**LLAMA, "num_key_value_heads": None}),
        Qwen2Config(),
        Qwen2Config(**{**LLAMA, "model_type": "qwen2"}, tie_word_embeddings=True),
        Qwen2Config(**{**LLAMA, "model_type": "qwen2", "head_dim": 40}),
        GPT2Config(),
        GPT2Config(n_embd=48, n_layer=2, n_head=3, n_positions=50, vocab_size=61, tie_word_embeddings=False),
        GPT2Config(n_embd=48, n_layer=2, n_head=3, n_inner=100, activation_function="gelu"),
    ],
)
def test_parameters_are_those_of_the_model_transformers_builds(tmp_path: Path, config: PreTrainedConfig) -> None:
    config.save_pretrained(tmp_path)
    assert read_hf_config(tmp_path).parameters == meta_parameters(config)


def test_a_folder_and_its_file_give_the_same_model_named_after_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    file = write(folder, LLAMA)
    assert read_hf_config(folder) == read_hf_config(file)
    assert read_hf_config(folder).name == "my-model"
    other = file.rename(folder / "small.json")
    assert read_hf_config(other).name == "small"


def test_every_key_of_a_llama_reaches_the_spec(tmp_path: Path) -> None:
    config = LLAMA | {
        "head_dim": 40,
        "max_position_embeddings": 333,
        "rms_norm_eps": 3e-4,
        "rope_theta": 5e5,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    }
    spec = read_hf_config(write(tmp_path, config))
    assert (spec.family, spec.layers, spec.hidden_size, spec.ffn_hidden_size) == ("llama", 3, 96, 200)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocab_size, spec.max_positions) == (6, 2, 40, 77, 333)
    assert (spec.norm, spec.norm_epsilon, spec.activation) == ("rmsnorm", 3e-4, "swiglu")
    assert (spec.positions, spec.rope_theta) == ("rope", 5e5)
    assert (spec.qkv_bias, spec.attention_output_bias, spec.mlp_bias, spec.tied_embeddings) == (True,) * 4


def test_qwen2_has_biases_on_qkv_alone_whatever_the_file_says(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "qwen2", "attention_bias": False, "mlp_bias": True}
    spec = read_hf_config(write(tmp_path, config))
    assert (spec.qkv_bias, spec.attention_output_bias, spec.mlp_bias) == (True, False, False)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu", "relu")],
)
def test_gpt2_activations(tmp_path: Path, theirs: str, ours: str) -> None:
    config = {"model_type": "gpt2", "activation_function": theirs}
    assert read_hf_config(write(tmp_path, config)).activation == ours


def test_gpt2_under_the_general_names(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 50,
    }
    spec = read_hf_config(write(tmp_path, config))
    assert (spec.hidden_size, spec.layers, spec.heads, spec.max_positions) == (48, 2, 3, 50)
    assert spec.parameters == meta_parameters(GPT2Config.from_pretrained(tmp_path))


# ---- rotary embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},  # before transformers 5
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},  # the inner base counts
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3_SCALES, "type": "llama3"}},  # the key's older name
    ],
)
def test_llama3_scaling_where_transformers_looks_for_it(tmp_path: Path, rope: dict[str, Any]) -> None:
    path = write(tmp_path, LLAMA | {"max_position_embeddings": 131072} | rope)
    spec, theirs = read_hf_config(path), rope_of_transformers(tmp_path)
    assert spec.rope_theta == theirs["rope_theta"] == 5e5
    assert spec.rope_scaling == RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=8192
    )


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 9.0, "rope_scaling": None}, 9.0),
        ({"rope_theta": 9.0, "rope_scaling": {"type": "default"}}, 9.0),
        ({"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}, 9.0),
        ({"rope_theta": 3.0, "rope_parameters": {"rope_theta": 9.0}, "partial_rotary_factor": 1.0}, 9.0),
        ({}, 10000.0),
    ],
)
def test_default_rope_has_a_base_and_no_scaling(tmp_path: Path, rope: dict[str, Any], theta: float) -> None:
    spec = read_hf_config(write(tmp_path, LLAMA | rope))
    assert (spec.rope_theta, spec.rope_scaling) == (theta, None)
    assert rope_of_transformers(tmp_path)["rope_theta"] == theta


def test_original_positions_default_to_the_positions_of_the_model(tmp_path: Path) -> None:
    rope = {key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"}
    spec = read_hf_config(write(tmp_path, LLAMA | {"max_position_embeddings": 640, "rope_scaling": rope}))
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.original_max_positions == 640


# ---- what is refused -------------------------------------------------------------------------------------


def test_an_unknown_model_type_lists_what_is_read_and_the_near_match(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"model_type": "qwem3"}) == [
        ("error", "model_type has a value that cannot be used"),
        ("where", "config.json: model_type"),
        ("expected", f"one of {FAMILIES}"),
        ("got", "'qwem3'"),
        ("try", "is 'qwen3' meant?"),
    ]


def test_a_missing_model_type_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"n_layer": 3}) == [
        ("error", "the key model_type is missing"),
        ("where", "config.json: top level"),
        ("expected", f"model_type: one of {FAMILIES}"),
        ("got", "keys n_layer"),
    ]


GPT2 = {"model_type": "gpt2"}
QWEN2 = {"model_type": "qwen2"}


@pytest.mark.parametrize(
    ("config", "key", "expected", "got"),
    [
        (
            LLAMA | {"hidden_size": 100},
            "num_attention_heads",
            "a divisor of hidden_size = 100, or an explicit head_dim",
            "6",
        ),
        (LLAMA | {"num_key_value_heads": 4}, "num_key_value_heads", "a divisor of num_attention_heads = 6", "4"),
        (QWEN2 | {"num_attention_heads": 16}, "num_key_value_heads", "a divisor of num_attention_heads = 16", "32"),
        (LLAMA | {"head_dim": 15}, "head_dim", "an even number, since RoPE turns pairs", "15"),
        (LLAMA | {"num_hidden_layers": -1}, "num_hidden_layers", "a whole number >= 1", "-1"),
        (LLAMA | {"num_hidden_layers": 2.5}, "num_hidden_layers", "a whole number >= 1", "2.5"),
        (LLAMA | {"intermediate_size": 0}, "intermediate_size", "a whole number >= 1", "0"),
        (LLAMA | {"vocab_size": True}, "vocab_size", "a whole number >= 2", "True"),
        (LLAMA | {"hidden_size": None}, "hidden_size", "a whole number >= 1", "None"),
        (LLAMA | {"head_dim": 0}, "head_dim", "a whole number >= 1", "0"),
        (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps", "a finite number > 0", "0"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act", "one of silu, swish", "'gelu'"),
        (LLAMA | {"rope_theta": -1.0}, "rope_theta", "a finite number > 0", "-1.0"),
        (
            LLAMA | {"partial_rotary_factor": 0.5},
            "partial_rotary_factor",
            "1: every element of a head is rotated here",
            "0.5",
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
            "rope_scaling.rope_type",
            "one of default, llama3, yarn, linear, dynamic, longrope",
            "'proportional'",
        ),
        (
            LLAMA | {"rope_scaling": {"type": "ntk", "factor": 4.0}},
            "rope_scaling.type",
            "one of default, llama3, yarn, linear, dynamic, longrope",
            "'ntk'",
        ),
        (LLAMA | {"rope_parameters": ["llama3"]}, "rope_parameters", "a mapping of keys to values", "['llama3']"),
        (
            LLAMA | {"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
            "rope_parameters.high_freq_factor",
            "more than low_freq_factor = 1, since their difference divides",
            "1.0",
        ),
        (
            LLAMA | {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 3.0}},
            "rope_scaling",
            "the same as rope_parameters, which this file has too",
            "{'type': 'default'}",
        ),
        (
            QWEN2 | {"use_sliding_window": True},
            "max_window_layers",
            "0 or at least num_hidden_layers = 32: a window in the last layers alone is not planned here",
            "28",
        ),
        (
            QWEN2 | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "layer_types",
            "full_attention in every layer, since there is no sliding window",
            "['sliding_attention']",
        ),
        (GPT2 | {"n_head": 5}, "n_head", "a divisor of n_embd = 768", "5"),
        (GPT2 | {"n_inner": -4}, "n_inner", "a whole number >= 1", "-4"),
        (
            GPT2 | {"activation_function": "tanh"},
            "activation_function",
            "one of gelu_new, gelu_fast, gelu_pytorch_tanh, gelu, relu",
            "'tanh'",
        ),
        (
            GPT2 | {"add_cross_attention": True},
            "add_cross_attention",
            "false: nothing else is planned or trained here",
            "True",
        ),
        (
            GPT2 | {"scale_attn_weights": False},
            "scale_attn_weights",
            "true: nothing else is planned or trained here",
            "False",
        ),
        (
            GPT2 | {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx",
            "false: nothing else is planned or trained here",
            "True",
        ),
        (GPT2 | {"n_embd": 48, "hidden_size": 96}, "hidden_size", "the same as n_embd = 48, its other name", "96"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(
    tmp_path: Path, config: dict[str, Any], key: str, expected: str, got: str
) -> None:
    parts = dict(refusal(tmp_path, config))
    assert parts["error"] == f"{key} has a value that cannot be used"
    assert parts["where"] == f"config.json: {key}"
    assert (parts["expected"], parts["got"]) == (expected, got)


def test_rope_by_layer_type_is_refused(tmp_path: Path) -> None:
    parts = dict(refusal(tmp_path, QWEN2 | {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}))
    assert parts["error"] == "unknown key rope_parameters.full_attention"


def test_a_key_that_llama3_scaling_has_not_is_refused(tmp_path: Path) -> None:
    parts = dict(refusal(tmp_path, LLAMA | {"rope_scaling": LLAMA3_ROPE | {"attention_factor": 2.0}}))
    assert parts["error"] == "unknown key rope_scaling.attention_factor"


def test_a_llama3_scaling_without_its_factor_is_refused(tmp_path: Path) -> None:
    parts = dict(refusal(tmp_path, LLAMA | {"rope_scaling": {"rope_type": "llama3"}}))
    assert parts["error"] == "the key rope_scaling.factor is missing"


def test_a_file_that_is_no_json_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type":\n  llama}', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_hf_config(path)
    assert caught.value.where == f"{path}: line 2, column 3"


def test_a_folder_without_config_json_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "configs.json").touch()
    with pytest.raises(InputError) as caught:
        read_hf_config(tmp_path)
    assert caught.value.lines() == [
        ("error", f"{tmp_path / 'config.json'} does not exist"),
        ("where", str(tmp_path / "config.json")),
        ("expected", "a Hugging Face config.json file"),
        ("got", "no such file"),
        ("try", f"is {tmp_path / 'configs.json'} meant?"),
    ]


def test_a_document_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["llama"]) == [
        ("error", "the document has a value that cannot be used"),
        ("where", "config.json"),
        ("expected", "a mapping of keys to values"),
        ("got", "['llama']"),
    ]
