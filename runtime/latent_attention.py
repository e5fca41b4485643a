"""Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values of all heads from one narrow latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from profiles.model import ModelSpec

from .context_parallel import WHOLE, SequenceShard, self_attention
from .local_parameters import LocalParameters
from .norm import Norm
from .rotary import constant_tables, plain_scaling, rotate
from .whole_attention import Reach


class LocalLinear(LocalParameters):
    """A linear without bias on plain tensors; a tp rank may hold some of its outputs."""

    def __init__(self, model: ModelSpec, name: str) -> None:
        super().__init__()
        outputs, inputs = model.linear_shapes[name]
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.plain(self.weight))


class LatentAttention(nn.Module):
    """Causal self-attention; the rotated part of a key is one for all heads and comes beside the latent.

    With tp every rank computes the latents whole and the heads of its own, so what it leaves of the gradients of
    latents and of what they come from is a part.
    """

    wq: LocalLinear
    wq_a: LocalLinear
    wq_b: LocalLinear
    wkv_a: LocalLinear
    wkv_b: LocalLinear
    shard: SequenceShard = WHOLE

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        latent = model.latent_attention
        assert latent is not None
        self.latent = latent
        self.reach = Reach(causal=not model.bidirectional)
        self.rope_theta = model.rope_theta
        self.rope_scaling = plain_scaling(model.rope_scaling or model.rope_stretch)
        self.score_factor = model.rope_stretch.score_factor if model.rope_stretch is not None else 1.0
        for name in latent.linear_shapes(model.hidden_size, model.heads):
            if name != "wo":
                self.add_module(name, LocalLinear(model, name))
        rank = latent.q_lora_rank
        self.q_norm = None if rank is None else Norm(model, rank, kind="rmsnorm")
        self.kv_norm = Norm(model, latent.kv_lora_rank, kind="rmsnorm")
        outputs, inputs = model.linear_shapes["wo"]
        self.wo = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        latent = self.latent
        query = self.wq(x) if self.q_norm is None else self.wq_b(self.q_norm(self.wq_a(x)))
        q = query.unflatten(-1, (-1, latent.qk_head_dim)).transpose(1, 2)
        q, q_turned = q.split([latent.qk_nope_head_dim, latent.qk_rope_head_dim], dim=-1)
        narrow, k_turned = self.wkv_a(x).split([latent.kv_lora_rank, latent.qk_rope_head_dim], dim=-1)
        both = self.wkv_b(self.kv_norm(narrow)).unflatten(-1, (-1, latent.qk_nope_head_dim + latent.v_head_dim))
        k, v = both.transpose(1, 2).split([latent.qk_nope_head_dim, latent.v_head_dim], dim=-1)
        q_turned, k_turned = self._turned(q_turned), self._turned(k_turned.unsqueeze(1))
        q = torch.cat((q, q_turned), dim=-1)
        if self.score_factor != 1.0:
            q = q * self.score_factor
        k = torch.cat((k, k_turned.expand(-1, k.shape[1], -1, -1)), dim=-1)
        mixed = self_attention(q, k, v, self.shard, self.reach, starts)
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def _turned(self, heads: torch.Tensor) -> torch.Tensor:
        """RoPE on neighbouring pairs, as DeepSeek has them: the first of each before the second, then turned."""
        paired = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        dtype = torch.promote_types(heads.dtype, torch.float32)
        width = self.latent.qk_rope_head_dim
        spans = self.shard.spans(heads.shape[2])
        tables = constant_tables(spans, width, self.rope_theta, self.rope_scaling, heads.device, dtype)
        return rotate(paired, *tables)
