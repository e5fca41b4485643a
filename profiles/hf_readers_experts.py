"""Hugging Face configs of decoders with experts: mixtral, qwen3_moe, gpt_oss, deepseek_v2, deepseek_v3."""

from __future__ import annotations

from dataclasses import replace

from .attention_spec import LatentAttention, RopeStretch
from .experts_spec import Experts
from .hf_parts import (
    FULL,
    GATED_ACTIVATIONS,
    SLIDING,
    aliased_integer,
    is_null,
    refuse_unless,
    window_by_layer,
    window_of_all,
)
from .hf_readers_dense import NOTHING_ELSE, RotaryDefaults, qwen_window_length, read_rotary, with_attention_bias
from .hf_rope import read_rope
from .model import ModelSpec
from .store import Reader

# MixtralConfig, Qwen3MoeConfig, GptOssConfig, DeepseekV2Config and DeepseekV3Config of transformers 5.23.
_MIXTRAL = RotaryDefaults(
    intermediate_size=14336, kv_heads=8, max_positions=4096 * 32, norm_epsilon=1e-5, rope_theta=1e6
)
_QWEN3_MOE = RotaryDefaults(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, layers=24, kv_heads=4, max_positions=32768
)
_GPT_OSS = RotaryDefaults(
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    layers=36,
    heads=64,
    kv_heads=8,
    head_dim=64,
    max_positions=131072,
    norm_epsilon=1e-5,
    rope_theta=150000.0,
    rope_stretch=RopeStretch(kind="yarn", factor=32.0, original_max_positions=4096, truncate=False),
)
_DEEPSEEK_V2 = RotaryDefaults(vocab_size=102400)
_DEEPSEEK_V3 = RotaryDefaults(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    layers=61,
    heads=128,
    kv_heads=128,
    max_positions=4096,
)
_GPT_OSS_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def read_mixtral(reader: Reader, family: str, name: str) -> ModelSpec:
    """Mistral's attention, experts in every layer."""
    spec = read_rotary(reader, family, name, _MIXTRAL)
    number = aliased_integer(reader, "num_local_experts", "num_experts", minimum=2, default=8)
    experts = Experts(
        number=number,
        top_k=_top_k(reader, number, default=2),
        ffn_hidden_size=spec.ffn_hidden_size,
    )
    return replace(spec, experts=experts, sliding_window=window_of_all(reader, spec.layers, missing=None))


def read_qwen3_moe(reader: Reader, family: str, name: str) -> ModelSpec:
    """Qwen3's attention; experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not list."""
    spec = with_attention_bias(reader, read_rotary(reader, family, name, _QWEN3_MOE))
    number = aliased_integer(reader, "num_experts", "num_local_experts", minimum=2, default=128)
    dense_layers, every = _qwen3_moe_layers(reader, spec.layers)
    experts = Experts(
        number=number,
        top_k=_top_k(reader, number, default=8),
        ffn_hidden_size=reader.integer("moe_intermediate_size", minimum=1, default=768),
        dense_layers=dense_layers,
        every=every,
        normalize_top_k=reader.boolean("norm_topk_prob", default=False),
    )
    length = qwen_window_length(reader)
    window = window_by_layer(reader, [FULL if length is None else SLIDING] * spec.layers, length=length)
    return replace(_with_experts(spec, experts), qk_norm=True, sliding_window=window)


def read_gpt_oss(reader: Reader, family: str, name: str) -> ModelSpec:
    """gpt-oss: attention sinks, a window in every other layer, experts with biases and a clamped SwiGLU."""
    spec = with_attention_bias(reader, read_rotary(reader, family, name, _GPT_OSS), default=True)
    for key, only in _GPT_OSS_SWIGLU.items():
        refuse_unless(reader, key, only, NOTHING_ELSE)
    number = aliased_integer(reader, "num_local_experts", "num_experts", minimum=2, default=128)
    experts = Experts(
        number=number,
        top_k=_top_k(reader, number, default=4),
        ffn_hidden_size=spec.ffn_hidden_size,
        router_bias=True,
        expert_bias=True,
    )
    kinds = [FULL if i % 2 else SLIDING for i in range(spec.layers)]
    null = is_null(reader, "sliding_window")
    length = None if null else reader.integer("sliding_window", minimum=1, default=128)
    return replace(
        spec,
        activation="clamped_swiglu",
        attention_sinks=True,
        experts=experts,
        sliding_window=window_by_layer(reader, kinds, length=length),
    )


