"""Facts of an attention beyond its heads: RoPE's scaling and stretch, latent projections, sliding windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .store import Reader

# Ways to stretch RoPE over more positions -> the feature of a model that uses one, in words for people. YaRN: arXiv
# 2309.00071; linear: arXiv 2306.15595; dynamic: section 2.4 of the first; LongRoPE: arXiv 2402.13753.
STRETCHES = {
    "yarn": "YaRN positions",
    "linear": "linearly stretched positions",
    "dynamic": "dynamically stretched positions",
    "longrope": "LongRoPE positions",
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The frequency scaling of Llama 3.1 (`rope_type: llama3` in a Hugging Face config)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int

    @classmethod
    def from_dict(cls, reader: Reader) -> RopeScaling:
        scaling = cls(
            factor=reader.number("factor", above=0),
            low_frequency_factor=reader.number("low_frequency_factor", above=0),
            high_frequency_factor=reader.number("high_frequency_factor", above=0),
            original_max_positions=reader.integer("original_max_positions", minimum=1),
        )
        reader.finish()
        if scaling.high_frequency_factor <= scaling.low_frequency_factor:
            raise reader.fail(
                "high_frequency_factor",
                f"a number above low_frequency_factor = {scaling.low_frequency_factor:g}",
                scaling.high_frequency_factor,
            )
        return scaling


@dataclass(frozen=True, kw_only=True)
class RopeStretch:
    """A stretch of RoPE by `factor` in one of STRETCHES; `original_max_positions` None where it plays no part.

    Kept so that no executor trains such a model as if it were not stretched. What follows `original_max_positions` is
    of YaRN alone, by the names that Hugging Face configs have for it; the constants of dynamic and LongRoPE are not
    recorded: they change neither parameters nor FLOPs, and nothing here computes with them.

    Pairs of a head that turn more than `beta_fast` times over the original positions stay as they are, those of fewer
    than `beta_slow` turns are slowed down by `factor`, between the two are blended; with `truncate` the bounds are
    whole pairs. `attention_factor` multiplies cosine and sine; `mscale` and `mscale_all_dim` are DeepSeek's way to
    say it.
    """

    kind: str
    factor: float
    original_max_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def magnitude(self) -> float:
        """What cosine and sine are multiplied by: of YaRN that does not say 0.1 ln(factor) + 1 (arXiv 2309.00071,
        equation 22)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies its scores by besides, as transformers' DeepSeek does."""
        return self._grown(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _grown(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

    @classmethod
    def from_dict(cls, reader: Reader) -> RopeStretch:
        original = reader.anything("original_max_positions", default=None)
        stretch = cls(
            kind=reader.text("kind", choices=STRETCHES),
            factor=reader.number("factor", above=0),
            original_max_positions=None if original is None else reader.integer("original_max_positions", minimum=1),
            **yarn_constants(reader),
        )
        reader.finish()
        if stretch.kind == "yarn" and stretch.original_max_positions is None:
            raise reader.fail("original_max_positions", "a whole number >= 1, since YaRN counts turns over them", None)
        return stretch


def yarn_constants(reader: Reader) -> dict[str, Any]:
    """What a mapping says of YaRN's constants, by the names of RopeStretch's fields; null and a missing key are one."""
    found: dict[str, Any] = {}
    for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
        if reader.anything(key, default=None) is not None:
            found[key] = reader.number(key, above=0)
    if reader.anything("truncate", default=None) is not None:
        found["truncate"] = reader.boolean("truncate")
    return found


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values from one narrow latent.

    Widths are of one head, ranks of the whole layer. The rotated part of a key is one for all heads and comes
    beside the latent. `q_lora_rank` None: queries are projected in one step. An RMSNorm follows each latent.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def norm_parameters(self) -> int:
        return self.kv_lora_rank + (self.q_lora_rank or 0)

    def linear_shapes(self, hidden: int, heads: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each projection; `_a` goes down to a latent, `_b` up from it."""
        query, rank = heads * self.qk_head_dim, self.q_lora_rank
        shapes = {"wq": (query, hidden)} if rank is None else {"wq_a": (rank, hidden), "wq_b": (query, rank)}
        shapes["wkv_a"] = (self.kv_lora_rank + self.qk_rope_head_dim, hidden)
        shapes["wkv_b"] = (heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank)
        shapes["wo"] = (hidden, heads * self.v_head_dim)
        return shapes

    @classmethod
    def from_dict(cls, reader: Reader) -> LatentAttention:
        rank = reader.anything("q_lora_rank", default=None)
        latent = cls(
            kv_lora_rank=reader.integer("kv_lora_rank", minimum=1),
            qk_nope_head_dim=reader.integer("qk_nope_head_dim", minimum=1),
            qk_rope_head_dim=reader.integer("qk_rope_head_dim", minimum=2),
            v_head_dim=reader.integer("v_head_dim", minimum=1),
            q_lora_rank=None if rank is None else reader.integer("q_lora_rank", minimum=1),
        )
        reader.finish()
        if latent.qk_rope_head_dim % 2:
            raise reader.fail("qk_rope_head_dim", "an even number, since RoPE turns pairs", latent.qk_rope_head_dim)
        return latent


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """A token attends to the `length` latest ones, itself among them; every `full_every`-th layer to all.

    With full_every=2 layers 1, 3, 5, ... (from 0) attend in full; None: no layer does.
    """

    length: int
    full_every: int | None = None

    def in_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) has the window."""
        return self.full_every is None or (index + 1) % self.full_every != 0

    def windowed_layers(self, layers: int) -> int:
        """How many of `layers` layers have the window."""
        return layers - (layers // self.full_every if self.full_every is not None else 0)

    @classmethod
    def from_dict(cls, reader: Reader) -> SlidingWindow:
        every = reader.anything("full_every", default=None)
        window = cls(
            length=reader.integer("length", minimum=1),
            full_every=None if every is None else reader.integer("full_every", minimum=2),
        )
        reader.finish()
        return window
