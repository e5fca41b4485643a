"""Process groups that the layouts of a benchmark share, as if each had been started alone.

Each of gloo's groups has a thread that looks around a hundred times a second. A run has a dozen groups, dozens of
layouts in one process group had hundreds of them: together they took a large part of two cores from what was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh


@contextmanager
def shared_groups() -> Iterator[Counter[tuple[int, ...]]]:
    """Meanwhile a layout gets the groups that those before it have made, for each set of ranks as many as it asks for:
    two axes over the same ranks have a group each. What is yielded counts these, and is cleared before each layout.

    Every rank asks for every group in the same order, as torch wants it.
    """
    made: dict[tuple[tuple[int, ...], int], Any] = {}
    asked: Counter[tuple[int, ...]] = Counter()
    new_group = dist.new_group

    def shared(ranks: Sequence[int], **options: Any) -> Any:
        key = tuple(ranks)
        asked[key] += 1
        if (key, asked[key]) not in made:
            made[key, asked[key]] = new_group(ranks, **options)
        return made[key, asked[key]]

    dist.new_group = device_mesh.new_group = shared  # type: ignore[assignment]
    try:
        yield asked
    finally:
        dist.new_group = device_mesh.new_group = new_group
