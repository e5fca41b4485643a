"""Whole numbers that branches of a program narrow."""

from __future__ import annotations

from typing import NamedTuple


class Counted(NamedTuple):
    """Their column, the most they may be, and their turn: first where kinds of layers meet (0), then layers of a rank
    in all (1), of a stage (2), of a rank by mode (3), and of a stage of a segment in one way (4)."""

    column: int
    most: int
    turn: int


# (name among `stage_ilp.Program.counted`, fewest layers, most) of what a branch narrows.
Held = tuple[tuple[str, int, int], ...]
