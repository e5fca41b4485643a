"""ModelSpec and Stage -> nn.Module on the meta device: embedding, blocks, last norm and head of one stage."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from planner.plan import Stage
from profiles.model import ModelSpec

from .bert_parts import HeadTransform, TokenTypes, with_targets
from .context_parallel import WHOLE, SequenceShard, pick, self_attention
from .experts import Experts, Router
from .gated import gated
from .latent_attention import LatentAttention
from .local_parameters import LocalParameters
from .loss import LossWay, head_loss
from .norm import Norm
from .rotary import constant_tables, plain_scaling, rotate
from .whole_attention import Reach


class LearnedPositions(LocalParameters):
    """One vector per position. `shard` is this rank's part of the sequence, `slice_of_shard` which of how many slices
    of that it holds when tp cuts the sequence too."""

    shard: SequenceShard = WHOLE
    slice_of_shard: tuple[int, int] = (0, 1)

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.max_positions, model.hidden_size))

    def forward(self, tokens: int, places: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors of the `tokens` positions that the cp rank holds, or of its slice of them; of `places`
        [batch, tokens] where tokens have others."""
        rank, ranks = self.slice_of_shard
        length = tokens // ranks
        if places is not None:
            return F.embedding(places[:, rank * length : (rank + 1) * length], self.plain(self.weight))
        positions = pick(self.plain(self.weight), self.shard.spans(tokens), 0)
        return positions[rank * length : (rank + 1) * length]


class TokenTable(LocalParameters):
    """One vector per token. A tp rank may hold only the rows from `first_row` on; it gives zeros for the others,
    and the sum over ranks is the lookup."""

    first_row = 0

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.vocab_size, model.hidden_size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.plain(self.weight)
        if len(weight) == len(self.weight):
            return F.embedding(ids, weight)
        rows = ids - self.first_row
        elsewhere = (rows < 0) | (rows >= len(weight))
        found = F.embedding(rows.masked_fill(elsewhere, 0), weight)
        return found.masked_fill(elsewhere.unsqueeze(-1), 0)


class Embedding(nn.Module):
    """Token ids [batch, sequence], and their positions where a document's end resets them
    -> [batch, sequence, hidden_size]."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.tokens = TokenTable(model)
        self.positions = LearnedPositions(model) if model.positions == "learned" else None
        self.token_types = TokenTypes(model) if model.token_types else None
        self.norm = Norm(model) if model.embedding_norm else None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(ids.shape[1], positions)
        if self.token_types is not None:
            x = x + self.token_types()
        return x if self.norm is None else self.norm(x)


class Sinks(LocalParameters):
    """A number per head, one more summand under its softmax; a tp rank may hold those of its own heads."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.heads))

    def forward(self) -> torch.Tensor:
        return self.plain(self.weight)


class Attention(nn.Module):
    """Self-attention of layer `index`, causal or not, with grouped queries. The number of heads is read off the
    projections, so that a tp rank runs its own share of them with the same code."""

    wq: nn.Linear
    wk: nn.Linear
    wv: nn.Linear
    wo: nn.Linear
    shard: SequenceShard = WHOLE

    def __init__(self, model: ModelSpec, index: int) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.causal = not model.bidirectional
        window = model.sliding_window
        self.window = window.length if window is not None and window.in_layer(index) else None
        self.sinks = Sinks(model) if model.attention_sinks else None
        self.rope = model.positions == "rope"
        self.rope_theta = model.rope_theta
        self.rope_scaling = plain_scaling(model.rope_scaling or model.rope_stretch)
        for name in ("wq", "wk", "wv", "wo"):
            self.add_module(name, _linear(model, name))
        self.q_norm = Norm(model, model.head_dim, kind="rmsnorm") if model.qk_norm else None
        self.k_norm = Norm(model, model.head_dim, kind="rmsnorm") if model.qk_norm else None

    def forward(self, x: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            dtype = torch.promote_types(q.dtype, torch.float32)
            spans = self.shard.spans(q.shape[2])
            cosine, sine = constant_tables(spans, self.head_dim, self.rope_theta, self.rope_scaling, q.device, dtype)
            q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        reach = Reach(self.causal, self.window, None if self.sinks is None else self.sinks())
        mixed = self_attention(q, k, v, self.shard, reach, starts)
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, heads · head_dim] -> [batch, heads, sequence, head_dim]"""
        batch, sequence, _ = projected.shape
        return projected.view(batch, sequence, -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """w2(gated(w1 x, w3 x)) under the swiglus, w2(gelu(w1 x)) under the gelus."""

    w1: nn.Linear
    w2: nn.Linear
    w3: nn.Linear

    def __init__(self, model: ModelSpec, width: int | None = None) -> None:
        super().__init__()
        self.activation = model.activation
        self.gated = model.ffn_matrices == 3
        for name in ("w1", "w3", "w2") if self.gated else ("w1", "w2"):
            self.add_module(name, _linear(model, name, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            return self.w2(gated(self.activation, self.w1(x), self.w3(x)))
        return self.w2(F.gelu(self.w1(x), approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class ExpertFeedForward(nn.Module):
    """The sum of a token's chosen experts, by weight, and of the experts that all tokens share, which are one."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        spec = model.experts
        assert spec is not None
        self.router = Router(model, spec)
        self.experts = Experts(model, spec)
        self.shared = FeedForward(model, spec.shared_width) if spec.shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x)
        y = self.experts(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1)).view_as(x)
        return y if self.shared is None else y + self.shared(x)


