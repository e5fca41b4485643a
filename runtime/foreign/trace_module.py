"""Trace the module that a factory makes, without memory, into the facts that a plan is made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from profiles.input_error import InputError
from profiles.traced_model import (
    TP_STYLES,
    TRACED_PRECISIONS,
    BytesByPrecision,
    TracedModel,
    TracedPart,
    traced_model,
)

from ..live_bytes import LiveBytes
from .block_chain import BlockChain, blocks_of, find_chain, stream_of, traceable
from .linear_pairs import cuts_heads, linears_in, recognised_pairs
from .module_contract import Contract, check_deterministic, contract_of
from .module_factory import make_on_meta
from .op_graph import AFTER, BEFORE, PartWork, on_meta

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STEP = "step"  # what a traced step's bytes are for
_ONE_SAMPLE = (1, 0, 1)  # batch_size, seed and step of the samples that are traced


def trace(factory: str, sequence: int) -> TracedModel:
    """What the module is, for samples of `sequence` tokens, as a chain of blocks.

    Raises InputError where the factory or the module cannot be used: no import, no module, no loss, no repeated
    blocks, blocks that are no chain, or samples of another length.
    """
    module = make_on_meta(factory)
    contract = contract_of(module, factory)
    check_deterministic(module, factory)
    inputs, target = one_sample(contract, sequence)
    chain = find_chain(module, contract, inputs, target, factory)
    _check_alike(chain, factory)
    shape = tuple(chain.stream.shape[1:])
    _check_tokens(factory, shape, sequence, contract)
    kept = {precision: _kept_bytes(factory, chain.block_list, sequence, precision) for precision in TRACED_PRECISIONS}
    named, work = dict(module.named_parameters()), chain.graph.work
    shared = set(chain.before) & set(chain.after)
    moved = _moved_bytes(factory, chain, sequence)
    block = _typical(chain)
    linears = linears_in(chain.blocks[block], f"{chain.block_list}.{chain.names[block]}")
    styles = _tp_plan(module, chain, factory) or recognised_pairs(chain.graph, block, linears)

    def part(key: str | int, kept_as: int, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> TracedPart:
        done = work.get(key, PartWork())
        within = f"{chain.block_list}.{chain.names[key]}" if isinstance(key, int) else ""
        return TracedPart(
            parameters=sum(tensor.numel() for tensor in tensors),
            tensors=len(tensors),
            largest_parameter=max((tensor.numel() for tensor in tensors), default=0),
            products=tuple(replace(each, module=_name_in(within, each.module)) for each in done.products),
            attention=tuple(replace(each, module=_name_in(within, each.module)) for each in done.attention),
            kernels=tuple(done.kernels),
            moved_bytes=moved[kept_as],
            kept_bytes=_by_precision(kept, lambda found: found[kept_as][0]),
            passing_bytes=_by_precision(kept, lambda found: found[kept_as][1]),
            parameter_names=tuple(names),
        )

    return traced_model(
        name=type(module).__name__,
        factory=factory,
        block_list=chain.block_list,
        layers=len(chain.blocks),
        vocab_size=max(2, contract.vocabulary or _outputs(work)),
        tied_embeddings=bool(shared),
        input_shape=tuple(inputs.shape[1:]),
        input_dtype=str(inputs.dtype).removeprefix("torch."),
        target_shape=tuple(target.shape[1:]),
        target_dtype=str(target.dtype).removeprefix("torch."),
        stream_shape=shape,
        stream_argument=chain.stream_argument,
        block_returns=chain.block_returns,
        reads_tokens=contract.vocabulary is not None,
        tp_plan=tuple(sorted(styles.items())),
        tp_heads=cuts_heads(chain.graph, block, linears, styles),
        before=part(BEFORE, 0, chain.before, [named[name] for name in chain.before]),
        block=part(block, 1, (), list(chain.blocks[0].parameters())),
        after=part(AFTER, 2, chain.after, [named[name] for name in chain.after if name not in shared]),
    )


def one_sample(contract: Contract, sequence: int, device: str = "meta") -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and target of one sample, by their shapes; zeros of token ids where the module reads tokens."""
    if contract.example_batch is None:
        ids = torch.zeros(1, sequence, dtype=torch.int64, device=device)
        return ids, torch.zeros_like(ids)
    inputs, target = contract.draw(*_ONE_SAMPLE)
    return inputs.to(device), target.to(device)


def _name_in(block: str, module: str) -> str:
    """A module's name as its block has it."""
    return module.removeprefix(block).removeprefix(".") if block else module


def _typical(chain: BlockChain) -> int:
    """The block that stands for all."""
    return len(chain.blocks) - 1


def _outputs(work: dict[str | int, PartWork]) -> int:
    """Width of the last product: classes, where there are any."""
    after = work.get(AFTER, PartWork()).products
    return after[-1].outputs if after else 0


def _check_tokens(factory: str, shape: tuple[int, ...], sequence: int, contract: Contract) -> None:
    tokens = math.prod(shape[:-1])
    if tokens != sequence:
        of = "every sample is that long" if contract.vocabulary is None else "its first block takes that many"
        raise InputError(
            f"{factory} has samples of another length",
            where="--seq",
            expected=f"{tokens}: {of} between its blocks ({' × '.join(map(str, shape))})",
            got=str(sequence),
        )


def _check_alike(chain: BlockChain, factory: str) -> None:
    """All blocks do the same work, by products and attention."""
    works = [chain.graph.work.get(index, PartWork()) for index in range(len(chain.blocks))]

    def done(work: PartWork) -> list[Any]:
        return [replace(each, module="") for each in (*work.products, *work.attention)]

    for index, work in enumerate(works):
        if done(work) != done(works[0]):
            raise InputError(
                f"the blocks {chain.block_list} do different work",
                where=f"--model {factory}",
                expected="blocks with the same products and attention, one cost for all",
                got=f"block {index} differs from block 0",
            )


