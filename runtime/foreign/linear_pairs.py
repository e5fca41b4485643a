"""Pairs of linears that tensor parallelism can cut though nobody has said so, and whether a plan cuts the heads.

[Note: Linear pairs]
Where all that a linear takes is computed element by element of other linears' outputs (one, or several that are
multiplied, as in a gated feed-forward), the outputs of those can be cut column-wise and its input row-wise: every rank
computes its own columns of what is between (arXiv 1909.08053, section 3). Not so where anything else goes in (a
parameter, the stream), where an output goes anywhere else, or where it is halved on the way, since the halves of a
rank's columns are not a rank's columns of the halves. Attention is not element by element: only a plan can say that
its code takes fewer heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .op_graph import ATTENTION, OpGraph

_PRODUCTS = ("aten::mm", "aten::addmm")
_ELEMENTWISE = frozenset(
    f"aten::{name}"
    for name in (
        *("gelu", "silu", "relu", "sigmoid", "tanh", "elu", "leaky_relu", "hardswish", "softplus", "mish", "square"),
        *("mul", "add", "sub", "neg", "pow", "clamp", "exp", "abs", "_to_copy", "clone"),
    )
)


def recognised_pairs(graph: OpGraph, block: int, linears: Mapping[str, str]) -> dict[str, str]:
    """Style of each linear of a pair, by its name in the block; `linears` are all of the block's, by module path."""
    made = _linears_of(graph, block, linears)
    styles: dict[str, str] = {}
    for last, name in made.items():
        if firsts := _elementwise_of(graph, last, made):
            pair = {made[first]: "colwise" for first in firsts} | {name: "rowwise"}
            if not pair.keys() & styles.keys():
                styles |= pair
    return styles


def cuts_heads(graph: OpGraph, block: int, linears: Mapping[str, str], styles: Mapping[str, str]) -> bool:
    """Whether a column-wise linear's output is what attention takes, with no other product between."""
    made, nodes = _linears_of(graph, block, linears), graph.graph.nodes
    for node, found in nodes(data=True):
        if found.get("part") != block or found.get("operation") != ATTENTION:
            continue
        left, seen = list(graph.graph.predecessors(node)), set()
        while left:
            source = left.pop()
            if source in seen or nodes[source].get("part") != block:
                continue
            seen.add(source)
            if source not in made:
                left += graph.graph.predecessors(source)
            elif styles.get(made[source]) == "colwise":
                return True
    return False


def linears_in(block: nn.Module, path: str) -> dict[str, str]:
    """Name in the block of each of its linears, by its path in the module."""
    return {f"{path}.{name}": name for name, part in block.named_modules() if isinstance(part, nn.Linear)}


def _linears_of(graph: OpGraph, block: int, linears: Mapping[str, str]) -> dict[Any, str]:
    """Nodes of the block's linears that run once."""
    made: dict[Any, str] = {}
    for node, found in graph.graph.nodes(data=True):
        if found.get("part") == block and found.get("operation", "").startswith(_PRODUCTS):
            made[node] = linears.get(found["module"], "")
    names = list(made.values())
    return {node: name for node, name in made.items() if name and names.count(name) == 1}


def _elementwise_of(graph: OpGraph, last: Any, made: Mapping[Any, str]) -> list[Any]:
    """The linears of which alone the input of `last` is made, element by element; empty where anything else goes in."""
    nodes, firsts, between = graph.graph.nodes, [], []
    left = [source for source in graph.graph.predecessors(last) if not _is_weight(source, made[last])]
    while left:
        source = left.pop()
        if source in firsts or source in between:
            continue
        if source in made:
            firsts.append(source)
        elif nodes[source].get("operation", "").split(".")[0] in _ELEMENTWISE:
            between.append(source)
            left += graph.graph.predecessors(source)
        else:
            return []
    inside = {*between, last}
    alone = all(_used_in(graph, node, inside) for node in (*firsts, *between))
    alike = len({nodes[node]["elements"] for node in (*firsts, *between)}) == 1
    return firsts if alone and alike and last not in firsts else []


def _is_weight(source: Any, name: str) -> bool:
    return isinstance(source, tuple) and source[0] == "parameter" and f".{name}." in f".{source[1]}"


def _used_in(graph: OpGraph, node: Any, inside: Iterable[Any]) -> bool:
    return set(graph.graph.successors(node)) <= set(inside)
