"""Facts of an attention beyond its heads: RoPE's scaling and stretch, latent projections, sliding windows."""

from __future__ import annotations

from dataclasses import dataclass

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

    Kept so that no executor trains such a model as if it were not stretched. The constants by which it turns are
    not recorded: they change neither parameters nor FLOPs, and nothing here computes with them.
    """

    kind: str
    factor: float
    original_max_positions: int | None = None

    @classmethod
    def from_dict(cls, reader: Reader) -> RopeStretch:
        original = reader.anything("original_max_positions", default=None)
        stretch = cls(
            kind=reader.text("kind", choices=STRETCHES),
            factor=reader.number("factor", above=0),
            original_max_positions=None if original is None else reader.integer("original_max_positions", minimum=1),
        )
        reader.finish()
        return stretch


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
