"""RoPE in a Hugging Face config: its base, its share of a head, and how it is scaled or stretched."""

from __future__ import annotations

from dataclasses import dataclass

from .attention_spec import STRETCHES, RopeScaling, RopeStretch, yarn_constants
from .hf_parts import is_null
from .store import Reader

DEFAULT_THETA = 10000.0  # RotaryEmbeddingConfigMixin.default_theta in transformers 5.23
KINDS = ("default", "llama3", *STRETCHES)
_PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True, kw_only=True)
class PartialRotation:
    """How a family says which share of the `head_dim` elements of a head turns: `key` is its older name for it."""

    key: str
    default: float
    head_dim: int


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
    partial: PartialRotation | None = None,
) -> Rope:
    """RoPE where transformers looks for it.

    Before transformers 5 the base stands at the top and the scaling in `rope_scaling`; since then both stand in
    `rope_parameters`. A base inside the mapping outranks the one at the top. A family without
    `partial` turns whole heads.
    """
    theta = reader.number(theta_key, above=0, default=default_theta)
    scaling, parameters = (reader.anything(key, default=None) for key in ("rope_scaling", "rope_parameters"))
    if scaling and parameters and scaling != parameters:
        raise reader.fail("rope_scaling", "the same as rope_parameters, which this file has too", scaling)
    if not (scaling or parameters):
        return Rope(
            theta, _read_fraction(reader, None, partial), stretch=default_stretch if parameters is None else None
        )
    rope = reader.child("rope_scaling" if scaling else "rope_parameters")
    theta = rope.number("rope_theta", above=0, default=theta)
    fraction = _read_fraction(reader, rope, partial)
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
    if kind == "longrope":
        if not is_null(rope, "attention_factor"):
            rope.number("attention_factor", default=0.0)
        for key in ("long_factor", "short_factor"):
            if not isinstance(factors := rope.anything(key), list):
                raise rope.fail(key, "a list of numbers", factors)
        rope.anything("factor", default=None)
    if is_null(rope, "factor") or (kind == "longrope" and "factor" not in rope):
        factor = max_positions / original
    else:
        factor = rope.number("factor", above=0)
    constants = yarn_constants(rope) if kind == "yarn" else {}
    return RopeStretch(kind=kind, factor=factor, original_max_positions=original, **constants)


def _read_fraction(reader: Reader, rope: Reader | None, partial: PartialRotation | None) -> float:
    """The share of a head that turns; the one in the mapping `rope` outranks the one at the top."""
    if partial is None:
        for place in (reader,) if rope is None else (reader, rope):
            _refuse_partial_rotation(place)
        return 1.0
    place, key = reader, partial.key
    if rope is not None and _PARTIAL in rope:
        place, key = rope, _PARTIAL
    fraction = place.number(key, above=0, default=partial.default)
    if fraction > 1.0 or (partial.head_dim * fraction) % 2:
        expected = (
            f"a share that is an even number of the {partial.head_dim} elements of a head, since RoPE turns pairs"
        )
        raise place.fail(key, expected, fraction)
    return fraction


def _refuse_partial_rotation(reader: Reader) -> None:
    if not is_null(reader, _PARTIAL) and reader.number(_PARTIAL, default=1.0) != 1.0:
        raise reader.fail(_PARTIAL, "1: every element of a head is rotated here", reader.anything(_PARTIAL))
