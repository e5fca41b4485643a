"""Our models as transformers builds them, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel

from profiles.model import ModelSpec


def _rotary(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
    }


def _llama(spec: ModelSpec) -> dict[str, Any]:
    return _rotary(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _routed(spec: ModelSpec, number: str) -> dict[str, Any]:
    assert spec.experts is not None
    return {number: spec.experts.number, "num_experts_per_tok": spec.experts.top_k}


def _mixtral(spec: ModelSpec) -> dict[str, Any]:
    return _rotary(spec) | _routed(spec, "num_local_experts")


def _qwen3_moe(spec: ModelSpec) -> dict[str, Any]:
    assert spec.experts is not None
    width = {"moe_intermediate_size": spec.experts.ffn_hidden_size}
    return _rotary(spec) | width | {"decoder_sparse_step": spec.experts.every} | _routed(spec, "num_experts")


def _gpt_oss(spec: ModelSpec) -> dict[str, Any]:
    assert spec.sliding_window is not None
    window = {"sliding_window": spec.sliding_window.length, "attention_bias": spec.qkv_bias}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta}}
    return _rotary(spec) | window | rope | _routed(spec, "num_local_experts")


def _deepseek(spec: ModelSpec) -> dict[str, Any]:
    latent, experts = spec.latent_attention, spec.experts
    assert latent is not None
    assert experts is not None
    widths = {key: value for key, value in _rotary(spec).items() if key != "head_dim"}
    return widths | {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "n_routed_experts": experts.number,
        "n_shared_experts": experts.shared,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "first_k_dense_replace": experts.dense_layers,
        "n_group": 1,
        "topk_group": 1,
    }


def _bert(spec: ModelSpec) -> dict[str, Any]:
    not_his = ("head_dim", "num_key_value_heads")
    return {k: v for k, v in _rotary(spec).items() if k not in not_his} | {"type_vocab_size": spec.token_types}


def _gpt_neox(spec: ModelSpec) -> dict[str, Any]:
    widths = {k: v for k, v in _rotary(spec).items() if k not in ("head_dim", "num_key_value_heads")}
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta, "partial_rotary_factor": spec.rotary_fraction}
    return widths | {"rope_parameters": rope, "use_parallel_residual": spec.parallel_residual}


def _opt(spec: ModelSpec) -> dict[str, Any]:
    not_his = ("head_dim", "num_key_value_heads", "intermediate_size")
    widths = {k: v for k, v in _rotary(spec).items() if k not in not_his}
    return widths | {"ffn_dim": spec.ffn_hidden_size, "word_embed_proj_dim": spec.hidden_size}


def _bloom(spec: ModelSpec) -> dict[str, Any]:
    assert spec.ffn_hidden_size == 4 * spec.hidden_size
    return {
        "hidden_size": spec.hidden_size,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_embeddings,
    }


def _gpt2(spec: ModelSpec) -> dict[str, Any]:
    return {
        "n_embd": spec.hidden_size,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "n_inner": spec.ffn_hidden_size,
        "n_positions": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_embeddings,
    }


# family -> transformers' config class, model class, and the config's arguments.
FAMILIES: dict[str, tuple[str, str, Callable[[ModelSpec], dict[str, Any]]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", _bert),
    "bloom": ("BloomConfig", "BloomForCausalLM", _bloom),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", _deepseek),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _deepseek),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _gpt2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _gpt_neox),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", _gpt_oss),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _llama),
    "megatron-bert": ("MegatronBertConfig", "MegatronBertForMaskedLM", _bert),
    "mistral": ("MistralConfig", "MistralForCausalLM", _rotary),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _mixtral),
    "opt": ("OPTConfig", "OPTForCausalLM", _opt),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _rotary),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _rotary),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _qwen3_moe),
}


def transformers_model(spec: ModelSpec, **extra: Any) -> PreTrainedModel:
    """The same architecture as transformers builds it, on the device of the context."""
    config, model, arguments = FAMILIES[spec.family]
    if spec.next_sentence_head:
        model = model.replace("ForMaskedLM", "ForPreTraining")
    return getattr(transformers, model)(getattr(transformers, config)(**arguments(spec), **extra))
