"""ModelSpec -> a Hugging Face config.json, which the reader of its family must read back as the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from .attention_spec import RopeStretch
from .experts_spec import Experts
from .hf_config import read_hf_document
from .hf_parts import FULL, GATED_ACTIVATIONS, PLAIN_ACTIVATIONS, SLIDING
from .input_error import InputError
from .model import ModelSpec

Config = dict[str, Any]
_GATED = {ours: theirs for theirs, ours in reversed(GATED_ACTIVATIONS.items())}
_PLAIN = {ours: theirs for theirs, ours in reversed(PLAIN_ACTIVATIONS.items())}


def write_hf_config(model: ModelSpec) -> Config:
    """The config.json of `model`, for its own family, or llama where it has none that is written here.

    Token ids are null, since a model does not know them. Raises InputError where the family cannot express the model.
    """
    family = model.family if model.family in _WRITERS else "llama"
    architecture, writer = _WRITERS[family]
    config = {
        "architectures": [architecture],
        "model_type": family,
        **writer(model),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    read = read_hf_document(config, f"config.json of {model.name}", model.name)
    ours, theirs = asdict(replace(model, family=family)), asdict(read)
    lost = [key for key in ours if ours[key] != theirs[key]]
    if lost:
        raise InputError(
            f"{model.name} cannot be written as a Hugging Face model of the family {family}",
            where="plan: " + ", ".join(f"model.{key}" for key in lost),
            expected=", ".join(f"{key} {theirs[key]}, as all that the family expresses" for key in lost),
            got=", ".join(f"{key} {ours[key]}" for key in lost),
        )
    return config


def _rotary(model: ModelSpec) -> Config:
    config = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": _GATED.get(model.activation, model.activation),
        # Where transformers before 5 looks; those from 5 on look there too.
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
    }
    if model.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_frequency_factor,
            "high_freq_factor": model.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": model.rope_scaling.original_max_positions,
        }
    if model.rope_stretch is not None:
        config["rope_scaling"] = _stretch(model.rope_stretch)
    return config


def _stretch(stretch: RopeStretch) -> Config:
    said = {"rope_type": stretch.kind, "factor": stretch.factor}
    if stretch.kind != "yarn":
        return said
    said["original_max_position_embeddings"] = stretch.original_max_positions
    if not stretch.truncate:  # the default is not said
        said["truncate"] = False
    constants = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    return said | {key: value for key in constants if (value := getattr(stretch, key)) is not None}


def _window(model: ModelSpec) -> Config:
    """The window of a family whose layers all have it, or none."""
    return {"sliding_window": model.sliding_window.length if model.sliding_window else None}


def _windows(model: ModelSpec) -> Config:
    """The window of a family whose layers may differ."""
    window = model.sliding_window
    kinds = [SLIDING if window and window.in_layer(index) else FULL for index in range(model.layers)]
    return {**_window(model), "layer_types": kinds}


def _qwen_windows(model: ModelSpec) -> Config:
    used = model.sliding_window is not None
    return {**_windows(model), "use_sliding_window": used} if used else {}


def _llama(model: ModelSpec) -> Config:
    return {**_rotary(model), "attention_bias": model.attention_output_bias, "mlp_bias": model.mlp_bias}


def _mistral(model: ModelSpec) -> Config:
    return {**_rotary(model), **_window(model)}


def _qwen3(model: ModelSpec) -> Config:
    return {**_qwen2(model), "attention_bias": model.attention_output_bias}


def _qwen2(model: ModelSpec) -> Config:
    return {**_rotary(model), **_qwen_windows(model)}


def _gpt_oss(model: ModelSpec) -> Config:
    experts = _experts(model)
    config = {
        **_rotary(model),
        **_windows(model),
        "attention_bias": model.attention_output_bias,
        "num_local_experts": experts.number,
        "num_experts_per_tok": experts.top_k,
        "hidden_act": "silu",  # what transformers says of its clamped SwiGLU
    }
    # One that is null and one that is not there are not the same: without a word the family is stretched.
    return config | {"rope_scaling": config["rope_scaling"] or {"rope_type": "default"}}


def _gpt2(model: ModelSpec) -> Config:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": _PLAIN.get(model.activation, model.activation),
        # What is trained here has no dropout.
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _bert(model: ModelSpec) -> Config:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_epsilon,
        "hidden_act": _PLAIN.get(model.activation, model.activation),
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    }


def _mixtral(model: ModelSpec) -> Config:
    experts = _experts(model)
    return {**_mistral(model), "num_local_experts": experts.number, "num_experts_per_tok": experts.top_k}


def _qwen3_moe(model: ModelSpec) -> Config:
    experts = _experts(model)
    return {
        **_qwen3(model),
        "num_experts": experts.number,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "norm_topk_prob": experts.normalize_top_k,
        "decoder_sparse_step": experts.every,
        "mlp_only_layers": [i for i in range(model.layers) if (i + 1) % experts.every == 0 and not experts.in_layer(i)],
    }


def _deepseek(model: ModelSpec) -> Config:
    experts, latent = _experts(model), model.latent_attention
    assert latent is not None, "the family has latent attention"
    config = {key: value for key, value in _rotary(model).items() if key != "head_dim"}
    return config | {
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
        "norm_topk_prob": experts.normalize_top_k,
        "routed_scaling_factor": experts.router_scale,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
    }


def _deepseek_v2(model: ModelSpec) -> Config:
    grouped = _experts(model).groups > 1
    return {**_deepseek(model), "topk_method": "group_limited_greedy" if grouped else "greedy"}


def _experts(model: ModelSpec) -> Experts:
    assert model.experts is not None, "the family has experts"
    return model.experts


_WRITERS: Mapping[str, tuple[str, Callable[[ModelSpec], Config]]] = {
    "bert": ("BertForMaskedLM", _bert),
    "megatron-bert": ("MegatronBertForMaskedLM", _bert),
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "mixtral": ("MixtralForCausalLM", _mixtral),
    "gpt_oss": ("GptOssForCausalLM", _gpt_oss),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _deepseek_v2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _deepseek),
}
