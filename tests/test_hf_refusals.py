"""Hugging Face configs that cannot be planned: each is refused with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from profiles.input_error import InputError
from tests.hf_documents import (
    ATTEND,
    BERT,
    GPT_OSS,
    LIMITED,
    LONG,
    MISTRAL,
    MIXTRAL,
    NEOX,
    QWEN3,
    QWEN3_MOE,
    SLIDE,
    V2,
    V3,
    read,
)

EACH = f"a list of 6 entries, each {ATTEND} or {SLIDE}"
EVERY_NTH = "full attention in every n-th layer and a window in all others: nothing else is planned here"
FIRST = "the first layers alone: dense ones after the first with experts are not planned here"
ONLY = "nothing else is planned or trained here"


@pytest.mark.parametrize(
    ("document", "key", "expected", "got"),
    [
        (MISTRAL | {"sliding_window": 0}, "sliding_window", "a whole number >= 1", "0"),
        (
            MISTRAL | {"layer_types": [ATTEND] * 6},
            "layer_types",
            f"{SLIDE} in every layer, as sliding_window has it",
            str([ATTEND] * 6),
        ),
        (MIXTRAL | {"layer_types": [ATTEND]}, "layer_types", EACH, str([ATTEND])),
        (QWEN3 | {"head_dim": None, "hidden_size": 100}, "num_attention_heads", None, "6"),
        (QWEN3 | {"head_dim": 15}, "head_dim", "an even number, since RoPE turns pairs", "15"),
        (
            QWEN3 | {"use_sliding_window": True, "max_window_layers": 2},
            "max_window_layers",
            "0 or at least num_hidden_layers = 6: a window in the last layers alone is not planned here",
            "2",
        ),
        (
            QWEN3 | {"use_sliding_window": True, "layer_types": [ATTEND, *[SLIDE] * 5]},
            "layer_types",
            EVERY_NTH,
            None,
        ),
        (QWEN3 | {"layer_types": "all"}, "layer_types", EACH, "'all'"),
        (QWEN3_MOE | {"layer_types": ["chunked_attention"] * 6}, "layer_types", EACH, None),
        (GPT_OSS | {"layer_types": [SLIDE, SLIDE, ATTEND, SLIDE, ATTEND, ATTEND]}, "layer_types", EVERY_NTH, None),
        (
            GPT_OSS | {"sliding_window": None},
            "layer_types",
            f"{ATTEND} in every layer, since there is no sliding window",
            None,
        ),
        (GPT_OSS | {"swiglu_limit": 5.0}, "swiglu_limit", f"7.0: {ONLY}", "5.0"),
        (GPT_OSS | {"swiglu_alpha": 1.0}, "swiglu_alpha", f"1.702: {ONLY}", "1.0"),
        (NEOX | {"hidden_size": 100}, "num_attention_heads", "a divisor of hidden_size = 100", "6"),
        (
            NEOX | {"hidden_act": "silu"},
            "hidden_act",
            "one of gelu_new, gelu_fast, gelu_pytorch_tanh, gelu, relu",
            "'silu'",
        ),
        (
            NEOX | {"rotary_pct": 0.3},
            "rotary_pct",
            "a share that is an even number of the 16 elements of a head, since RoPE turns pairs",
            "0.3",
        ),
        (
            NEOX | {"rope_parameters": {"partial_rotary_factor": 1.5}},
            "rope_parameters.partial_rotary_factor",
            "a share that is an even number of the 16 elements of a head, since RoPE turns pairs",
            "1.5",
        ),
        (NEOX | {"rope_parameters": {"rope_theta": 3.0}, "rotary_pct": 2.0}, "rotary_pct", None, "2.0"),
        (NEOX | {"rotary_pct": 0}, "rotary_pct", "a finite number > 0", "0"),
        (BERT | {"position_embedding_type": "relative_key"}, "position_embedding_type", f"absolute: {ONLY}", None),
        (BERT | {"is_decoder": True}, "is_decoder", f"false: {ONLY}", "True"),
        (BERT | {"type_vocab_size": 0}, "type_vocab_size", "a whole number >= 1", "0"),
        (BERT | {"architectures": "BertForMaskedLM"}, "architectures", "a list of names", "'BertForMaskedLM'"),
        (MIXTRAL | {"num_local_experts": 1}, "num_local_experts", "a whole number >= 2", "1"),
        (MIXTRAL | {"num_experts": 5}, "num_experts", "the same as num_local_experts = 4, its other name", "5"),
        (
            MIXTRAL | {"num_experts_per_tok": 5},
            "num_experts_per_tok",
            "at most the 4 experts that a token may choose from",
            "5",
        ),
        (QWEN3_MOE | {"num_experts": 0}, "num_experts", "a whole number >= 2", "0"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step", "a whole number >= 1", "0"),
        (QWEN3_MOE | {"decoder_sparse_step": 7}, "decoder_sparse_step", "at least one of 6 layers with experts", "7"),
        (
            QWEN3_MOE | {"mlp_only_layers": [0, 1, 2, 3, 4, 5]},
            "mlp_only_layers",
            "at least one of 6 layers with experts",
            "[0, 1, 2, 3, 4, 5]",
        ),
        (QWEN3_MOE | {"mlp_only_layers": [5]}, "mlp_only_layers", FIRST, "[5]"),
        (QWEN3_MOE | {"mlp_only_layers": [0, 3]}, "mlp_only_layers", FIRST, "[0, 3]"),
        (QWEN3_MOE | {"mlp_only_layers": 3}, "mlp_only_layers", "a list of whole numbers", "3"),
        (V2 | {"norm_topk_prob": True}, "norm_topk_prob", None, "True"),
        (V2 | {"scoring_func": "sigmoid"}, "scoring_func", None, "'sigmoid'"),
        (V2 | {"mlp_bias": True}, "mlp_bias", f"false: {ONLY}", "True"),
        (V2 | {"topk_method": "noaux_tc"}, "topk_method", "one of greedy, group_limited_greedy", "'noaux_tc'"),
        (V2 | LIMITED | {"n_group": 5}, "n_group", "a divisor of n_routed_experts = 16", "5"),
        (V2 | LIMITED | {"topk_group": 5}, "topk_group", "at most n_group = 4", "5"),
        (
            V2 | LIMITED | {"topk_group": 1, "num_experts_per_tok": 5},
            "num_experts_per_tok",
            "at most the 4 experts that a token may choose from",
            "5",
        ),
        (V2 | LIMITED | {"n_group": None}, "n_group", "a whole number >= 1", "None"),
        (
            V2 | {"attention_bias": True},
            "attention_bias",
            "false: a bias within latent attention is not planned here",
            "True",
        ),
        (
            V2 | {"moe_layer_freq": 2},
            "moe_layer_freq",
            "1: transformers has experts in all layers after the first dense ones",
            "2",
        ),
        (V2 | {"qk_rope_head_dim": 5}, "qk_rope_head_dim", "an even number, since RoPE turns pairs", "5"),
        (V3 | {"scoring_func": "softmax"}, "scoring_func", None, "'softmax'"),
        (V3 | {"topk_method": "greedy"}, "topk_method", None, "'greedy'"),
        (V3 | {"first_k_dense_replace": 6}, "first_k_dense_replace", "fewer than num_hidden_layers = 6", "6"),
        (V3 | {"first_k_dense_replace": None}, "first_k_dense_replace", "a whole number >= 0", "None"),
        (
            V3 | {"num_key_value_heads": 2},
            "num_key_value_heads",
            "num_attention_heads = 6: each head has keys of its own in latent attention",
            "2",
        ),
        (V3 | {"q_lora_rank": 0}, "q_lora_rank", "a whole number >= 1", "0"),
        (V3 | {"v_head_dim": None}, "v_head_dim", "a whole number >= 1", "None"),
        (V3 | {"routed_scaling_factor": 0}, "routed_scaling_factor", "a finite number > 0", "0"),
        (V3 | {"hidden_act": "gelu"}, "hidden_act", "one of silu, swish", "'gelu'"),
        (
            MISTRAL | {"rope_scaling": LONG | {"long_factor": 2.0}},
            "rope_scaling.long_factor",
            "a list of numbers",
            "2.0",
        ),
        (
            MISTRAL | {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "many"}},
            "rope_scaling.beta_fast",
            "a finite number > 0",
            "'many'",
        ),
        (
            MISTRAL | {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}},
            "rope_scaling.truncate",
            "true or false",
            "1",
        ),
        (MISTRAL | {"partial_rotary_factor": 0.5}, "partial_rotary_factor", None, "0.5"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(
    tmp_path: Path, document: dict[str, Any], key: str, expected: str | None, got: str | None
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, document)
    assert caught.value.where == f"{tmp_path / 'small.json'}: {key}"
    assert expected in (None, caught.value.expected)
    assert got in (None, caught.value.got)


def test_a_stretch_says_by_how_much_and_has_no_key_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the key rope_scaling\.factor is missing"):
        read(tmp_path, MISTRAL | {"rope_scaling": {"type": "yarn"}})
    with pytest.raises(InputError, match=r"unknown key rope_scaling\.beta_fast"):
        read(tmp_path, MISTRAL | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}})
