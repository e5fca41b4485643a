"""Pins: the values a job allows for a layout key: one value, several (a tuple), or all from one number to another.

In a file a tuple is a list and a range is the text that a person types for it, `4..16`.
"""

from __future__ import annotations

import re
from typing import Any

RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


def allows(pin: Any, value: object) -> bool:
    """Whether the pin holds for the value."""
    return value in pin if isinstance(pin, (tuple, range)) else value == pin


def pin_text(pin: Any) -> str:
    """As it is typed: `4`, `2|4|8` or `4..16`."""
    if isinstance(pin, range):
        return f"{pin.start}..{pin.stop - 1}"
    if isinstance(pin, tuple):
        return "|".join(map(pin_text, pin))
    return str(pin).lower() if isinstance(pin, bool) else str(pin)


def plainest(pin: Any) -> Any:
    """The one value of the pin that stands for it in an example: the first."""
    return pin[0] if isinstance(pin, (tuple, range)) else pin


def plain_pin(pin: Any) -> Any:
    """The pin as a file holds it."""
    if isinstance(pin, range):
        return pin_text(pin)
    return list(pin) if isinstance(pin, tuple) else pin


def pin_from_plain(found: Any) -> Any:
    """The pin that a file holds."""
    if isinstance(found, list):
        return tuple(found)
    if isinstance(found, str) and (match := RANGE.fullmatch(found)):
        return range(int(match[1]), int(match[2]) + 1)
    return found
