"""Plans for tests of the runtime: real model, layout and stages; made-up cluster, prediction and certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import TIME_PARTS, Certificate, Plan, Prediction, Stage
from planner.rules import RuleContext, violations
from profiles.attention_spec import LatentAttention, RopeStretch, SlidingWindow
from profiles.cluster import ClusterSpec, LinkTier
from profiles.experts_spec import Experts
from profiles.model import ModelSpec
from profiles.traced_model import BytesByPrecision, Product, TracedModel, TracedPart, traced_model


def tiny_llama(**changes: Any) -> ModelSpec:
    """4 blocks of width 32: grouped queries, SwiGLU, RMSNorm, RoPE."""
    fields: dict[str, Any] = {
        "name": "tiny-llama",
        "family": "llama",
        "layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "max_positions": 64,
    }
    return ModelSpec(**(fields | changes))


def tiny_gpt2(**changes: Any) -> ModelSpec:
    """4 blocks of width 32 as in GPT-2: LayerNorm, tanh GELU, learned positions, biases, tied embeddings."""
    fields: dict[str, Any] = {
        "name": "tiny-gpt2",
        "family": "gpt2",
        "kv_heads": 4,
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "positions": "learned",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tied_embeddings": True,
    }
    return tiny_llama(**(fields | changes))


def tiny_megatron_bert(**changes: Any) -> ModelSpec:
    """tiny-gpt2 made a masked language model, as Megatron's BERT: all attend to all, GELU, token types, MLM head."""
    fields: dict[str, Any] = {
        "name": "tiny-megatron-bert",
        "family": "megatron-bert",
        "activation": "gelu",
        "bidirectional": True,
        "token_types": 2,
        "output_transform": True,
        "output_bias": True,
    }
    return tiny_gpt2(**(fields | changes))


def tiny_bert(**changes: Any) -> ModelSpec:
    """The same with norms behind the sums, and one behind the embedding, as in BERT itself."""
    fields = {"name": "tiny-bert", "family": "bert", "norm_placement": "post", "embedding_norm": True}
    return tiny_megatron_bert(**(fields | changes))


def tiny_experts(**changes: Any) -> ModelSpec:
    """tiny-llama with 4 experts of width 48 in every layer, two of them for a token, as in Mixtral."""
    return tiny_llama(**({"name": "tiny-experts", "ffn_hidden_size": 48, "experts": MIXTRAL_EXPERTS} | changes))


def tiny_shared_experts(**changes: Any) -> ModelSpec:
    """A dense layer, then 8 experts scored by sigmoid in 4 groups beside a shared one, as in DeepSeek-V3; QK norm."""
    return tiny_llama(**({"name": "tiny-shared", "qk_norm": True, "experts": DEEPSEEK_EXPERTS} | changes))


def tiny_gpt_oss(**changes: Any) -> ModelSpec:
    """Experts with biases and a clamped SwiGLU, sinks, a window in every other layer, YaRN, as in gpt-oss."""
    fields: dict[str, Any] = {
        "name": "tiny-gpt-oss",
        "family": "gpt_oss",
        "activation": "clamped_swiglu",
        "experts": replace(MIXTRAL_EXPERTS, router_bias=True, expert_bias=True),
        "attention_sinks": True,
        "sliding_window": SlidingWindow(length=5, full_every=2),
        "rope_stretch": RopeStretch(kind="yarn", factor=4.0, original_max_positions=8, truncate=False),
        "qkv_bias": True,
        "attention_output_bias": True,
    }
    return tiny_experts(**(fields | changes))


def tiny_latent(**changes: Any) -> ModelSpec:
    """The same experts under multi-head latent attention, as in DeepSeek-V3."""
    latent = LatentAttention(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, q_lora_rank=12)
    fields: dict[str, Any] = {"name": "tiny-latent", "kv_heads": 4, "head_dim": 12, "qk_norm": False}
    return tiny_shared_experts(**(fields | {"latent_attention": latent} | changes))


