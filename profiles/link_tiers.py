"""Link tiers out of a measured matrix of point-to-point bandwidths: which ranks share fast links, and how fast."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from .input_error import InputError
from .lists_in_words import first_of

if TYPE_CHECKING:
    import networkx

# Two bandwidths belong to different levels where one is this many times the other. Links of one kind measured
# ±15 % apart differ by at most 1.15 / 0.85 = 1.35; PCIe and NVLink, or NVLink and a network, by 2 and more.
LEVEL_RATIO = 1.5


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Links that join `span` neighbouring ranks; the median bytes per second of one pair of ranks, one direction."""

    span: int
    bandwidth_bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class LinkTiers:
    """Tiers from the narrowest to the widest (which joins all ranks), and what did not fit the pattern, in words."""

    tiers: tuple[Tier, ...]
    notes: tuple[str, ...] = ()


def tiers_from_matrix(bandwidth: Sequence[Sequence[float]]) -> LinkTiers:
    """The tiers in `bandwidth[i][j]`, bytes per second from rank i to rank j; the diagonal is not read.

    A pair counts as fast as its slower direction. The pairs, sorted by bandwidth, fall into levels wherever the next
    is LEVEL_RATIO times slower. A level becomes a tier where the connected components of the graph of links at least
    that fast are groups of one size, each of neighbouring ranks (so they nest), and most pairs of a group have such a
    link. A level that breaks this is merged into the next slower one, with a note that names ranks. So are single
    links that are LEVEL_RATIO times slower than their tier. One rank has no links and no tiers.

    Raises:
        InputError: a matrix that is not square, or an entry that is not a finite number above 0.
    """
    import networkx

    ranks = len(bandwidth)
    _check(bandwidth)
    links = {(i, j): min(bandwidth[i][j], bandwidth[j][i]) for i, j in combinations(range(ranks), 2)}
    spans: list[int] = []
    notes: list[str] = []
    for slowest in _levels(sorted(links.values(), reverse=True)):
        graph = networkx.Graph([pair for pair, speed in links.items() if speed >= slowest])
        graph.add_nodes_from(range(ranks))
        groups = sorted(sorted(group) for group in networkx.connected_components(graph))
        broken = _broken(groups, graph)
        if broken:
            notes.append(f"links of {slowest:.3g} bytes/s and faster make no tier: {broken}")
        elif len(groups[0]) not in spans:
            spans.append(len(groups[0]))
    if ranks > 1 and ranks not in spans:
        spans.append(ranks)
    tiers = []
    for inner, span in zip([1, *spans], spans, strict=False):
        pairs = {
            (i, j): speed for (i, j), speed in links.items() if i // span == j // span and i // inner != j // inner
        }
        median = statistics.median(pairs.values())
        tiers.append(Tier(span=span, bandwidth_bytes_per_second=median))
        slow = [f"{i}-{j}" for (i, j), speed in pairs.items() if speed * LEVEL_RATIO <= median]
        if slow:
            notes.append(f"slower than the others of their tier ({median:.3g} bytes/s): links {first_of(slow)}")
    return LinkTiers(tiers=tuple(tiers), notes=tuple(notes))


def _check(bandwidth: Sequence[Sequence[float]]) -> None:
    ranks = len(bandwidth)
    for i, row in enumerate(bandwidth):
        if len(row) != ranks:
            expected, got = f"{ranks} numbers, one a rank", f"{len(row)} numbers"
            raise InputError("the matrix is not square", where=f"bandwidth[{i}]", expected=expected, got=got)
        for j, speed in enumerate(row):
            if i != j and not (math.isfinite(speed) and speed > 0):
                raise InputError(
                    "a bandwidth that cannot be",
                    where=f"bandwidth[{i}][{j}]",
                    expected="a finite number of bytes per second above 0",
                    got=str(speed),
                )


def _levels(falling: Sequence[float]) -> list[float]:
    """The slowest bandwidth of each level, fastest level first."""
    last_of_level = [fast for fast, slow in pairwise(falling) if fast >= LEVEL_RATIO * slow]
    return [*last_of_level, *falling[-1:]]


def _broken(groups: list[list[int]], graph: networkx.Graph) -> str:
    """How the groups fail to be a tier, "" where they do not."""
    size = Counter(len(group) for group in groups).most_common(1)[0][0]
    odd = [group for group in groups if len(group) != size]
    if odd:
        return f"ranks {first_of(odd[0])} form a group of {len(odd[0])} where others are of {size}"
    scattered = [group for group in groups if group[-1] - group[0] + 1 != size]
    if scattered:
        return f"ranks {first_of(scattered[0])} share them and are not neighbours; number the ranks node by node"
    loose = [group for group in groups if 4 * graph.subgraph(group).number_of_edges() < size * (size - 1)]
    if loose:
        return f"they join ranks {first_of(loose[0])} through others, most pairs of which have no such link"
    return ""
