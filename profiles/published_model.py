"""The architecture of a published run: a ModelSpec out of the columns of its row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .experts_spec import Experts
from .model import ModelSpec
from .published_runs import PublishedRun

# Names that begin so are of Llama's kind: SwiGLU, RMSNorm, RoPE, no biases. All others are of GPT's: GELU,
# LayerNorm, learned positions, biases, tied embeddings.
LLAMA_KIND = ("llama", "qwen", "mistral", "mixtral", "deep", "yi-", "gemma")
# Tokenizers of the two kinds: Llama 2's (arXiv 2307.09288, section 2.2) and GPT-2's.
_LLAMA_VOCABULARY, _GPT_VOCABULARY = 32000, 50257
# Trainers whose scripts take a SentencePiece tokenizer for GPT models too: sail-sg/zero-bubble-pipeline-parallelism,
# examples/pretrain_zero_bubble.sh. The parameters that arXiv 2401.10241, table 3, prints to 0.1e9 leave 27,000 to
# 35,000 rows for all four models, counted with one matrix for both ends.
_SENTENCEPIECE = ("zero-bubble",)
_NEEDED = ("layers", "hidden", "heads", "seq")


class NoModelError(Exception):
    """The row does not state enough of the architecture; the text says what is missing."""


def model_of(run: PublishedRun, known: Iterable[ModelSpec]) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model that the columns describe, and what of it the row did not state.

    A model with experts takes what no column has (shared experts, latent attention, the width of an expert) from
    the one of `known` that has its width, heads, experts and top_k.

    Raises:
        NoModelError: layers, hidden, heads or seq are blank, or widths that contradict each other.
    """
    missing = [column for column in _NEEDED if getattr(run, column) is None]
    if missing:
        raise NoModelError(f"{' and '.join(missing)} not stated")
    assert run.layers is not None
    assert run.hidden is not None
    assert run.heads is not None
    assert run.seq is not None
    if run.experts is not None:
        for other in known:
            if _same_experts(other, run):
                layers = replace(
                    other, name=run.model_name, layers=run.layers, vocab_size=run.vocab or other.vocab_size
                )
                return layers, (f"what no column has as {other.name}",)
    llama = run.model_name.lower().startswith(LLAMA_KIND)
    kv_heads = run.kv_heads or run.heads
    if run.hidden % run.heads or run.heads % kv_heads:
        raise NoModelError(f"hidden {run.hidden}, heads {run.heads} and kv_heads {kv_heads} do not divide")
    assumed = []
    ffn = run.ffn or _usual_ffn(run.hidden, llama)
    pieces = llama or run.software.startswith(_SENTENCEPIECE)
    vocabulary = run.vocab or (_LLAMA_VOCABULARY if pieces else _GPT_VOCABULARY)
    if run.ffn is None:
        assumed.append(f"ffn {ffn}")
    if run.vocab is None:
        assumed.append(f"vocab {vocabulary}")
    experts = None
    if run.experts is not None:
        top_k = run.topk or 2
        experts = Experts(number=run.experts, top_k=min(top_k, run.experts), ffn_hidden_size=ffn)
        if run.topk is None:
            assumed.append(f"topk {top_k}")
    model = ModelSpec(
        name=run.model_name or "unnamed",
        family="llama" if llama else "gpt2",
        layers=run.layers,
        hidden_size=run.hidden,
        ffn_hidden_size=ffn,
        heads=run.heads,
        kv_heads=kv_heads,
        head_dim=run.hidden // run.heads,
        vocab_size=vocabulary,
        max_positions=run.seq,
        norm="rmsnorm" if llama else "layernorm",
        activation="swiglu" if llama else "gelu_tanh",
        positions="rope" if llama else "learned",
        qkv_bias=not llama,
        attention_output_bias=not llama,
        mlp_bias=not llama,
        tied_embeddings=not llama,
        experts=experts,
        parallel_residual="parallel transformer block" in run.notes.lower(),
    )
    return (_tied_as_counted(model, run.params_B) if llama else model), tuple(assumed)


def _same_experts(model: ModelSpec, run: PublishedRun) -> bool:
    return (
        model.experts is not None
        and (model.hidden_size, model.heads) == (run.hidden, run.heads)
        and model.experts.number == run.experts
        and run.topk in (None, model.experts.top_k)
        and run.layers is not None
        and run.layers > model.experts.dense_layers
    )


def _usual_ffn(hidden: int, llama: bool) -> int:
    """4 h, or of three matrices 8 h / 3 rounded up to 256 (arXiv 2302.13971, section 2.2, and its code)."""
    return 256 * -(-8 * hidden // 768) if llama else 4 * hidden


def _tied_as_counted(model: ModelSpec, billions: float | None) -> ModelSpec:
    """The model with one embedding matrix for both ends where the stated number of parameters says so."""
    tied = replace(model, tied_embeddings=True)
    if billions is None or abs(tied.parameters / 1e9 - billions) >= abs(model.parameters / 1e9 - billions):
        return model
    return tied
