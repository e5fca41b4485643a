"""A Llama in plain PyTorch, as one writes it by hand: what the runtime's module is measured against.

Its parameters have the names of the runtime's, so that both sides start from the same values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from planner.plan import Stage
from profiles.model import ModelSpec


def why_not(model: ModelSpec) -> str | None:
    """Why `model` is not of the kind written here; None if it is."""
    if (model.norm, model.activation, model.positions) != ("rmsnorm", "swiglu", "rope"):
        return f"{model.name} has {model.norm}, {model.activation} and {model.positions} positions"
    if model.tied_embeddings or model.rope_scaling is not None or model.features:
        return f"{model.name} has tied embeddings, scaled frequencies or {', '.join(model.features) or 'no'} features"
    return None


class Attention(nn.Module):
    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.wq = _linear(model, "wq")
        self.wk = _linear(model, "wk")
        self.wv = _linear(model, "wv")
        self.wo = _linear(model, "wo")

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        batch, sequence, _ = x.shape
        q = self.wq(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(out.transpose(1, 2).reshape(batch, sequence, -1))


class FeedForward(nn.Module):
    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.w1 = _linear(model, "w1")
        self.w2 = _linear(model, "w2")
        self.w3 = _linear(model, "w3")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.attention = Attention(model)
        self.mlp_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.mlp = FeedForward(model)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        return x + self.mlp(self.mlp_norm(x))


class PlainLlama(nn.Module):
    """Ids [batch, sequence] -> logits [batch, sequence, vocab_size]; a pipeline stage has a part of it."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, model: ModelSpec, sequence: int, stage: Stage) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict()
        if stage.embedding:
            self.embedding["tokens"] = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleDict({str(index): Block(model) for index in range(stage.first, stage.end)})
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon) if stage.head else None
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False) if stage.head else None
        frequencies = model.rope_theta ** -(torch.arange(0, model.head_dim, 2).double() / model.head_dim)
        angles = torch.outer(torch.arange(sequence).double(), frequencies).repeat(1, 2)
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for embedding in self.embedding.values():
            x = embedding(x)
        for block in self.blocks.values():
            x = block(x, self.cosine, self.sine)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def plain_llama(model: ModelSpec, sequence: int, stage: Stage, values: Mapping[str, torch.Tensor]) -> PlainLlama:
    """What `stage` holds of the model whose parameters are `values`."""
    module = PlainLlama(model, sequence, stage)
    module.load_state_dict({name: values[name] for name in module.state_dict()})
    return module


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions, the halves of a head paired (arXiv 2104.09864)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def _linear(model: ModelSpec, name: str) -> nn.Linear:
    outputs, inputs = model.linear_shapes[name]
    return nn.Linear(inputs, outputs, bias=model.has_bias(name))
