"""Numbers of layers that branches of a program narrow."""

from __future__ import annotations

from typing import NamedTuple


class Counted(NamedTuple):
    """Layers of a rank or a stage: their column, how many at most, and their turn. First come a rank's in all (0), then
    a stage's (1), a rank's by mode (2), and a stage's of a segment in one way (3)."""

    column: int
    most: int
    turn: int


# (name among `stage_ilp.Program.counted`, fewest layers, most) of what a branch narrows.
Held = tuple[tuple[str, int, int], ...]
