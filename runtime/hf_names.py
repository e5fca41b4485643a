"""Hugging Face state dicts -> our parameters: names, and for GPT-2 transposed and fused matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

_LLAMA_TOP = {
    "model.embed_tokens.weight": "embedding.tokens.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_LLAMA_BLOCK = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
_LLAMA_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")

_GPT2_TOP = {
    "wte.weight": "embedding.tokens.weight",
    "wpe.weight": "embedding.positions.weight",
    "ln_f.weight": "norm.weight",
    "ln_f.bias": "norm.bias",
    "lm_head.weight": "head.weight",
}
# Its linears are Conv1D, stored [inputs, outputs]; c_attn is wq, wk and wv side by side.
_GPT2_NORMS = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}
_GPT2_LINEARS = {
    "attn.c_attn": ("attention.wq", "attention.wk", "attention.wv"),
    "attn.c_proj": ("attention.wo",),
    "mlp.c_fc": ("mlp.w1",),
    "mlp.c_proj": ("mlp.w2",),
}
_GPT2_PATTERN = re.compile(r"h\.(\d+)\.(.+)\.(weight|bias)")


def from_hugging_face(
    family: str, tensors: Mapping[str, torch.Tensor], *, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, tensor) for every parameter of a Hugging Face state dict of `family` llama, mistral, qwen2 or gpt2.

    With `tied` the head's own tensor, the embedding's again, is left out. Raises KeyError on a tensor that
    the family does not have.
    """
    convert = _from_gpt2 if family == "gpt2" else _from_llama
    for name, tensor in tensors.items():
        for ours, part in convert(name, tensor):
            if not (tied and ours == "head.weight"):
                yield ours, part


def _from_llama(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Llama, Mistral, which has the same names, and Qwen2, which only adds biases."""
    if match := _LLAMA_PATTERN.fullmatch(name):
        block, module, kind = match.groups()
        yield f"blocks.{block}.{_LLAMA_BLOCK[module]}.{kind}", tensor
    else:
        yield _LLAMA_TOP[name], tensor


def _from_gpt2(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    name = name.removeprefix("transformer.")
    match = _GPT2_PATTERN.fullmatch(name)
    if match is None:
        yield _GPT2_TOP[name], tensor
        return
    block, module, kind = match.groups()
    if module in _GPT2_NORMS:
        yield f"blocks.{block}.{_GPT2_NORMS[module]}.{kind}", tensor
        return
    targets = _GPT2_LINEARS[module]
    for target, part in zip(targets, tensor.chunk(len(targets), dim=-1), strict=True):
        yield f"blocks.{block}.{target}.{kind}", part.t().contiguous() if kind == "weight" else part
