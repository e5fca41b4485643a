"""The error a user's mistake gives: what, where, expected, got and what to try."""

from __future__ import annotations


class InputError(Exception):
    """Bad input from a person or a file; `cli.py` shows it on one screen and exits with 2.

    Attributes:
        what: one sentence that names the mistake.
        where: file and key path, or the flag.
        expected, got: the two sides of the contradiction.
        hint: what to try next.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        expected: str = "",
        got: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.hint = hint

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of every part that is known, in reading order."""
        parts = [
            ("error", self.what),
            ("where", self.where),
            ("expected", self.expected),
            ("got", self.got),
            ("try", self.hint),
        ]
        return [(label, text) for label, text in parts if text]

    def __str__(self) -> str:
        return "; ".join(f"{label}: {text}" for label, text in self.lines())
