"""Small Hugging Face models of every family that the runtime trains, with random weights, in folders of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from planner.plan import Stage
from profiles.hf_config import read_hf_config
from profiles.model import ModelSpec
from runtime.hf_weights import load_weights
from runtime.parameters import clear_buffers
from runtime.transformer import Chunk, build_chunk

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    # 40 tokens: two whole blocks of 16 and a part of one.
    "mistral, a window": ("Mistral", GROUPED | {"sliding_window": 16, "rope_parameters": YARN}),
    "qwen3, windows": (
        "Qwen3",
        GROUPED
        | {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
        },
    ),
    "gpt_oss": (
        "GptOss",
        GROUPED
        | {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2",
        {"tie_word_embeddings": True, "n_inner": 48, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
    ),
    "qwen3": ("Qwen3", GROUPED),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "qwen3_moe, weights that sum to 1": (
        "Qwen3Moe",
        GROUPED
        | {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "intermediate_size": 16,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"q_lora_rank": 12, "num_key_value_heads": 4}),
    "deepseek_v3, stretched": (
        "DeepseekV3",
        LATENT
        | {
            "q_lora_rank": 12,
            "num_key_value_heads": 4,
            "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.5},
        },
    ),
    "bert": ("Bert", {"tie_word_embeddings": True} | NO_DROPOUT),
    "megatron-bert": ("MegatronBert", {"tie_word_embeddings": True} | NO_DROPOUT),
}


def make_model(name: str, *, layers: int = 3, **changes: Any) -> Any:
    """transformers' model of CONFIGS[name], with weights large enough to tell outputs apart."""
    import transformers

    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | {"num_hidden_layers": layers} | options | changes))
    head = {"GPT2": "LMHeadModel", "Bert": "ForMaskedLM", "MegatronBert": "ForMaskedLM"}.get(kind, "ForCausalLM")
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.3)
    return model


def read_whole(folder: Path, model: ModelSpec | None = None) -> Chunk:
    """Our model in one chunk with the folder's weights."""
    model = model or read_hf_config(folder)
    chunk = build_chunk(model, Stage.whole(model)).to_empty(device="cpu")
    chunk.tie()
    clear_buffers([chunk])
    load_weights(folder, [chunk], model)
    return chunk


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def require_same_logits(ours: Chunk, theirs: Any) -> None:
    """Raise AssertionError where they differ by 1e-5 of the largest."""
    ids = torch.randint(0, theirs.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
