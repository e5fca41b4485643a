"""Capabilities: what each target executor trains; the planner proposes nothing else for it."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a target trains today.

    `software` names its entry in the catalogue of trainers: the facts that its costs follow. `zero` and
    `zero_with_pipeline` are levels, and `zero_reason` says why a level that exists elsewhere does not here.
    """

    software: str
    schedules: tuple[str, ...]
    recompute: tuple[str, ...]
    precisions: tuple[str, ...]
    zero: tuple[int, ...]
    zero_with_pipeline: tuple[int, ...]
    zero_reason: str
    cp_styles: tuple[str, ...] = ()
    experts: bool = False
    expert_tp: bool = False  # etp may be tp as well as 1
    experts_need_sequence_parallel: bool = False
    experts_with_selective: bool = True  # whether layers with experts may recompute selectively
    windows_of_whole_sequences: bool = False  # no window and no sinks around a ring, both ways or on a latent
    vocabulary_padding: bool = False
    fp8_whole: bool = False  # fp8 in dense blocks that nothing cuts over tp, and in whole backwards, alone


# One row a target. What the runtime here cannot train yet joins its row when it can.
CAPABILITIES = {
    "meshwright": Capabilities(
        software="meshwright",
        schedules=("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb1p", "zbv", "dualpipev"),
        recompute=("none", "selective", "full"),
        precisions=("fp32", "bf16", "fp16", "fp8"),
        zero=(0, 1, 2, 3),
        zero_with_pipeline=(0, 1, 3),
        zero_reason="torch's pipeline keeps gradients unsharded until the last microbatch, so zero 2 is zero 1 there; "
        "ask for zero=1",
        cp_styles=("ring", "all-to-all"),
        experts=True,
        expert_tp=True,
        experts_need_sequence_parallel=True,
        experts_with_selective=False,
        windows_of_whole_sequences=True,
        fp8_whole=True,
    ),
    # Megatron-LM core: --use-distributed-optimizer is zero 1, --num-distributed-optimizer-instances its HSDP.
    "megatron": Capabilities(
        software="megatron-core-2025",
        schedules=("1f1b", "interleaved-1f1b"),
        recompute=("none", "selective", "full"),
        precisions=("fp32", "bf16", "fp16", "fp8"),
        zero=(0, 1),
        zero_with_pipeline=(0, 1),
        zero_reason="Megatron-LM's distributed optimizer is zero 1; ask for zero=0 or zero=1",
        cp_styles=("ring", "all-to-all"),
        experts=True,
        expert_tp=True,
        experts_need_sequence_parallel=True,
        vocabulary_padding=True,
    ),
    # torchtitan: FSDP2 that reshards after forward or not, HSDP by data_parallel_replicate_degree.
    "torchtitan": Capabilities(
        software="torchtitan-2024",
        schedules=("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb1p", "zbv", "dualpipev"),
        recompute=("none", "selective", "full"),
        precisions=("fp32", "bf16", "fp8"),
        zero=(0, 2, 3),
        zero_with_pipeline=(0, 1),
        zero_reason="torchtitan reshards after forward (zero 3) or not (zero 2, under torch's pipeline zero 1)",
        cp_styles=("ring",),
    ),
}


# What a model may have beyond a dense, causal pre-norm decoder (`ModelSpec.features`) -> the executors that train
# it. Beside megatron stands the argument of Megatron-LM's own training scripts that switches it on.
FEATURES: dict[str, tuple[str, ...]] = {
    # --num-experts, with all that the router may be: --moe-router-*, --moe-layer-freq
    "experts": ("meshwright", "megatron"),
    "latent attention": ("meshwright", "megatron"),  # --multi-latent-attention
    "sliding-window attention": ("meshwright", "megatron"),  # --window-size, --window-attn-skip-freq
    "QK norm": ("meshwright", "megatron"),  # --qk-layernorm
    "attention sinks": ("meshwright", "megatron"),  # --softmax-type learnable
    "bidirectional attention": ("meshwright", "megatron"),  # pretrain_bert.py, as all that BERT has
    "ALiBi positions": (),
    # --rope-type yarn, with latent attention; --position-embedding-type yarn
    "YaRN positions": ("meshwright", "megatron"),
    "linearly stretched positions": ("meshwright", "megatron"),  # --rotary-seq-len-interpolation-factor
    "dynamically stretched positions": (),
    "LongRoPE positions": (),
    "partial rotary positions": ("megatron",),  # --rotary-percent
    "parallel residuals": (),
    "post-norm layers": ("meshwright", "megatron"),  # --apply-residual-connection-post-layernorm
    "ReLU": (),
    "clamped SwiGLU": ("meshwright", "megatron"),  # --quick-geglu, --glu-linear-offset, --activation-func-clamp-value
    "offset positions": (),
    "token types": ("meshwright", "megatron"),
    "embedding norm": (),
    "output transform": ("meshwright", "megatron"),
    "output bias": ("meshwright", "megatron"),
    "next-sentence head": ("megatron",),  # without --bert-no-binary-head
    "a module of its own": ("meshwright",),  # of any package, by --model package.module:factory
}


def missing_features(model: ModelSpec, executor: str) -> tuple[str, ...]:
    """What the model has and the executor does not train today; empty when it trains the model."""
    return tuple(feature for feature in model.features if executor not in FEATURES[feature])


def able_targets(model: ModelSpec) -> tuple[str, ...]:
    """The targets that train every feature of the model."""
    return tuple(target for target in CAPABILITIES if not missing_features(model, target))
