"""The chain in a module: a list of alike blocks that run one after the other, and what lies before and after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from profiles.input_error import InputError

from .module_contract import Contract, first_line
from .op_graph import AFTER, BEFORE, BETWEEN, OpGraph, named_while_running, on_meta


@dataclass(frozen=True)
class BlockCall:
    """One call of a block while the module ran."""

    index: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors among the arguments, by place or keyword; those of a tuple by its name and place."""
        named = {str(place): value for place, value in enumerate(self.arguments)} | self.keywords
        found: dict[str, torch.Tensor] = {}
        for name, value in named.items():
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            names = [name] if len(leaves) == 1 else [f"{name}[{place}]" for place in range(len(leaves))]
            found |= dict(zip(names, leaves, strict=True))
        return found


@dataclass(frozen=True)
class BlockChain:
    """What one forward pass has shown: the list of blocks, its graph, and the stream that passes through them."""

    block_list: str
    names: tuple[str, ...]  # of the blocks in their list
    blocks: tuple[nn.Module, ...]
    graph: OpGraph
    stream: torch.Tensor
    stream_argument: str  # the place or the keyword by which blocks take it
    block_returns: int  # 0 where blocks give it alone, else the length of the tuple that it is the first of
    before: tuple[str, ...]  # names of parameters by where they are used
    after: tuple[str, ...]


_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks_of(module: nn.Module, block_list: str) -> dict[str, nn.Module]:
    """The blocks in their order, by their names in the list; `setattr` on that replaces one."""
    return dict(module.get_submodule(block_list).named_children())


def find_chain(
    module: nn.Module, contract: Contract, inputs: torch.Tensor, target: torch.Tensor, factory: str
) -> BlockChain:
    """Run the module, which is on the meta device, once; InputError where its blocks are no chain."""
    where = f"--model {factory}"
    name = _list_of_blocks(module, where)
    names, blocks = zip(*blocks_of(module, name).items(), strict=True)
    graph, calls = OpGraph(module, inputs), []
    watched = _blocks_watched(graph, blocks, calls)
    with traceable(factory, inputs), on_meta(graph), named_while_running(graph, module), watched:
        contract.loss(contract.run(module, inputs), target)
    if graph.random:
        raise InputError(
            f"{factory} makes a module that draws random numbers",
            where=where,
            expected="a forward whose output is a function of its inputs: dropout would depend on the layout",
            got=graph.random[0],
            hint="set its probability to 0 in the factory",
        )
    _check_order([call.index for call in calls], name, len(blocks), where)
    place, stream = _check_arguments(graph, calls, name, where)
    output = calls[0].output
    _check_edges(graph, calls, name, where)
    before, after = (_parameters_used(graph, part) for part in (BEFORE, AFTER))
    idle = {name for name, _ in module.named_parameters()} - {*before, *after} - _of_blocks(module, name)
    return BlockChain(
        name,
        names,
        blocks,
        graph,
        stream,
        stream_argument=place,
        block_returns=len(output) if isinstance(output, tuple | list) else 0,
        before=tuple(sorted({*before, *idle})),
        after=after,
    )


