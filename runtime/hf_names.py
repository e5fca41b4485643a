"""Hugging Face state dicts -> our parameters: names, and matrices that are fused, transposed or stacked there."""

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
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
    "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
    "mlp.gate": "mlp.router",
    "mlp.shared_experts.gate_proj": "mlp.shared.w1",
    "mlp.shared_experts.up_proj": "mlp.shared.w3",
    "mlp.shared_experts.down_proj": "mlp.shared.w2",
}
_LLAMA_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Experts are stacked [experts, outputs, inputs]; gate_up_proj is w1 above w3.
_EXPERTS_PATTERN = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_SELECTION_PATTERN = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias")

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
    """(our name, tensor) for every tensor of the state dict of a Hugging Face model that the runtime trains.

    The families llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, deepseek_v2 and deepseek_v3 share their names.
    With `tied` the head's own tensor, the embedding's again, is left out. Raises KeyError on a tensor that
    the family does not have.
    """
    convert = _from_gpt2 if family == "gpt2" else _from_llama
    for name, tensor in tensors.items():
        for ours, part in convert(name, tensor):
            if not (tied and ours == "head.weight"):
                yield ours, part


def _from_llama(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if match := _EXPERTS_PATTERN.fullmatch(name):
        block, matrix = match.groups()
        names = ("w2",) if matrix == "down_proj" else ("w1", "w3")
        for ours, part in zip(names, tensor.chunk(len(names), dim=1), strict=True):
            yield f"blocks.{block}.mlp.experts.{ours}", part
    elif match := _SELECTION_PATTERN.fullmatch(name):
        yield f"blocks.{match.group(1)}.mlp.router.selection_bias", tensor
    elif match := _LLAMA_PATTERN.fullmatch(name):
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
