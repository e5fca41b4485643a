"""What a person types about jobs and layouts, as data: pins, bans, layouts, sizes in bytes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from profiles.input_error import InputError

from .job import BANNABLE, PINNABLE
from .layout import CP_STYLES, RECOMPUTE_MODES, SCHEDULES, Layout
from .pins import RANGE, pin_text

_INTEGER_KEYS = ("tp", "cp", "pp", "dp", "dp_shard", "ep", "etp", "zero", "micro_batch", "virtual_stages")
_WORDS = {"schedule": SCHEDULES, "recompute": RECOMPUTE_MODES, "cp_style": CP_STYLES}
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def parse_setting(text: str, flag: str, keys: Sequence[str]) -> tuple[str, Any]:
    """`tp=8` as ("tp", 8), checked against `keys` and each key's type."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or key not in keys:
        near = difflib.get_close_matches(key, keys, 1)
        raise InputError(
            f"{text!r} is not a setting",
            where=flag,
            expected="KEY=VALUE with KEY one of " + ", ".join(keys),
            got=text,
            hint=f"is {near[0]!r} meant?" if near and near[0] != key else "for example tp=8",
        )
    return key, _value(key, value, flag)


def _value(key: str, value: str, flag: str) -> Any:
    if key in _INTEGER_KEYS:
        least = 0 if key == "zero" else 1
        if not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
            raise InputError(f"{key} cannot be {value!r}", where=flag, expected=f"a whole number >= {least}", got=value)
        return int(value)
    if key in ("sequence_parallel", "reshard"):
        if value.lower() not in ("true", "false", "on", "off", "1", "0"):
            raise InputError(f"{key} cannot be {value!r}", where=flag, expected="true or false", got=value)
        return value.lower() in ("true", "on", "1")
    if value not in _WORDS[key]:
        near = difflib.get_close_matches(value, _WORDS[key], 1)
        raise InputError(
            f"{key} cannot be {value!r}",
            where=flag,
            expected="one of " + ", ".join(_WORDS[key]),
            got=value,
            hint=f"is {near[0]!r} meant?" if near else "",
        )
    return value


def parse_pin(text: str, flag: str) -> tuple[str, Any]:
    """`tp=8` as ("tp", 8), `pp=2|4` as ("pp", (2, 4)), `tp=4..16` as ("tp", range(4, 17))."""
    key, _, value = (part.strip() for part in text.partition("="))
    if key in _INTEGER_KEYS and (match := RANGE.fullmatch(value)):
        low, high = (parse_setting(f"{key}={end}", flag, PINNABLE)[1] for end in match.groups())
        if low > high:
            raise InputError(f"{key} cannot be {value!r}", where=flag, expected="LEAST..MOST", got=value)
        return key, range(low, high + 1)
    if "|" not in value:
        return parse_setting(text, flag, PINNABLE)
    return key, tuple(parse_setting(f"{key}={each.strip()}", flag, PINNABLE)[1] for each in value.split("|"))


def check_pin(key: str, pin: Any, where: str) -> None:
    """Raise InputError where a file holds a pin that no person could type: another type, or no value of this key."""
    typed = parse_pin(f"{key}={pin_text(pin)}", where)[1]
    if typed != pin or type(typed) is not type(pin):
        raise InputError(
            f"{key} cannot be pinned to {pin!r}",
            where=where,
            expected=f"as --pin takes it: {typed!r}",
            got=repr(pin),
            hint="put back what was edited, or plan anew: cli.py plan … -o FILE",
        )


def parse_pins(pins: Sequence[str], bans: Sequence[str], flag: str = "--pin") -> tuple[dict[str, Any], tuple[str, ...]]:
    """`--pin` and `--ban` values; the same key twice, or pinned and banned, is a contradiction."""
    found: dict[str, Any] = {}
    for text in pins:
        key, value = parse_pin(text, flag)
        if found.get(key, value) != value:
            raise InputError(
                f"{key} is pinned twice",
                where=flag,
                expected="one value, several as 2|4, or a range as 2..8",
                got=f"{pin_text(found[key])} and {pin_text(value)}",
            )
        found[key] = value
    for ban in bans:
        if ban not in BANNABLE:
            allowed = ", ".join(BANNABLE)
            raise InputError(f"{ban!r} cannot be banned", where="--ban", expected=f"one of {allowed}", got=ban)
        if ban in found:
            raise InputError(
                f"{ban} is both pinned and banned",
                where="--pin and --ban",
                expected="one of the two",
                got=f"{ban}={pin_text(found[ban])}",
            )
    return found, tuple(bans)


def parse_layout(text: str, world_size: int) -> tuple[Layout, str, bool | None]:
    """`tp=8,pp=8,zero=1,recompute=full` as a Layout, its recompute mode and what its stages do with gathered weights
    (None: what is best); dp follows from the world.

    Keys left out are 1 or off. dp_shard follows from zero: dp where state is sharded, else 1.
    """
    settings: dict[str, Any] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        key, value = parse_setting(word, "--layout", PINNABLE)
        if key in settings:
            raise InputError(f"{key} is given twice", where="--layout", expected="each key once", got=text)
        settings[key] = value
    recompute, reshard = settings.pop("recompute", "none"), settings.pop("reshard", None)
    if "dp" not in settings:
        others = settings.get("tp", 1) * settings.get("cp", 1) * settings.get("pp", 1)
        if world_size % others:
            raise InputError(
                "the layout does not fill the devices",
                where="--layout",
                expected=f"tp·cp·pp that divides {world_size} devices",
                got=f"tp·cp·pp = {others}",
            )
        settings["dp"] = world_size // others
    settings.setdefault("dp_shard", settings["dp"] if settings.get("zero", 0) else 1)
    if settings.get("cp", 1) > 1:
        settings.setdefault("cp_style", "ring")
    return Layout(**settings), recompute, reshard


def parse_bytes(text: str, flag: str) -> float:
    """`76GiB`, `80GB` or plain bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise InputError(
            f"{text!r} is not an amount of memory",
            where=flag,
            expected="a number > 0 with a unit of " + ", ".join(unit for unit in _UNITS if unit),
            got=text,
            hint="for example 76GiB",
        )
    return float(match[1]) * _UNITS[match[2]]
