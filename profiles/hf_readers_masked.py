"""Hugging Face configs of masked language models: bert; megatron-bert."""

from __future__ import annotations

from .hf_parts import PLAIN_ACTIVATIONS, refuse_uneven_heads, refuse_unless
from .hf_readers_dense import NOTHING_ELSE
from .model import ModelSpec
from .store import Reader

# What has the head of next-sentence prediction beside that of masked tokens.
_BOTH_HEADS = ("BertForPreTraining", "MegatronBertForPreTraining")


def read_bert(reader: Reader, family: str, name: str) -> ModelSpec:
    """BERT: post-norm layers, a norm behind the embedding. Missing keys as in BertConfig of transformers 5.24."""
    return _read(reader, family, name, hidden=768, heads=12, layers=12, width=3072, vocab=30522, post=True)


def read_megatron_bert(reader: Reader, family: str, name: str) -> ModelSpec:
    """Megatron's BERT: a norm before each part of a layer, and a last one. Missing keys as in MegatronBertConfig."""
    return _read(reader, family, name, hidden=1024, heads=16, layers=24, width=4096, vocab=29056, post=False)


def _read(
    reader: Reader, family: str, name: str, *, hidden: int, heads: int, layers: int, width: int, vocab: int, post: bool
) -> ModelSpec:
    refuse_unless(reader, "position_embedding_type", "absolute", NOTHING_ELSE)
    refuse_unless(reader, "is_decoder", False, NOTHING_ELSE)
    refuse_unless(reader, "add_cross_attention", False, NOTHING_ELSE)
    hidden = reader.integer("hidden_size", minimum=1, default=hidden)
    heads = reader.integer("num_attention_heads", minimum=1, default=heads)
    refuse_uneven_heads(reader, "num_attention_heads", heads, hidden, "hidden_size")
    architectures = reader.anything("architectures", default=None) or []
    if not isinstance(architectures, list):
        raise reader.fail("architectures", "a list of names", architectures)
    return ModelSpec(
        name=name,
        family=family,
        layers=reader.integer("num_hidden_layers", minimum=1, default=layers),
        hidden_size=hidden,
        ffn_hidden_size=reader.integer("intermediate_size", minimum=1, default=width),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=reader.integer("vocab_size", minimum=2, default=vocab),
        max_positions=reader.integer("max_position_embeddings", minimum=1, default=512),
        norm="layernorm",
        norm_epsilon=reader.number("layer_norm_eps", above=0, default=1e-12),
        activation=PLAIN_ACTIVATIONS[reader.text("hidden_act", choices=PLAIN_ACTIVATIONS, default="gelu")],
        positions="learned",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied_embeddings=reader.boolean("tie_word_embeddings", default=True),
        bidirectional=True,
        norm_placement="post" if post else "pre",
        token_types=reader.integer("type_vocab_size", minimum=1, default=2),
        embedding_norm=post,
        output_transform=True,
        output_bias=True,
        next_sentence_head=any(architecture in _BOTH_HEADS for architecture in architectures),
    )