@contextmanager
def traceable(factory: str, inputs: torch.Tensor) -> Iterator[None]:
    """What the module's own code raises while it is traced is told as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{factory} makes a module that cannot be traced",
            where=f"--model {factory}",
            expected=f"a forward of inputs {list(inputs.shape)}, and a loss, that run on the meta device",
            got=f"{type(error).__name__}: {first_line(error)}",
        ) from None


def _of_blocks(module: nn.Module, block_list: str) -> set[str]:
    return {f"{block_list}.{name}" for name, _ in module.get_submodule(block_list).named_parameters()}


# ---- the list ----------------------------------------------------------------------------------------------


def _list_of_blocks(module: nn.Module, where: str) -> str:
    """The name of the list whose children are alike and hold the most parameters."""
    best, most = "", 0
    seen: list[str] = []
    for name, part in module.named_modules():
        children = list(part.children())
        if not name or not isinstance(part, _LISTS) or len(children) < 2:
            continue
        seen.append(f"{name} ({', '.join(sorted({type(child).__name__ for child in children}))})")
        size = sum(parameter.numel() for parameter in part.parameters())
        if size > most and len({_form(child) for child in children}) == 1:
            best, most = name, size
    if not best:
        raise InputError(
            f"{type(module).__name__} has no repeated blocks",
            where=where,
            expected="a ModuleList, Sequential or ModuleDict of two or more blocks of one class and the same shapes",
            got="; ".join(seen[:4]) or "no such list",
        )
    return best


def _form(block: nn.Module) -> tuple[Any, ...]:
    return type(block), *((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())


# ---- what ran ----------------------------------------------------------------------------------------------


@contextmanager
def _blocks_watched(graph: OpGraph, blocks: Sequence[nn.Module], calls: list[BlockCall]) -> Iterator[None]:
    """The graph knows in which part the module is; every call of a block is added to `calls`."""
    last = len(blocks) - 1

    def enter(index: int) -> Any:
        def hook(_block: nn.Module, _arguments: Any) -> None:
            graph.part = index

        return hook

    def leave(index: int) -> Any:
        def hook(_block: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            graph.part = AFTER if index == last else BETWEEN
            calls.append(BlockCall(index, arguments, keywords, output))

        return hook

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(enter(index)).remove)
            stack.callback(block.register_forward_hook(leave(index), with_kwargs=True).remove)
        yield


def _not_a_chain(name: str, where: str, got: str) -> InputError:
    return InputError(
        f"the blocks {name} are not a chain",
        where=where,
        expected="each block run once, in order, on what the one before gave, and nothing else of it used anywhere",
        got=got,
    )


def _check_order(order: list[int], name: str, blocks: int, where: str) -> None:
    if order != list(range(blocks)):
        raise _not_a_chain(name, where, "blocks ran in the order " + ", ".join(map(str, order[:12])))


def _check_arguments(graph: OpGraph, calls: Sequence[BlockCall], name: str, where: str) -> tuple[str, torch.Tensor]:
    """How blocks take the stream, and the stream. What else goes into a block must come of inputs and buffers alone, so
    that any stage can make it."""
    place = next((key for key, value in calls[1].tensors.items() if value is stream_of(calls[0].output)), None)
    if place is None:
        raise _not_a_chain(name, where, "block 1 does not take what block 0 gives as it is")
    for call in calls:
        tensors = call.tensors
        if call.index and tensors.get(place) is not stream_of(calls[call.index - 1].output):
            raise _not_a_chain(
                name, where, f"block {call.index} does not take what block {call.index - 1} gives as it is"
            )
        for key, value in tensors.items():
            node = graph.node_of(value)
            if key != place and node is not None and (made_of := graph.parameters_into(node)):
                raise _not_a_chain(name, where, f"block {call.index} takes {key}, which is made with {made_of[0]}")
    stream = calls[0].tensors[place]
    if {tuple(stream_of(call.output).shape) for call in calls} != {tuple(stream.shape)}:
        raise _not_a_chain(name, where, "blocks give another shape than they take")
    return place, stream


def stream_of(output: Any) -> Any:
    """The stream in a block's output: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def _check_edges(graph: OpGraph, calls: Sequence[BlockCall], name: str, where: str) -> None:
    """What is computed in a part stays there; but the stream goes on to the next, and what is before the blocks may go
    anywhere where no parameter has made it."""
    parts: dict[Any, str | int] = {node: part for node, part in graph.graph.nodes(data="part") if part is not None}  # type: ignore[assignment]
    places = {BEFORE: -1, AFTER: len(calls)} | {call.index: call.index for call in calls}
    streams = {graph.node_of(stream_of(call.output)) for call in calls}
    for source, node in graph.graph.edges:
        if source not in parts or (first := parts[source]) == (second := parts[node]):
            continue
        if first == BEFORE and not graph.parameters_into(source):
            continue
        if BETWEEN in (first, second):
            raise _not_a_chain(name, where, f"{_told(first)} is used in {_told(second)}")
        start, end = places[first], places[second]
        if end != start + 1 or (start >= 0 and source not in streams):
            raise _not_a_chain(name, where, f"{_told(first)} goes into {_told(second)} past the stream between blocks")


def _told(part: str | int) -> str:
    if isinstance(part, int):
        return f"what block {part} computes"
    return {BEFORE: "what is before the blocks", AFTER: "what is after the blocks"}.get(part, "what is between blocks")


def _parameters_used(graph: OpGraph, part: str) -> tuple[str, ...]:
    names = set()
    for source, node in graph.graph.edges:
        if isinstance(source, tuple) and source[0] == "parameter" and graph.graph.nodes[node].get("part") == part:
            names.add(source[1])
    return tuple(sorted(names))