class Block(nn.Module):
    """Attention and feed-forward on the residual stream [batch, sequence, hidden_size], each with a norm before it or,
    post-norm (arXiv 1706.03762), behind the sum."""

    def __init__(self, model: ModelSpec, index: int) -> None:
        super().__init__()
        self.norms_first = model.norm_placement == "pre"
        self.attention_norm = Norm(model)
        self.attention = Attention(model, index) if model.latent_attention is None else LatentAttention(model)
        self.mlp_norm = Norm(model)
        routed = model.experts is not None and model.experts.in_layer(index)
        self.mlp = ExpertFeedForward(model) if routed else FeedForward(model)

    def forward(self, x: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        if self.norms_first:
            x = x + self.attention(self.attention_norm(x), starts=starts)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, starts=starts))
        return self.mlp_norm(x + self.mlp(x))


class Head(LocalParameters):
    """The output matrix, with what BERT has before and behind it. A tp rank may hold only the rows of `way`; then there
    is only the loss, no logits."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.vocab_size, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.vocab_size)) if model.output_bias else None
        self.transform = HeadTransform(model) if model.output_transform else None
        self.way = LossWay()

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is not None and self.way.predicted is not None:
            x, targets = with_targets(x, targets, self.way.predicted)
        if self.transform is not None:
            x = self.transform(x)
        weight, bias = self.plain(self.weight), None if self.bias is None else self.plain(self.bias)
        if targets is not None:
            return head_loss(x, weight, targets, self.way, bias)
        assert self.way.group is None, "the logits of a vocabulary that is cut over tp are nowhere whole"
        return F.linear(x, weight, bias)


class Chunk(nn.Module):
    """What one pipeline stage holds. `blocks` is keyed by the block's index in the whole model, so that a
    parameter has the same name under every layout."""

    reads_source = False  # whether stages past the first are given the step's inputs besides
    plain_copies = 1  # tp ranks that hold alike a parameter that is no DTensor over tp
    replicas: Mapping[int, int] = MappingProxyType({})  # by a parameter's id: ranks with its whole gradient, if several

    def __init__(self, model: ModelSpec, stage: Stage) -> None:
        super().__init__()
        self.embedding = Embedding(model) if stage.embedding else None
        self.blocks = nn.ModuleDict({str(index): Block(model, index) for index in range(stage.first, stage.end)})
        self.norm = Norm(model) if stage.head and model.norm_placement == "pre" else None
        self.head = Head(model) if stage.head else None
        self.tied = model.tied_embeddings
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter again, where this chunk has both of a tied pair.

        To be called after whatever replaces parameters module by module (tensor parallel, `to_empty`).
        """
        if self.tied and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.tokens.weight

    def tied_copy(self) -> tuple[nn.Parameter, bool] | None:
        """The matrix of a tied pair of which another chunk holds a copy, and whether this one counts."""
        if not self.tied or (self.embedding is None) == (self.head is None):
            return None
        if self.embedding is not None:
            return self.embedding.tokens.weight, True
        assert self.head is not None
        return self.head.weight, False

    def forward(
        self,
        x: torch.Tensor,
        targets: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids [batch, sequence], past the first stage hidden states -> hidden states.

        On the last stage: this rank's share of the loss, or without targets the logits. Other stages ignore targets.
        `positions` and `starts` are of documents that share a sequence (`Documents`).
        """
        if self.embedding is not None:
            x = self.embedding(x, positions)
        for block in self.blocks.values():
            x = block(x, starts=starts)
        if self.head is None:
            return x
        return self.head(x if self.norm is None else self.norm(x), targets)


def build_chunk(model: ModelSpec, stage: Stage) -> Chunk:
    """The modules of `stage` on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return Chunk(model, stage)


def _linear(model: ModelSpec, name: str, width: int | None = None) -> nn.Linear:
    """A linear by its name; `width` replaces the feed-forward's."""
    outputs, inputs = model.linear_shapes[name]
    if width is not None:
        outputs, inputs = (outputs, width) if name == "w2" else (width, inputs)
    return nn.Linear(inputs, outputs, bias=model.has_bias(name))
