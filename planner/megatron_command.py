"""A Megatron-LM command line as values under our keys and what was ignored; unknown and impossible flags are errors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from profiles.input_error import InputError

from .megatron_flags import IGNORED, REFUSED, TAKEN, Flag, why_refused


@dataclass
class Given:
    """What a command line says: `values` by key, the flag that set each, and remarks that a person should read."""

    values: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def required(self, key: str, flag: str) -> Any:
        """The value, or an InputError that names the flag."""
        if key not in self.values:
            raise InputError(f"{flag} is missing", where=flag, expected=f"{flag} among the flags", got="none")
        return self.values[key]

    def fail(self, key: str, what: str, expected: str, hint: str = "") -> InputError:
        """The error for a value that contradicts something else."""
        flag = self.flags[key]
        return InputError(what, where=flag, expected=expected, got=f"{flag} {self.values[key]}", hint=hint)

    def exclusive(self, *keys: str) -> None:
        """Raise InputError where more than one of them is given."""
        given = [key for key in keys if key in self]
        if len(given) > 1:
            flags = [self.flags[key] for key in given]
            raise InputError(
                f"{' and '.join(flags)} contradict each other",
                where=" and ".join(flags),
                expected="one of them",
                got="all of them" if len(given) > 2 else "both",
            )


def parse_command(words: Sequence[str]) -> Given:
    """The words of a command line, `--flag value` or `--flag=value`, in any order.

    Raises:
        InputError: an unknown flag, with the nearest known one; one that cannot be had; a value of the wrong kind; the
            same key twice with different values.
    """
    given = Given()
    ignored: dict[str, list[str]] = {}
    for flag, values in _split(words):
        if flag in IGNORED:
            ignored.setdefault(IGNORED[flag], []).append(flag)
        elif flag in TAKEN:
            _take(given, flag, values)
        else:
            raise _not_had(flag, values)
    given.remarks += [f"{', '.join(flags)} ignored: {reason}" for reason, flags in ignored.items()]
    return given


def _split(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words behind it, up to the next flag."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise InputError(f"{word!r} stands before any flag", where="megatron", expected="--flag value …", got=word)
    return found


def _take(given: Given, flag: str, values: list[str]) -> None:
    known = TAKEN[flag]
    most = 0 if known.kind is None else len(values) if known.several else 1
    if len(values) != most or (known.kind is not None and not values):
        wanted = "no value" if known.kind is None else "one value" if not known.several else "values"
        raise InputError(f"{flag} takes {wanted}", where=flag, expected=wanted, got=" ".join([flag, *values]))
    value = _value(known, flag, values)
    if given.get(known.key, value) != value:
        before = given.flags[known.key]
        raise InputError(
            f"{flag} contradicts {'itself' if before == flag else before}",
            where=flag,
            expected="one value",
            got=f"{given.values[known.key]} and {value}",
        )
    given.values[known.key] = value
    given.flags[known.key] = flag


def _value(known: Flag, flag: str, values: list[str]) -> Any:
    if known.kind is None:
        return known.value
    if known.several:
        return tuple(values)
    text = values[0]
    if known.words:
        if text not in known.words:
            near = difflib.get_close_matches(text, known.words, 1)
            raise InputError(
                f"{flag} {text} cannot be had here",
                where=flag,
                expected="one of " + ", ".join(known.words),
                got=text,
                hint=f"is {near[0]} meant?" if near else "",
            )
        return known.words[text]
    try:
        value = known.kind(text)
        if known.kind is str or 0 <= value <= known.most:
            return value
    except ValueError:
        pass
    wanted = "a whole number >= 0" if known.kind is int else "a number >= 0"
    if known.most != Flag.most:
        wanted += f" and <= {known.most}"
    raise InputError(f"{flag} cannot be {text!r}", where=flag, expected=wanted, got=text)


def _not_had(flag: str, values: list[str]) -> InputError:
    got = " ".join([flag, *values])
    reason = why_refused(flag)
    if reason is not None:
        return InputError(f"{flag} {reason}", where=flag, expected="a command without it", got=got, hint="leave it out")
    near = difflib.get_close_matches(flag, [*TAKEN, *IGNORED, *REFUSED], 1, cutoff=0.7)
    return InputError(
        f"{flag} is no flag of Megatron-LM's that is known here",
        where=flag,
        expected="a flag as megatron/training/arguments.py has it",
        got=got,
        hint=f"is {near[0]} meant?" if near else "leave it out",
    )
