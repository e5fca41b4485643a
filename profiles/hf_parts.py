"""What the readers of Hugging Face configs share: values under two names or null, activations, sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .attention_spec import SlidingWindow
from .store import Reader

# transformers' names of the activations -> ours. gelu_new, gelu_fast and gelu_pytorch_tanh are one tanh formula.
GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
PLAIN_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def is_null(reader: Reader, key: str) -> bool:
    return key in reader and reader.anything(key) is None


def integer_or_null(reader: Reader, key: str, *, missing: int, null: int) -> int:
    """A count that the file may leave out or, as transformers writes what follows from other keys, set to null."""
    return null if is_null(reader, key) else reader.integer(key, minimum=1, default=missing)


def aliased_integer(reader: Reader, key: str, alias: str, *, minimum: int = 1, default: int) -> int:
    """A count under its own name or its other one (`attribute_map` in transformers); the two must not disagree."""
    if alias not in reader:
        return reader.integer(key, minimum=minimum, default=default)
    other = reader.integer(alias, minimum=minimum)
    if reader.integer(key, minimum=minimum, default=other) != other:
        raise reader.fail(alias, f"the same as {key} = {reader.integer(key)}, its other name", other)
    return other


def refuse_unless(reader: Reader, key: str, only: Any, why: str) -> None:
    """Refuse every value of `key` but `only`, which is also what null and a missing key mean."""
    value = reader.anything(key, default=only)
    if value is not None and value != only:
        shown = str(only).lower() if isinstance(only, bool) else only
        raise reader.fail(key, f"{shown}: {why}", value)


def refuse_uneven_heads(reader: Reader, key: str, heads: int, hidden: int, hidden_key: str, way_out: str = "") -> None:
    if hidden % heads:
        raise reader.fail(key, f"a divisor of {hidden_key} = {hidden}{way_out}", heads)


# ---- sliding windows -----------------------------------------------------------------------------------


def window_of_all(reader: Reader, layers: int, *, missing: int | None) -> SlidingWindow | None:
    """The window of every layer that `sliding_window` alone decides on; null is full attention."""
    length = missing
    if "sliding_window" in reader:
        length = None if is_null(reader, "sliding_window") else reader.integer("sliding_window", minimum=1)
    kinds = [FULL if length is None else SLIDING] * layers
    if read_layer_types(reader, kinds) != kinds:
        # transformers 5.23 reads no layer_types for these families, so that such a file means two things.
        raise reader.fail("layer_types", f"{kinds[0]} in every layer, as sliding_window has it", _layer_types(reader))
    return None if length is None else SlidingWindow(length=length)


def window_by_layer(reader: Reader, kinds: Sequence[str], *, length: int | None) -> SlidingWindow | None:
    """The window of the layers that are SLIDING: by `layer_types` if the file has it, else by `kinds`.

    `length` None: the file has no window, so that no layer may slide.
    """
    kinds = read_layer_types(reader, kinds)
    if SLIDING not in kinds:
        return None
    if length is None:
        raise reader.fail("layer_types", f"{FULL} in every layer, since there is no sliding window", kinds)
    if FULL not in kinds:
        return SlidingWindow(length=length)
    window = SlidingWindow(length=length, full_every=list(kinds).index(FULL) + 1)
    every = window.full_every or 1
    if every == 1 or any((kind == FULL) != ((i + 1) % every == 0) for i, kind in enumerate(kinds)):
        expected = "full attention in every n-th layer and a window in all others: nothing else is planned here"
        raise reader.fail("layer_types", expected, kinds)
    return window


def read_layer_types(reader: Reader, missing: Sequence[str]) -> Sequence[str]:
    """FULL or SLIDING for each layer, `missing` where the file does not say."""
    kinds = _layer_types(reader)
    if kinds is None:
        return missing
    if not isinstance(kinds, list) or len(kinds) != len(missing) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise reader.fail("layer_types", f"a list of {len(missing)} entries, each {FULL} or {SLIDING}", kinds)
    return kinds


def _layer_types(reader: Reader) -> Any:
    return reader.anything("layer_types", default=None)
