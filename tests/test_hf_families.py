"""The families that read_hf_config knows, against transformers' config and model classes and the catalogue."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from planner.capabilities import missing_features
from profiles.attention_spec import RopeStretch, SlidingWindow
from profiles.catalogue import resolve_model
from profiles.hf_config import read_hf_config
from profiles.input_error import InputError
from profiles.model import ModelSpec, Segment
from profiles.store import Reader
from tests.hf_documents import (
    ATTEND,
    BERT,
    GPT_OSS,
    LIMITED,
    LONG,
    MISTRAL,
    MIXTRAL,
    NEOX,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SLIDE,
    SMALL,
    V2,
    V3,
    read,
)

CONFIGS = {
    "bert": "Bert",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "gpt_oss": "GptOss",
    "llama": "Llama",
    "megatron-bert": "MegatronBert",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}

YARN_40 = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_4096 = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}

# The catalogue's model -> what its released config.json says of the architecture, in that file's own keys.
RELEASED: dict[str, dict[str, Any]] = {
    "bert-large": {
        **{"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu", "hidden_size": 1024},
        **{"intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 30522},
        **{"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2},
        "position_embedding_type": "absolute",
    },
    "mistral-7b": {
        **{"model_type": "mistral", "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000},
        **_4096,
        **{"max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096},
    },
    "qwen3-8b": {
        **{"model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936},
        **{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        **{"max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False},
        **{"use_sliding_window": False, "sliding_window": None, "max_window_layers": 36},
    },
    "gpt-neox-20b": {
        **{"model_type": "gpt_neox", "hidden_act": "gelu_fast", "hidden_size": 6144, "intermediate_size": 24576},
        **{"num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432, "layer_norm_eps": 1e-05},
        **{"max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    },
    "mixtral-8x7b": {
        **{"model_type": "mixtral", "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000},
        **_4096,
        **{"max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
    },
    "qwen3-30b-a3b": {
        **{"model_type": "qwen3_moe", "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936},
        **{"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"max_position_embeddings": 40960, "rope_theta": 1000000.0, "rope_scaling": None, "sliding_window": None},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True},
        **{"num_experts": 128, "num_experts_per_tok": 8, "use_sliding_window": False, "max_window_layers": 48},
    },
    "deepseek-v2": {
        **{"model_type": "deepseek_v2", "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 60},
        **{"num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 102400, "rope_theta": 10000},
        **LATENT,
        **{"max_position_embeddings": 163840, "rope_scaling": YARN_40 | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        **{"moe_layer_freq": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 1536, "norm_topk_prob": False},
        **{"n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "scoring_func": "softmax"},
        **{"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0},
    },
    "deepseek-v3": {
        **{"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61},
        **{"num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "rope_theta": 10000},
        **LATENT,
        **{"max_position_embeddings": 163840, "rope_scaling": YARN_40 | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        **{"moe_layer_freq": 1, "first_k_dense_replace": 3, "moe_intermediate_size": 2048, "norm_topk_prob": True},
        **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "scoring_func": "sigmoid"},
        **{"topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
        **{"num_nextn_predict_layers": 1},
    },
    "gpt-oss-120b": {
        **{"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088},
        **{"attention_bias": True, "max_position_embeddings": 131072, "rope_theta": 150000, "rms_norm_eps": 1e-05},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
        **{"num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0},
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    },
}


def transformers_class(family: str, suffix: str) -> Any:
    return getattr(transformers, CONFIGS[family] + suffix)


def config_of(document: dict[str, Any]) -> PreTrainedConfig:
    """transformers' own config object of a config.json, which is left as it is."""
    document = json.loads(json.dumps(document))
    return transformers_class(document.pop("model_type"), "Config").from_dict(document)


def meta_model(config: PreTrainedConfig) -> Any:
    heads = {"gpt2": "LMHeadModel", "bert": "ForMaskedLM", "megatron-bert": "ForMaskedLM"}
    suffix = "ForPreTraining" if "ForPreTraining" in str(config.architectures) else None
    with torch.device("meta"):
        return transformers_class(config.model_type, suffix or heads.get(config.model_type, "ForCausalLM"))(config)


def parameters_of(config: PreTrainedConfig) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def read_saved(folder: Path, config: PreTrainedConfig) -> ModelSpec:
    """The spec of the config.json that transformers itself writes."""
    config.save_pretrained(folder / "small")
    return read_hf_config(folder / "small")


# ---- released models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_the_catalogues_model_and_transformers(tmp_path: Path, name: str) -> None:
    document = RELEASED[name]
    spec, config = read(tmp_path, document), config_of(document)
    assert replace(spec, name=name) == resolve_model(name)
    assert read_saved(tmp_path, config) == spec
    assert spec.parameters == parameters_of(config)


