"""Why there is no plan: the errors that end with exit code 1 rather than 2."""

from __future__ import annotations

from typing import Any


class NoPlanError(Exception):
    """The question was good and the answer is no; `lines` are the reasons, most telling first.

    `remedies` are the changes that would help as plain data, where there are any.
    """

    def __init__(self, what: str, lines: tuple[str, ...] = (), remedies: tuple[dict[str, Any], ...] = ()) -> None:
        super().__init__(what)
        self.what = what
        self.lines = lines
        self.remedies = remedies


class InfeasibleError(NoPlanError):
    """No legal layout fits the memory."""


class UnsupportedError(NoPlanError):
    """The target executor cannot train what was asked for."""