def read_deepseek_v2(reader: Reader, family: str, name: str) -> ModelSpec:
    """DeepSeek-V2: latent attention; the first layers dense, then routed and shared experts, scored by softmax."""
    refuse_unless(reader, "norm_topk_prob", False, "the router of DeepSeek-V2 in transformers sums to no 1")
    refuse_unless(reader, "scoring_func", "softmax", "the router of DeepSeek-V2 in transformers has no other score")
    refuse_unless(reader, "mlp_bias", False, NOTHING_ELSE)
    method = reader.text("topk_method", choices=("greedy", "group_limited_greedy"), default="greedy")
    groups = top_groups = 1
    if method == "group_limited_greedy":
        groups, top_groups = reader.integer("n_group", minimum=1), reader.integer("topk_group", minimum=1)
    number = aliased_integer(reader, "n_routed_experts", "num_experts", minimum=2, default=64)
    experts = Experts(
        number=number,
        top_k=_top_k(reader, number, groups=groups, top_groups=top_groups),
        ffn_hidden_size=reader.integer("moe_intermediate_size", minimum=1, default=1407),
        shared=reader.integer("n_shared_experts", default=2),
        normalize_top_k=False,
        router_scale=reader.number("routed_scaling_factor", above=0, default=1.0),
        groups=groups,
        top_groups=top_groups,
    )
    return _read_deepseek(reader, family, name, _DEEPSEEK_V2, experts, first_dense=0)


def read_deepseek_v3(reader: Reader, family: str, name: str) -> ModelSpec:
    """DeepSeek-V3: V2 with sigmoid scores and a bias that only selects; multi-token prediction is left out.

    transformers' model has no multi-token prediction module either, however many `num_nextn_predict_layers`.
    """
    refuse_unless(reader, "scoring_func", "sigmoid", "the router of DeepSeek-V3 in transformers has no other score")
    refuse_unless(reader, "topk_method", "noaux_tc", "the router of DeepSeek-V3 in transformers selects no other way")
    groups = reader.integer("n_group", minimum=1, default=8)
    top_groups = reader.integer("topk_group", minimum=1, default=4)
    number = aliased_integer(reader, "n_routed_experts", "num_local_experts", minimum=2, default=256)
    experts = Experts(
        number=number,
        top_k=_top_k(reader, number, default=8, groups=groups, top_groups=top_groups),
        ffn_hidden_size=reader.integer("moe_intermediate_size", minimum=1, default=2048),
        shared=reader.integer("n_shared_experts", default=1),
        router_score="sigmoid",
        selection_bias=True,
        normalize_top_k=reader.boolean("norm_topk_prob", default=True),
        router_scale=reader.number("routed_scaling_factor", above=0, default=2.5),
        groups=groups,
        top_groups=top_groups,
    )
    return _read_deepseek(reader, family, name, _DEEPSEEK_V3, experts, first_dense=3)