def test_every_family_that_is_read_is_tested_here(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, {"model_type": "?"})
    assert caught.value.expected == "one of " + ", ".join(CONFIGS)
    assert {document["model_type"] for document in RELEASED.values()} == {*CONFIGS} - {
        "gpt2",
        "llama",
        "qwen2",
        "megatron-bert",
    }


# ---- defaults --------------------------------------------------------------------------------------------

TOP_K = {"deepseek_v2": {"num_experts_per_tok": 6}}  # it has no default that a model can be built with


@pytest.mark.parametrize("family", CONFIGS)
def test_missing_keys_take_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    """A file that says nothing is the file with every key that transformers writes."""
    given = TOP_K.get(family, {})
    config = transformers_class(family, "Config")(**given)
    spec = read(tmp_path, {"model_type": family} | given)
    assert spec == read_saved(tmp_path, config)
    assert spec.parameters == parameters_of(config)


def test_deepseek_v2_must_say_how_many_experts_a_token_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the key num_experts_per_tok is missing"):
        read(tmp_path, {"model_type": "deepseek_v2"})


# ---- variants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        MISTRAL,
        MISTRAL | {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 20},
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 32},
        QWEN3,
        QWEN3 | {"attention_bias": True, "head_dim": 40},
        QWEN3 | {"use_sliding_window": True, "max_window_layers": 9},
        NEOX,
        NEOX | {"attention_bias": False, "use_parallel_residual": False, "rotary_pct": 1.0},
        NEOX | {"hidden_act": "relu", "tie_word_embeddings": True, "rotary_emb_base": 500.0},
        BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3, "tie_word_embeddings": False},
        BERT | {"model_type": "megatron-bert", "layer_norm_eps": 1e-5},
        BERT | {"architectures": ["BertForPreTraining"]},
        MIXTRAL | {"sliding_window": 32, "head_dim": 20},
        QWEN3_MOE,
        QWEN3_MOE | {"attention_bias": True, "norm_topk_prob": True, "head_dim": 20},
        QWEN3_MOE | {"decoder_sparse_step": 2},
        QWEN3_MOE | {"decoder_sparse_step": 4},
        QWEN3_MOE | {"mlp_only_layers": [1, 0]},
        QWEN3_MOE | {"mlp_only_layers": [0, 1, 2], "decoder_sparse_step": 2},
        QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 32},
        GPT_OSS,
        GPT_OSS | {"attention_bias": False, "num_hidden_layers": 5},
        GPT_OSS | {"layer_types": [ATTEND] * 6},
        GPT_OSS | {"layer_types": [SLIDE, SLIDE, ATTEND] * 2, "sliding_window": 9},
        V2,
        V2 | {"first_k_dense_replace": 2, "q_lora_rank": None, "n_shared_experts": 1, "num_key_value_heads": None},
        V2 | LIMITED | {"routed_scaling_factor": 16.0, "tie_word_embeddings": True},
        V3,
        V3 | {"first_k_dense_replace": 0, "n_group": 4, "topk_group": 1, "norm_topk_prob": False},
        MISTRAL | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7.0}},
        MISTRAL | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        QWEN3 | {"head_dim": 16, "rope_scaling": LONG | {"original_max_position_embeddings": 64}},
        GPT_OSS | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_a_small_config_as_transformers_reads_builds_and_writes_it(tmp_path: Path, document: dict[str, Any]) -> None:
    spec, config = read(tmp_path, document), config_of(document)
    assert read_saved(tmp_path, config) == spec
    model = meta_model(config)
    # Of a head that is not tied, transformers' BERT holds a second bias that nothing reads.
    unread = 0 if spec.tied_embeddings or not spec.output_bias else spec.vocab_size
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters()) - unread
    if spec.experts is not None:
        blocks = [any("experts" in name for name, _ in block.named_modules()) for block in model.model.layers]
        assert blocks == [spec.experts.in_layer(i) for i in range(spec.layers)]
    assert ModelSpec.from_dict(Reader(spec.to_dict(), source="plan.yaml")) == spec


def test_a_share_of_a_head_in_the_mapping_outranks_the_one_beside_it(tmp_path: Path) -> None:
    document = NEOX | {"rotary_pct": 0.3, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 3.0}}
    spec = read(tmp_path, document)
    assert (spec.rotary_fraction, spec.rope_theta) == (0.5, 3.0)
    assert (config_of(document).rope_parameters or {})["partial_rotary_factor"] == 0.5


def test_every_second_layer_has_experts(tmp_path: Path) -> None:
    spec = read(tmp_path, QWEN3_MOE | {"decoder_sparse_step": 3, "num_hidden_layers": 7})
    runs = (Segment("dense", 2), Segment("experts", 1), Segment("dense", 2), Segment("experts", 1), Segment("dense", 1))
    assert spec.segments == runs
    assert spec.ffn_hidden_size == 200
    assert read(tmp_path, QWEN3_MOE).ffn_hidden_size == 40  # no layer is dense


