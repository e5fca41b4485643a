"""What one rank holds of a layer: tokens, heads, and the shape of each linear after tp, cp, ep and etp."""

from __future__ import annotations

from profiles.masked_language import head_tokens
from profiles.model import ModelSpec
from profiles.software import Software

from .job import TrainingJob
from .layout import LOSS_TOKENS, Layout

# Linears whose input is cut over tp; the others' output is, but for those of a latent, which every rank holds whole.
ROW_WISE = ("wo", "w2")
WHOLE = ("wq_a", "wkv_a")


def local_tokens(layout: Layout, sequence: int) -> float:
    """Tokens of one microbatch that a rank's products see."""
    return layout.micro_batch * sequence / layout.cp


def outside_tokens(layout: Layout, sequence: int) -> float:
    """Tokens between the products cut by tp: all, or the rank's share with sequence parallelism."""
    tokens = local_tokens(layout, sequence)
    return tokens / layout.tp if layout.sequence_parallel else tokens


def predicted_by_head(layout: Layout, model: ModelSpec, sequence: int, software: Software) -> float:
    """Tokens of one microbatch at which a rank's head looks."""
    if not (model.bidirectional and software.head_of_predicted):
        return local_tokens(layout, sequence)
    return layout.micro_batch * head_tokens(model, sequence, layout.cp)


def loss_pieces(tokens: float) -> tuple[tuple[int, int], ...]:
    """(tokens, how many) of the pieces in which our runtime computes its loss: whole ones, and what is left."""
    whole, rest = divmod(round(tokens), LOSS_TOKENS)
    return tuple((rows, number) for rows, number in ((LOSS_TOKENS, whole), (rest, 1)) if rows * number)


def routed_tokens(layout: Layout, model: ModelSpec, job: TrainingJob) -> float:
    """Rows that the experts of the busiest rank see of one microbatch.

    The ep·etp ranks of an expert group send each of their tokens to top_k experts; balanced, each of the ep places
    gets its share. `expert_imbalance` is what the fullest gets over that; a capacity pads or drops to its own.
    """
    assert model.experts is not None
    each = outside_tokens(layout, job.sequence) * model.experts.top_k
    return each * layout.etp * (job.expert_capacity or job.expert_imbalance)


def local_kv_width(model: ModelSpec, tp: int) -> int:
    """Key (or value) elements per token that a rank uses: its share, one head at least."""
    return max(model.kv_width // tp, model.head_dim)


def attended_width(model: ModelSpec, tp: int) -> float:
    """Elements of a token's keys and values as attention takes them, on one tp rank; of a latent those of each head."""
    if model.latent_attention is not None:
        return model.heads / tp * (model.head_dim + model.value_head_dim)
    return 2 * local_kv_width(model, tp)


def local_linear_shape(model: ModelSpec, name: str, tp: int) -> tuple[int, int]:
    """(outputs, inputs) of a dense layer's linear on one tp rank.

    With fewer key-value heads than tp every rank holds wk and wv whole.
    """
    outputs, inputs = model.linear_shapes[name]
    if name in ROW_WISE:
        return outputs, inputs // tp
    if name in WHOLE or (name in ("wk", "wv") and model.kv_heads % tp):
        return outputs, inputs
    return outputs // tp, inputs


def expert_linear_shapes(model: ModelSpec, etp: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of each matrix of one expert on one etp rank."""
    assert model.experts is not None
    width, hidden = model.experts.ffn_hidden_size // etp, model.hidden_size
    return [(width, hidden)] * (model.ffn_matrices - 1) + [(hidden, width)]


def joined_tensors(model: ModelSpec) -> int:
    """Parameter tensors of a layer that are no tensors of their own where queries, keys and values are one matrix, and
    the gate and the input of a gated feed-forward: of each matrix all parts but one, biases too."""
    fewer = 0
    for parts in (("wq", "wk", "wv"), ("w1", "w3")):
        found = [name for name in parts if name in model.linear_shapes]
        fewer += sum(1 + model.has_bias(name) for name in found[1:])
    return fewer


def cut_shares(model: ModelSpec, kind: str) -> tuple[float, float]:
    """The shares of a layer's products that tp cuts by columns and by rows; those of routed experts are neither."""
    shapes = model.linear_shapes if kind == "dense" else model.attention_shapes
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    by_rows = sum(sizes.pop(name, 0) for name in ("wo", "w2"))
    by_columns, routed = sum(sizes.values()), 0
    if kind != "dense" and model.experts is not None:
        shared = model.hidden_size * model.experts.shared_width
        by_columns, by_rows = by_columns + (model.ffn_matrices - 1) * shared, by_rows + shared
        routed = model.experts.top_k * sum(rows * columns for rows, columns in expert_linear_shapes(model, 1))
    total = by_columns + by_rows + routed
    return by_columns / total, by_rows / total