def _tp_plan(module: nn.Module, chain: BlockChain, factory: str) -> dict[str, str]:
    """Style of a linear by its name in a block: the module's own `tp_plan`, else Hugging Face's `base_model_tp_plan`.

    The latter names linears from the base model on, with a star for the block: layers.*.self_attn.q_proj. A plan with
    another style than `TP_STYLES` for what is in a block is not taken, since its linears belong together.
    """
    own = getattr(module, "tp_plan", None)
    named = dict(chain.blocks[0].named_modules())
    if isinstance(own, dict) and own and all(name in named for name in own):
        for name, style in own.items():
            if style not in TP_STYLES:
                raise InputError(
                    f"{factory} makes a module with a tp_plan that cannot be used",
                    where=f"--model {factory}: tp_plan[{name!r}]",
                    expected="one of " + ", ".join(TP_STYLES),
                    got=repr(style),
                )
        return dict(own)
    theirs = getattr(getattr(module, "config", None), "base_model_tp_plan", None) or {}
    _, _, last = chain.block_list.rpartition(".")
    prefix = f"{last}.*."
    within = {name.removeprefix(prefix): style for name, style in theirs.items() if name.startswith(prefix)}
    if not all(style in TP_STYLES and isinstance(named.get(name), nn.Linear) for name, style in within.items()):
        return {}
    return within


# ---- bytes -------------------------------------------------------------------------------------------------


def _by_precision(kept: dict[str, list[tuple[int, int]]], pick: Any) -> BytesByPrecision:
    return BytesByPrecision(**{precision: pick(kept[precision]) for precision in TRACED_PRECISIONS})


def _moved_bytes(factory: str, chain: BlockChain, sequence: int) -> list[BytesByPrecision]:
    """Bytes that the other operations of before, a block and after move in the forward."""
    found: dict[str, list[int]] = {}
    for precision in TRACED_PRECISIONS:
        graph = chain.graph
        if precision != "fp32":
            module = make_on_meta(factory).to(_DTYPES[precision])
            contract = contract_of(module, factory)
            inputs, target = one_sample(contract, sequence)
            graph = find_chain(module, contract, _cast(inputs, precision), target, factory).graph
        found[precision] = [graph.work.get(part, PartWork()).moved_bytes for part in (BEFORE, _typical(chain), AFTER)]
    return [BytesByPrecision(fp32=whole, bf16=half) for whole, half in zip(found["fp32"], found["bf16"], strict=True)]


def _kept_bytes(factory: str, block_list: str, sequence: int, precision: str) -> list[tuple[int, int]]:
    """(kept from forward to backward, passing in the backward) of before, a block and after.

    From every live storage of one step without memory. Kept is what is alive more when a part's forward ends than when
    it began; passing the most that is alive in its backward beyond what was at its start, the gradient that comes in
    counted. Gradients of parameters, whose bytes do not depend on the samples, do not count.
    """
    live = LiveBytes(_STEP)

    def let_go(parameter: torch.Tensor) -> None:
        live.book(parameter.grad, "gradients")
        parameter.grad = None

    forward: list[int] = []  # marks: start, first block's start, each block's end, end
    backward: list[
        int
    ] = []  # marks: start, gradient of each block's output from the last on, of the first's input, end
    inputs, target = one_sample(contract_of(make_on_meta(factory), factory), sequence)
    inputs = _cast(inputs, precision)
    with traceable(factory, inputs), on_meta(), live, ExitStack() as stack:
        module = make_on_meta(factory).to(_DTYPES[precision])
        contract = contract_of(module, factory)
        for parameter in module.parameters():
            stack.callback(parameter.register_post_accumulate_grad_hook(let_go).remove)
        stack.enter_context(_stream_marked(live, list(blocks_of(module, block_list).values()), forward, backward))
        forward.append(live.mark())
        loss = contract.loss(contract.run(module, inputs), target)
        forward.append(live.mark())
        backward.append(live.mark())
        loss.backward()
        backward.append(live.mark())
    totals = live.totals(_STEP)
    start, first, *ends, end = (totals[mark] for mark in forward)
    kept = (first - start, ends[-1] - (ends[-2] if len(ends) > 1 else first), end - ends[-1])
    spans = (backward[-2:], backward[1:3], backward[:2])  # before, the last block, after
    passing = [max(totals[begun : over + 1]) - totals[begun] for begun, over in spans]
    return [(max(0, held), max(0, most)) for held, most in zip(kept, passing, strict=True)]


@contextmanager
def _stream_marked(
    live: LiveBytes, blocks: Sequence[nn.Module], forward: list[int], backward: list[int]
) -> Iterator[None]:
    """Adds a mark when the stream enters the first block and leaves each, and when its gradient comes to each."""

    def mark(_gradient: torch.Tensor) -> None:
        backward.append(live.mark())

    def enter(_block: nn.Module, arguments: Any, keywords: Any) -> None:
        forward.append(live.mark())
        stream = next(leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor))
        if stream.requires_grad:
            stream.register_hook(mark)

    def leave(_block: nn.Module, _arguments: Any, output: Any) -> None:
        forward.append(live.mark())
        stream_of(output).register_hook(mark)

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for block in blocks:
            stack.callback(block.register_forward_hook(leave).remove)
        yield


def _cast(inputs: torch.Tensor, precision: str) -> torch.Tensor:
    return inputs.to(_DTYPES[precision]) if inputs.is_floating_point() else inputs
