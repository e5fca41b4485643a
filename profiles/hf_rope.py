"""RoPE in a Hugging Face config: its base, its share of a head, and how it is scaled or stretched."""

from __future__ import annotations

from dataclasses import dataclass

from .attention_spec import STRETCHES, RopeScaling, RopeStretch
from .hf_parts import is_null
from .store import Reader

DEFAULT_THETA = 10000.0  # RotaryEmbeddingConfigMixin.default_theta in transformers 5.23
KINDS = ("default", "llama3", *STRETCHES)

# What a kind may hold beside the factor and the original positions; it turns the positions and shapes nothing.
_NUMBERS = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}


@dataclass(frozen=True)
class Rope:
    """What a config says about RoPE; at most one of `scaling` and `stretch` is not None."""

    theta: float
    fraction: float = 1.0
    scaling: RopeScaling | None = None
    stretch: RopeStretch | None = None


def read_rope(
    reader: Reader,
    max_positions: int,
    *,
    default_theta: float = DEFAULT_THETA,
    theta_key: str = "rope_theta",
    default_stretch: RopeStretch | None = None,
    fraction_key: str | None = None,
    default_fraction: float = 1.0,
) -> Rope:
    """RoPE where transformers looks for it.

    Before transformers 5 the base stands at the top and the scaling in `rope_scaling`; since then both stand in
    `rope_parameters`. A base inside the mapping outranks the one at the top. `fraction_key` is the family's older
    name of partial_rotary_factor; a family without one turns whole heads.
    """
    theta = reader.number(theta_key, above=0, default=default_theta)
    fraction = default_fraction
    if fraction_key is None:
        _refuse_partial_rotation(reader)
    else:
        fraction = reader.number(fraction_key, above=0, default=default_fraction)
    scaling, parameters = (reader.anything(key, default=None) for key in ("rope_scaling", "rope_parameters"))
    if scaling and parameters and scaling != parameters:
        raise reader.fail("rope_scaling", "the same as rope_parameters, which this file has too", scaling)
    if not (scaling or parameters):
        return Rope(theta, fraction, stretch=default_stretch if parameters is None else None)
    rope = reader.child("rope_scaling" if scaling else "rope_parameters")
    theta = rope.number("rope_theta", above=0, default=theta)
    if fraction_key is None:
        _refuse_partial_rotation(rope)
    else:
        fraction = rope.number("partial_rotary_factor", above=0, default=fraction)
    kind = rope.text("rope_type", choices=KINDS, default=rope.text("type", choices=KINDS, default="default"))
    llama3 = _read_llama3(rope, max_positions) if kind == "llama3" else None
    stretch = _read_stretch(rope, kind, max_positions) if kind in STRETCHES else None
    rope.finish()
    return Rope(theta, fraction, llama3, stretch)


def _read_llama3(rope: Reader, max_positions: int) -> RopeScaling:
    scaling = RopeScaling(
        factor=rope.number("factor", above=0),
        low_frequency_factor=rope.number("low_freq_factor", above=0),
        high_frequency_factor=rope.number("high_freq_factor", above=0),
        original_max_positions=rope.integer("original_max_position_embeddings", minimum=1, default=max_positions),
    )
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        expected = f"more than low_freq_factor = {scaling.low_frequency_factor:g}, since their difference divides"
        raise rope.fail("high_freq_factor", expected, scaling.high_frequency_factor)
    return scaling


def _read_stretch(rope: Reader, kind: str, max_positions: int) -> RopeStretch:
    """The stretch of `kind`; where the factor may be null it is that of the positions, as in transformers."""
    if kind == "linear":
        return RopeStretch(kind=kind, factor=rope.number("factor", above=0))
    if kind == "dynamic":
        return RopeStretch(kind=kind, factor=rope.number("factor", above=0), original_max_positions=max_positions)
    original = rope.integer("original_max_position_embeddings", minimum=1, default=max_positions)
    for key in _NUMBERS[kind]:
        if not is_null(rope, key):
            rope.number(key, default=0.0)
    if kind == "yarn" and "truncate" in rope:
        rope.boolean("truncate")
    if kind == "longrope":
        for key in ("long_factor", "short_factor"):
            if not isinstance(factors := rope.anything(key), list):
                raise rope.fail(key, "a list of numbers", factors)
        rope.anything("factor", default=None)
    if is_null(rope, "factor") or (kind == "longrope" and "factor" not in rope):
        factor = max_positions / original
    else:
        factor = rope.number("factor", above=0)
    return RopeStretch(kind=kind, factor=factor, original_max_positions=original)


def _refuse_partial_rotation(reader: Reader) -> None:
    key = "partial_rotary_factor"
    if not is_null(reader, key) and reader.number(key, default=1.0) != 1.0:
        raise reader.fail(key, "1: every element of a head is rotated here", reader.anything(key))
