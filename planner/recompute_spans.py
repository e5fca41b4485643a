"""Which blocks of a stage recompute, where its counts alone do not say: spans of blocks by mode.

[Note: Which blocks recompute]
Of a stage the first `full` blocks recompute in full, the next `selective` ones selectively, the others not at all. A
stage with two kinds of layers may recompute in the second alone; then its spans say which, and the counts their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from profiles.store import Reader

MODES_IN_ORDER = ("full", "selective", "none")
# (mode, first, end): blocks [first, end) of the model recompute so. In the order of the blocks, the others are `none`.
Span = tuple[str, int, int]


def spans_of(runs: Iterable[tuple[str, int]], first: int) -> tuple[Span, ...]:
    """The spans of (mode, how many blocks in a row) from block `first` on, none where the counts say as much."""
    there = [run for run in runs if run[1]]
    joined = [(mode, sum(number for _, number in run)) for mode, run in groupby(there, key=itemgetter(0))]
    order = [MODES_IN_ORDER.index(mode) for mode, _ in joined]
    if order == sorted(order):
        return ()
    spans, block = [], first
    for mode, number in joined:
        if mode != "none":
            spans.append((mode, block, block + number))
        block += number
    return tuple(spans)


def plain_spans(spans: Sequence[Span]) -> dict[str, Any]:
    """As a file holds them: `{full: [[3, 5]]}`."""
    modes = [mode for mode in MODES_IN_ORDER if any(span[0] == mode for span in spans)]
    return {mode: [[first, end] for each, first, end in spans if each == mode] for mode in modes}


def read_spans(reader: Reader, first: int, end: int, counts: Mapping[str, int]) -> tuple[Span, ...]:
    """The spans of a stage with blocks [first, end).

    Raises:
        InputError: they are no spans of these blocks, meet, or are not as long as `counts` says.
    """
    spans = [span for mode in MODES_IN_ORDER[:2] for span in _read(reader, mode, first, end)]
    reader.finish()
    spans.sort(key=lambda span: span[1:])
    block, runs = first, []
    for mode, begin, stop in spans:
        if begin < block:
            raise reader.fail(mode, "spans of which each block is in one", [begin, stop])
        runs += [("none", begin - block), (mode, stop - begin)]
        block = stop
    for mode in MODES_IN_ORDER[:2]:
        held = sum(number for each, number in runs if each == mode)
        if held != counts[mode]:
            raise reader.fail(mode, f"spans of {counts[mode]} blocks, as the stage's counts have it", held)
    return spans_of([*runs, ("none", end - block)], first)


def _read(reader: Reader, mode: str, first: int, end: int) -> Iterator[Span]:
    found = reader.anything(mode, default=[])
    expected = f"a list of spans [first, end) of the stage's blocks, {first} <= first < end <= {end}"
    if not isinstance(found, list | tuple):
        raise reader.fail(mode, expected, found)
    for span in found:
        whole = isinstance(span, list | tuple) and len(span) == 2 and all(type(block) is int for block in span)
        if not whole or not first <= span[0] < span[1] <= end:
            raise reader.fail(mode, expected, span)
        yield mode, span[0], span[1]
