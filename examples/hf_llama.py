"""python cli.py plan --model examples.hf_llama:build --cluster local --global-batch 16 --seq 256 -o plan.yaml

A Llama of Hugging Face transformers, which brings all that training needs. It reads bytes, as text without a tokenizer
is given to a run.
"""

from __future__ import annotations

from torch import nn


def build() -> nn.Module:
    """8 blocks of width 256: 6 million parameters, drawn as transformers draws them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config)