@pytest.mark.parametrize(
    ("document", "window"),
    [
        (MISTRAL, SlidingWindow(length=4096)),
        (MISTRAL | {"sliding_window": None}, None),
        (MISTRAL | {"layer_types": [SLIDE] * 6}, SlidingWindow(length=4096)),
        (MIXTRAL, None),
        (MIXTRAL | {"sliding_window": 32}, SlidingWindow(length=32)),
        (QWEN3 | {"sliding_window": 32}, None),
        (QWEN3 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 6}, None),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 0}, SlidingWindow(length=4096)),
        (
            QWEN3 | {"use_sliding_window": True, "layer_types": [SLIDE, ATTEND] * 3},
            SlidingWindow(length=4096, full_every=2),
        ),
        (QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 32}, SlidingWindow(length=32)),
        (GPT_OSS, SlidingWindow(length=128, full_every=2)),
        (GPT_OSS | {"layer_types": [SLIDE, SLIDE, ATTEND] * 2}, SlidingWindow(length=128, full_every=3)),
        (GPT_OSS | {"layer_types": [ATTEND] * 6, "sliding_window": None}, None),
    ],
)
def test_which_layers_have_the_window(tmp_path: Path, document: dict[str, Any], window: SlidingWindow | None) -> None:
    assert read(tmp_path, document).sliding_window == window


@pytest.mark.parametrize(
    ("rope", "stretch", "feature"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            RopeStretch(kind="yarn", factor=4.0, original_max_positions=32),
            "YaRN positions",
        ),
        (
            {"type": "yarn", "factor": None, "original_max_position_embeddings": 32, "attention_factor": None},
            RopeStretch(kind="yarn", factor=4.0, original_max_positions=32),
            "YaRN positions",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0},
            RopeStretch(kind="yarn", factor=2.0, original_max_positions=128),
            "YaRN positions",
        ),
        ({"type": "linear", "factor": 3.0}, RopeStretch(kind="linear", factor=3.0), "linearly stretched positions"),
        (
            {"type": "dynamic", "factor": 3.0},
            RopeStretch(kind="dynamic", factor=3.0, original_max_positions=128),
            "dynamically stretched positions",
        ),
        (
            LONG | {"original_max_position_embeddings": 64},
            RopeStretch(kind="longrope", factor=2.0, original_max_positions=64),
            "LongRoPE positions",
        ),
        (
            LONG | {"original_max_position_embeddings": 64, "factor": 3.0},
            RopeStretch(kind="longrope", factor=3.0, original_max_positions=64),
            "LongRoPE positions",
        ),
    ],
)
def test_a_stretch_is_read_named_and_changes_no_count(
    tmp_path: Path, rope: dict[str, Any], stretch: RopeStretch, feature: str
) -> None:
    plain = SMALL | {"model_type": "llama"}
    spec = read(tmp_path, plain | {"rope_scaling": rope})
    assert spec.rope_stretch == stretch
    assert spec.features == (feature,)
    assert missing_features(spec, "meshwright") == (() if stretch.kind in ("yarn", "linear") else (feature,))
    assert missing_features(spec, "megatron") == ((feature,) if stretch.kind in ("dynamic", "longrope") else ())
    assert replace(spec, rope_stretch=None) == read(tmp_path, plain)
    assert spec.step_flops(2, 64) == read(tmp_path, plain).step_flops(2, 64)


def test_gpt_oss_without_a_word_on_rope_is_stretched_and_with_one_is_not(tmp_path: Path) -> None:
    stretch = RopeStretch(kind="yarn", factor=32.0, original_max_positions=4096, truncate=False)
    assert read(tmp_path, GPT_OSS).rope_stretch == stretch
    for rope in ({}, {"rope_type": "default"}):
        document = GPT_OSS | {"rope_parameters": rope}
        assert read(tmp_path, document).rope_stretch is None
        assert (config_of(document).rope_parameters or {})["rope_type"] == "default"


def test_what_meshwright_does_not_train_is_named(tmp_path: Path) -> None:
    missing = {name: missing_features(read(tmp_path, document), "meshwright") for name, document in RELEASED.items()}
    assert missing == {
        "bert-large": (),
        "mistral-7b": (),
        "qwen3-8b": (),
        "gpt-neox-20b": ("partial rotary positions", "parallel residuals"),
        "mixtral-8x7b": (),
        "qwen3-30b-a3b": (),
        "deepseek-v2": (),
        "deepseek-v3": (),
        "gpt-oss-120b": (),
    }
    assert missing_features(read(tmp_path, MISTRAL | {"sliding_window": None}), "meshwright") == ()
