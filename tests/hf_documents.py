"""Small config.json documents of each Hugging Face family, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from profiles.hf_config import read_hf_config
from profiles.model import ModelSpec

SMALL = {
    **{"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 6, "num_attention_heads": 6},
    **{"num_key_value_heads": 2, "vocab_size": 77, "max_position_embeddings": 128},
}
OWN_KEYS = SMALL | {"num_key_value_heads": 6}
NEOX = {"model_type": "gpt_neox"} | {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
BERT = {"model_type": "bert"} | {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
MISTRAL = SMALL | {"model_type": "mistral"}
QWEN2 = SMALL | {"model_type": "qwen2"}
QWEN3 = SMALL | {"model_type": "qwen3"}
MIXTRAL = SMALL | {"model_type": "mixtral", "num_local_experts": 4}
QWEN3_MOE = SMALL | FEW | {"model_type": "qwen3_moe", "num_experts": 8}
GPT_OSS = SMALL | {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2}
TINY_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7}
V2 = OWN_KEYS | FEW | TINY_LATENT | {"model_type": "deepseek_v2", "n_routed_experts": 16}
V3 = OWN_KEYS | FEW | TINY_LATENT | {"model_type": "deepseek_v3", "n_routed_experts": 16}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
LONG = {"rope_type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
SLIDE, ATTEND = "sliding_attention", "full_attention"


def read(folder: Path, document: dict[str, Any]) -> ModelSpec:
    path = folder / "small.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return read_hf_config(path)
