"""Logits of models beyond the dense decoder against transformers' own, from their config and state dict alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from planner.plan import Stage
from profiles.hf_config import read_hf_config
from runtime.hf_names import from_hugging_face
from runtime.parameters import named_buffers, named_parameters
from runtime.transformer import build_chunk

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
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
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", GROUPED),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "qwen3_moe, weights that sum to 1": (
        "Qwen3Moe",
        GROUPED | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"q_lora_rank": 12, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(0.0, 0.3)
    config.save_pretrained(tmp_path)
    model = read_hf_config(tmp_path / "config.json")

    chunk = build_chunk(model, Stage.whole(model)).to_empty(device="cpu")
    ours = dict(named_parameters([chunk])) | dict(named_buffers([chunk]))
    with torch.no_grad():
        for path, tensor in from_hugging_face(model.family, theirs.state_dict(), tied=model.tied_embeddings):
            ours.pop(path).copy_(tensor)
    assert not ours, f"tensors that Hugging Face does not have: {list(ours)}"

    ids = torch.randint(0, model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(ids).logits, chunk(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
