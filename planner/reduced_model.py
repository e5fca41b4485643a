"""A model at reduced size: few of everything, of the same kinds."""

from __future__ import annotations

from dataclasses import replace

from profiles.attention_spec import LatentAttention
from profiles.experts_spec import Experts
from profiles.model import ModelSpec

from .layout import Layout

# What is small enough to run at once and large enough that no axis of at most 8 ranks gets an empty share.
_HEAD_DIM, _ROWS, _EXPERT_WIDTH = 8, 64, 16
_PRIME_ROWS = 61  # no tp from 2 to 8 divides it, and each leaves the last rank some
_LATENT = LatentAttention(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
_QUERY_RANK = 12


def small_model(model: ModelSpec, before: Layout, layout: Layout, layers: int, max_positions: int) -> ModelSpec:
    """The model with `layers` blocks for `layout`, which takes the place of `before`.

    Kept are the grouping of heads and whether ranks share key-value heads, whether tp divides the vocabulary, and all
    that a model is besides its sizes.
    """
    tp = layout.tp
    heads, kv_heads = _heads(model, _ranks_of_heads(before), _ranks_of_heads(layout))
    latent = model.latent_attention
    if latent is not None:
        latent = replace(_LATENT, q_lora_rank=None if latent.q_lora_rank is None else _QUERY_RANK)
    hidden = heads * _HEAD_DIM
    if model.query_width != model.hidden_size:
        hidden += _HEAD_DIM
    width = _round_up(2 * hidden, tp)
    experts = None if model.experts is None else _few_experts(model.experts, layout, before.ep, layers)
    if experts is not None and experts.everywhere:
        width = experts.ffn_hidden_size
    return replace(
        model,
        name=f"{model.name} reduced",
        layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_HEAD_DIM if latent is None else latent.qk_head_dim,
        vocab_size=_round_up(_ROWS, tp) if model.vocab_size % before.tp == 0 else _PRIME_ROWS,
        max_positions=max_positions,
        experts=experts,
        latent_attention=latent,
    )


def _ranks_of_heads(layout: Layout) -> int:
    """Ranks that heads are cut over."""
    return layout.tp * (layout.cp if layout.cp_style == "all-to-all" else 1)


def _heads(model: ModelSpec, ranks_before: int, ranks: int) -> tuple[int, int]:
    """(heads, key-value heads), grouped as the model's and shared by ranks as there."""
    shared = ranks_before // model.kv_heads  # ranks to a key-value head
    if shared > 1:
        return (ranks if model.heads == ranks_before else 2 * ranks), (ranks // 2 if ranks % 2 == 0 else 1)
    kv_heads = ranks if model.kv_heads == ranks_before else 2 * ranks
    return (kv_heads if model.heads == model.kv_heads else 2 * kv_heads), kv_heads


def _few_experts(experts: Experts, layout: Layout, ep_before: int, layers: int) -> Experts:
    """At most two experts a rank, as long as routing has a choice; a dense layer before them where there are some."""
    top_k, top_groups = min(experts.top_k, 2), min(experts.top_groups, 2)
    groups = min(experts.groups, top_groups if experts.top_groups == experts.groups else 2 * top_groups)
    number = layout.ep * min(experts.number // ep_before, 2)
    while number <= top_k or number % groups or number // groups * top_groups < top_k:
        number += layout.ep
    dense = min(experts.dense_layers, 1, layers - 1)
    shared = experts.shared_ffn_hidden_size
    width = _round_up(_EXPERT_WIDTH, layout.tp)
    return replace(
        experts,
        number=number,
        top_k=top_k,
        ffn_hidden_size=width,
        shared=min(experts.shared, 2),
        shared_ffn_hidden_size=None if shared is None else 2 * width,
        dense_layers=dense,
        every=min(experts.every, 2, layers - dense),
        groups=groups,
        top_groups=top_groups,
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
