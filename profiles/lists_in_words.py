"""Lists as a sentence holds them."""

from __future__ import annotations

from collections.abc import Sequence


def first_of(items: Sequence[object], most: int = 8, separator: str = ", ") -> str:
    """The first `most` items, and how many more there are: "0, 1, 2 and 61 more"."""
    shown = separator.join(map(str, items[:most]))
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