def tiny_traced(**changes: Any) -> TracedModel:
    """4 blocks of two linears over 16 tokens of width 32, of a factory that there is not."""
    nothing = BytesByPrecision(fp32=0, bf16=0)
    fields: dict[str, Any] = {"attention": (), "kernels": (), "moved_bytes": nothing, "passing_bytes": nothing}
    products = tuple(
        Product(module=name, rows=16, outputs=outputs, inputs=inputs)
        for name, outputs, inputs in (("up", 66, 32), ("down", 32, 66))
    )
    end = TracedPart(parameters=320, tensors=1, largest_parameter=320, products=(), kept_bytes=nothing, **fields)
    block = TracedPart(
        parameters=2 * 66 * 32,
        tensors=2,
        largest_parameter=66 * 32,
        products=products,
        kept_bytes=BytesByPrecision(fp32=4 * 16 * 164, bf16=2 * 16 * 164),
        **fields,
    )
    found: dict[str, Any] = {
        "name": "Tiny",
        "factory": "tiny:build",
        "block_list": "blocks",
        "layers": 4,
        "vocab_size": 10,
        "tied_embeddings": False,
        "input_shape": (16,),
        "input_dtype": "int64",
        "target_shape": (16,),
        "target_dtype": "int64",
        "stream_shape": (16, 32),
        "stream_argument": "0",
        "block_returns": 0,
        "reads_tokens": True,
        "tp_plan": (("down", "rowwise"), ("up", "colwise")),
        "tp_heads": False,
        "before": end,
        "block": block,
        "after": end,
    }
    return traced_model(**(found | changes))


MIXTRAL_EXPERTS = Experts(number=4, top_k=2, ffn_hidden_size=48)
DEEPSEEK_EXPERTS = Experts(
    number=8,
    top_k=3,
    ffn_hidden_size=16,
    shared=1,
    dense_layers=1,
    router_score="sigmoid",
    selection_bias=True,
    router_scale=1.5,
    groups=4,
    top_groups=2,
)


def make_plan(
    model: ModelSpec,
    layout: Layout,
    job: TrainingJob,
    cuts: Sequence[int] | None = None,
    recompute: Sequence[int] | None = None,
    selective: Sequence[int] | None = None,
    *,
    check: bool = True,
) -> Plan:
    """A plan on layout.world_size devices, legal but without `check`.

    `cuts` are the block indices where a new stage begins (even by default); `recompute` and `selective` are how many
    blocks of each stage recompute in full and selectively (none by default).
    """
    cluster = ClusterSpec(
        name="test",
        hardware="test",
        nodes=1,
        devices_per_node=layout.world_size,
        memory_bytes=1e9,
        links=(LinkTier(tier="node", span=layout.world_size, bandwidth_bytes_per_second=1e9, latency_seconds=1e-3),),
    )
    reasons = violations(layout, RuleContext(model, job, layout.world_size))
    assert not (check and reasons), reasons
    count, pipeline = layout.stages, layout.pipeline(1)
    ends = [0, *(cuts or [model.layers * i // count for i in range(1, count)]), model.layers]
    full, partly = recompute or [0] * count, selective or [0] * count
    stages = tuple(
        Stage(
            rank=pipeline.rank_of(place),
            chunk=layout.stages_of(pipeline.rank_of(place)).index(place),
            first=ends[place],
            end=ends[place + 1],
            embedding=place == 0,
            head=place == count - 1,
            recompute_none=ends[place + 1] - ends[place] - full[place] - partly[place],
            recompute_selective=partly[place],
            recompute_full=full[place],
        )
        for place in range(count)
    )
    prediction = Prediction(
        step_seconds=1.0,
        tokens_per_second_per_device=1.0,
        model_tflops_per_device=1.0,
        mfu=0.5,
        peak_memory_bytes=1e6,
        breakdown_seconds=dict.fromkeys(TIME_PARTS, 0.0) | {"compute": 1.0},
        memory_bytes=({"weights": 1e6},) * layout.pp,
    )
    certificate = Certificate(
        objective_seconds=1.0,
        bound_seconds=1.0,
        gap=0.0,
        layouts_legal=1,
        layouts_pruned_memory=0,
        layouts_pruned_bound=0,
        ilps_solved=1,
        solver="none",
        solve_seconds=0.0,
    )
    return Plan(
        model=model,
        cluster=cluster,
        job=job,
        layout=layout,
        stages=stages,
        prediction=prediction,
        certificate=certificate,
    )
