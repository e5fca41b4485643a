"""Parameters and FLOPs of small models of every family beside what torch counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from profiles.attention_spec import LatentAttention, SlidingWindow
from profiles.experts_spec import Experts
from profiles.model import ModelSpec
from tests.transformers_models import transformers_model

from .plans import tiny_bert, tiny_gpt2, tiny_llama, tiny_megatron_bert

LATENT = LatentAttention(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7)


def tiny_mixture(family: str = "mixtral", **changes: Any) -> ModelSpec:
    experts = Experts(number=3, top_k=2, ffn_hidden_size=24)
    return tiny_llama(family=family, layers=2, **({"ffn_hidden_size": 24, "experts": experts} | changes))


def tiny_deepseek(family: str, **latent: Any) -> ModelSpec:
    return tiny_llama(
        family=family,
        layers=2,
        kv_heads=4,
        head_dim=10,
        latent_attention=replace(LATENT, **latent),
        experts=Experts(number=3, top_k=2, ffn_hidden_size=24, shared=2, dense_layers=1),
    )


TINY = [
    tiny_llama(family="qwen3", layers=2, qk_norm=True),
    tiny_llama(family="mistral", layers=2, sliding_window=SlidingWindow(length=64)),
    tiny_mixture(),
    tiny_mixture("qwen3_moe", qk_norm=True),
    replace(
        tiny_mixture("qwen3_moe", qk_norm=True, ffn_hidden_size=40),
        layers=5,
        experts=Experts(number=3, top_k=2, ffn_hidden_size=24, every=2),
    ),
    tiny_deepseek("deepseek_v3"),
    tiny_deepseek("deepseek_v2"),
    tiny_deepseek("deepseek_v2", q_lora_rank=None),
    tiny_mixture(
        "gpt_oss",
        qkv_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        activation="clamped_swiglu",
        sliding_window=SlidingWindow(length=64, full_every=2),
        experts=Experts(number=3, top_k=2, ffn_hidden_size=24, router_bias=True, expert_bias=True),
    ),
    tiny_bert(layers=2),
    tiny_megatron_bert(layers=2),
    tiny_bert(layers=2, next_sentence_head=True),
    tiny_megatron_bert(layers=2, next_sentence_head=True),
    tiny_gpt2(
        family="gpt_neox",
        layers=2,
        positions="rope",
        rotary_fraction=0.5,
        parallel_residual=True,
        tied_embeddings=False,
    ),
    tiny_gpt2(family="opt", layers=2, activation="relu", position_offset=2),
    tiny_gpt2(family="bloom", layers=2, positions="alibi", embedding_norm=True, ffn_hidden_size=128),
]


@pytest.mark.parametrize("spec", TINY, ids=[f"{i}-{spec.family}" for i, spec in enumerate(TINY)])
def test_parameters_and_step_flops_of_a_small_one_are_what_torch_counts(spec: ModelSpec) -> None:
    """Attention in plain matmuls and experts in a loop, so that the counter sees each product."""
    batch, sequence = 2, 8
    extra = {"experts_implementation": "eager"} if spec.experts else {}
    model = transformers_model(spec, attn_implementation="eager", **extra)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.arange(batch * sequence).reshape(batch, sequence) % spec.vocab_size
    with FlopCounterMode(display=False) as counter:
        if spec.next_sentence_head:
            model(input_ids=tokens, labels=tokens, next_sentence_label=torch.zeros(batch).long()).loss.backward()
        else:
            model(input_ids=tokens, labels=tokens).loss.backward()
    assert counter.get_total_flops() == spec.step_flops(batch, sequence)


def test_a_window_cuts_the_attention_of_its_layers() -> None:
    full = tiny_llama(layers=5)
    windowed = replace(full, sliding_window=SlidingWindow(length=8, full_every=2))
    saved = full.step_flops(4, 32) - windowed.step_flops(4, 32)
    assert saved == 12.0 * full.query_width * 3 * (32 - 8) * 4 * 32  # 3 of 5 layers, 4 sequences of 32 tokens
    assert windowed.step_flops(4, 8) == full.step_flops(4, 8)
