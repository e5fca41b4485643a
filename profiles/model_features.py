"""What a model has and the dense, causal pre-norm decoder has not, in words for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .attention_spec import STRETCHES

if TYPE_CHECKING:
    from .model import ModelSpec


def features_of(model: ModelSpec) -> tuple[str, ...]:
    """The features of `ModelSpec.features`; which target trains each is in planner/capabilities.py."""
    stretch = model.rope_stretch.kind if model.rope_stretch else None
    used = {
        "experts": model.experts is not None,
        "latent attention": model.latent_attention is not None,
        "sliding-window attention": model.sliding_window is not None,
        "QK norm": model.qk_norm,
        "attention sinks": model.attention_sinks,
        "bidirectional attention": model.bidirectional,
        "ALiBi positions": model.positions == "alibi",
        **{words: stretch == kind for kind, words in STRETCHES.items()},
        "partial rotary positions": model.rotary_fraction != 1.0,
        "parallel residuals": model.parallel_residual,
        "post-norm layers": model.norm_placement == "post",
        "ReLU": model.activation == "relu",
        "clamped SwiGLU": model.activation == "clamped_swiglu",
        "offset positions": model.position_offset > 0,
        "token types": model.token_types > 0,
        # Of post-norm layers the embedding's norm is the first: there it is no feature of its own.
        "embedding norm": model.embedding_norm and model.norm_placement == "pre",
        "output transform": model.output_transform,
        "output bias": model.output_bias,
        "next-sentence head": model.next_sentence_head,
    }
    return tuple(feature for feature, has in used.items() if has)