def _read_deepseek(
    reader: Reader, family: str, name: str, defaults: RotaryDefaults, experts: Experts, *, first_dense: int
) -> ModelSpec:
    heads = reader.integer("num_attention_heads", minimum=1, default=defaults.heads)
    if not is_null(reader, "num_key_value_heads"):
        kv_heads = reader.integer("num_key_value_heads", minimum=1, default=defaults.kv_heads or heads)
        if kv_heads != heads:
            expected = f"num_attention_heads = {heads}: each head has keys of its own in latent attention"
            raise reader.fail("num_key_value_heads", expected, kv_heads)
    refuse_unless(reader, "attention_bias", False, "a bias within latent attention is not planned here")
    refuse_unless(reader, "moe_layer_freq", 1, "transformers has experts in all layers after the first dense ones")
    layers = reader.integer("num_hidden_layers", minimum=1, default=defaults.layers)
    dense_layers = reader.integer("first_k_dense_replace", default=first_dense)
    if dense_layers >= layers:
        raise reader.fail("first_k_dense_replace", f"fewer than num_hidden_layers = {layers}", dense_layers)
    null_rank = is_null(reader, "q_lora_rank")
    latent = LatentAttention(
        kv_lora_rank=reader.integer("kv_lora_rank", minimum=1, default=512),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim", minimum=1, default=128),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim", minimum=2, default=64),
        v_head_dim=reader.integer("v_head_dim", minimum=1, default=128),
        q_lora_rank=None if null_rank else reader.integer("q_lora_rank", minimum=1, default=1536),
    )
    if latent.qk_rope_head_dim % 2:
        raise reader.fail("qk_rope_head_dim", "an even number, since RoPE turns pairs", latent.qk_rope_head_dim)
    max_positions = reader.integer("max_position_embeddings", minimum=1, default=defaults.max_positions)
    rope = read_rope(reader, max_positions)
    spec = ModelSpec(
        name=name,
        family=family,
        layers=layers,
        hidden_size=reader.integer("hidden_size", minimum=1, default=defaults.hidden_size),
        ffn_hidden_size=reader.integer("intermediate_size", minimum=1, default=defaults.intermediate_size),
        heads=heads,
        kv_heads=heads,
        head_dim=latent.qk_head_dim,
        vocab_size=reader.integer("vocab_size", minimum=2, default=defaults.vocab_size),
        max_positions=max_positions,
        norm="rmsnorm",
        norm_epsilon=reader.number("rms_norm_eps", above=0, default=defaults.norm_epsilon),
        activation=GATED_ACTIVATIONS[reader.text("hidden_act", choices=GATED_ACTIVATIONS, default="silu")],
        positions="rope",
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_stretch=rope.stretch,
        latent_attention=latent,
        tied_embeddings=reader.boolean("tie_word_embeddings", default=False),
    )
    return _with_experts(spec, replace(experts, dense_layers=dense_layers))


# ---- parts ---------------------------------------------------------------------------------------------


def _with_experts(spec: ModelSpec, experts: Experts) -> ModelSpec:
    """The model with these experts; where no layer is dense, the width of a dense one is not used."""
    width = experts.ffn_hidden_size if experts.everywhere else spec.ffn_hidden_size
    return replace(spec, experts=experts, ffn_hidden_size=width)


def _top_k(reader: Reader, number: int, *, groups: int = 1, top_groups: int = 1, default: int | None = None) -> int:
    """Experts of a token; more than those of its groups cannot be. Without a default the file must say."""
    if number % groups:
        raise reader.fail("n_group", f"a divisor of n_routed_experts = {number}", groups)
    if top_groups > groups:
        raise reader.fail("topk_group", f"at most n_group = {groups}", top_groups)
    missing = {} if default is None else {"default": default}
    top_k = reader.integer("num_experts_per_tok", minimum=1, **missing)
    within = number // groups * top_groups
    if top_k > within:
        raise reader.fail("num_experts_per_tok", f"at most the {within} experts that a token may choose from", top_k)
    return top_k


def _qwen3_moe_layers(reader: Reader, layers: int) -> tuple[int, int]:
    """`dense_layers` and `every`: layer i (from 0) has experts if the step divides i + 1 and i is not listed."""
    step = reader.integer("decoder_sparse_step", minimum=1, default=1)
    listed = reader.anything("mlp_only_layers", default=None)
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise reader.fail("mlp_only_layers", "a list of whole numbers", listed)
    sparse = [i for i in range(layers) if (i + 1) % step == 0]
    left = [i for i in sparse if i not in listed]
    if not left:
        key, got = ("mlp_only_layers", listed) if sparse else ("decoder_sparse_step", step)
        raise reader.fail(key, f"at least one of {layers} layers with experts", got)
    if left != sparse[-len(left) :]:
        expected = "the first layers alone: dense ones after the first with experts are not planned here"
        raise reader.fail("mlp_only_layers", expected, listed)
    return left[0] + 1 - step, step
