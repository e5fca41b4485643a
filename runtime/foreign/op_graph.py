"""One forward pass on the meta device as a graph of its operations: who computes what from what, and how much it is.

[Note: The graph]
A node is an operation that computes something (a view of its input is none), a parameter, a buffer or an input; an edge
says that the one's numbers go into the other. Every operation belongs to a part: `before` the first block, block 0, 1,
…, `between` two blocks, or `after` the last. Tensors have no numbers there; where the module asks for one (whether a
mask is all ones, say), it gets 1, true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from profiles.traced_model import AttentionWork, Kernel, Product

BEFORE, BETWEEN, AFTER = "before", "between", "after"
ATTENTION = "attention"  # the operation of a node, where others have their own name
_ATEN = torch.ops.aten
# Operations that hardware profiles have figures for, over the elements of their output.
_KERNELS = {
    _ATEN.native_layer_norm.default: "layernorm",
    _ATEN._softmax.default: "softmax",
    _ATEN._log_softmax.default: "cross_entropy",
    _ATEN.embedding.default: "embedding",
}
_RANDOM = ("dropout", "bernoulli", "rand", "normal_")


@dataclass
class PartWork:
    """What the operations of one part are, of one forward pass."""

    products: list[Product] = field(default_factory=list)
    attention: list[AttentionWork] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    moved_bytes: int = 0


class NumberReads(TorchDispatchMode):
    """A number that is read from a tensor without numbers is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class FlashAttention(TorchFunctionMode):
    """scaled_dot_product_attention as a flash kernel has it: one operation that keeps its inputs, its output and a
    number a row. `seen` is told of each."""

    def __init__(self, seen: Any = None) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        output = _KeptByFlash.apply(given["query"], given["key"], given["value"])
        if self._seen is not None:
            self._seen(given, output)
        return output


class _KeptByFlash(torch.autograd.Function):
    """Shapes alone, for tensors on the meta device."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Kernels write [batch, queries, heads, width] and give it transposed.
        batch, heads, queries, _ = query.shape
        output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class OpGraph(TorchDispatchMode):
    """Records [Note: The graph] and the work of each part while a module runs. To be entered without gradients.

    `parts` is set by whoever watches the module; `module` is the path of the one that runs.
    """

    def __init__(self, module: nn.Module, inputs: torch.Tensor) -> None:
        super().__init__()
        self.graph = nx.DiGraph()
        self.part: str | int = BEFORE
        self.modules: list[tuple[str, nn.Module]] = [("", module)]
        self.work: dict[str | int, PartWork] = {}
        self.random: list[str] = []
        self._kept: list[Any] = []  # all that was seen, so that no address is used twice
        self._made_by: dict[int, Any] = {}  # address of a storage -> its node
        self._weights: set[int] = set()
        for name, tensor in module.named_parameters():
            self._source(("parameter", name), tensor)
            self._weights.add(tensor.untyped_storage()._cdata)
        for name, tensor in module.named_buffers():
            self._source(("buffer", name), tensor)
        self._source(("input", "inputs"), inputs)

    def node_of(self, tensor: torch.Tensor) -> Any:
        """The node whose numbers the tensor has; None for one that nothing seen has made."""
        return self._made_by.get(tensor.untyped_storage()._cdata)

    def parameters_into(self, node: Any) -> list[str]:
        """Names of the parameters that the node depends on."""
        above = nx.ancestors(self.graph, node) | {node}
        return sorted(name for kind, name in (n for n in above if isinstance(n, tuple)) if kind == "parameter")

    def note_attention(self, given: dict[str, Any], output: torch.Tensor) -> None:
        """An attention that `FlashAttention` has seen: one node of the running part."""
        query, key, value = given["query"], given["key"], given["value"]
        path, module = self.modules[-1]
        self._node([query, key, value, given.get("attn_mask")], [output], ATTENTION)
        if given.get("dropout_p"):
            self.random.append(f"attention dropout in {path}")
        self._part().attention.append(
            AttentionWork(
                module=path,
                heads=query.shape[1] * query.shape[0],
                kv_heads=key.shape[1] * key.shape[0],
                queries=query.shape[2],
                keys=key.shape[2],
                head_dim=query.shape[3],
                value_dim=value.shape[3],
                causal=bool(given.get("is_causal")) or bool(getattr(module, "is_causal", False)),
            )
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if outputs and (func._schema.is_mutable or not _is_view(inputs, outputs)):
            self._node(inputs, outputs, func.name())
            self._count(func, args, inputs, outputs)
        return output

    # ---- nodes -------------------------------------------------------------------------------------------

    def _source(self, node: tuple[str, str], tensor: torch.Tensor) -> None:
        self.graph.add_node(node)
        self._made_by[tensor.untyped_storage()._cdata] = node
        self._kept.append(tensor)

    def _node(self, inputs: Sequence[Any], outputs: Sequence[torch.Tensor], name: str) -> None:
        node = self.graph.number_of_nodes()
        elements = outputs[0].numel()
        self.graph.add_node(node, part=self.part, operation=name, module=self.modules[-1][0], elements=elements)
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and (source := self.node_of(tensor)) is not None:
                self.graph.add_edge(source, node)
        for tensor in outputs:
            self._made_by[tensor.untyped_storage()._cdata] = node
        self._kept.append(outputs)

    # ---- work --------------------------------------------------------------------------------------------

    def _part(self) -> PartWork:
        return self.work.setdefault(self.part, PartWork())

    def _count(self, func: Any, args: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        part, name = self._part(), func.name().partition("::")[2]
        if any(word in name for word in _RANDOM):
            self.random.append(f"{name} in {self.modules[-1][0]}")
        if func in (_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default):
            left, right = args[-2:] if "add" not in name else args[1:3]
            part.products.append(self._product(left, right, bias="add" in name))
        elif func is _ATEN.convolution.default:
            kernel, made = args[1], outputs[0]
            part.products.append(
                Product(
                    module=self.modules[-1][0],
                    rows=made.numel() // made.shape[1],
                    outputs=kernel.shape[0],
                    inputs=prod(kernel.shape[1:]),
                    bias=args[2] is not None,
                )
            )
        elif func is _ATEN.gelu.default:
            tanh = "tanh" in str(args[1:]) or "tanh" in str(func)
            part.kernels.append(Kernel(operation="gelu_tanh" if tanh else "gelu", elements=outputs[0].numel()))
        elif func in _KERNELS:
            part.kernels.append(Kernel(operation=_KERNELS[func], elements=outputs[0].numel()))
        else:
            part.moved_bytes += sum(_touched_bytes(tensor) for tensor in (*inputs, *outputs))

    def _product(self, left: torch.Tensor, right: torch.Tensor, bias: bool) -> Product:
        return Product(
            module=self.modules[-1][0],
            rows=left.shape[-2],
            outputs=right.shape[-1],
            inputs=left.shape[-1],
            matrices=left.shape[0] if left.ndim == 3 else 1,
            weight=right.untyped_storage()._cdata in self._weights,
            bias=bias,
        )


@contextmanager
def on_meta(graph: OpGraph | None = None) -> Iterator[None]:
    """Runs modules of the meta device: new tensors are there too, attention is one operation, numbers read are 1."""
    with ExitStack() as stack:
        if graph is not None:
            stack.enter_context(torch.no_grad())
            stack.enter_context(graph)
        stack.enter_context(NumberReads())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(FlashAttention(graph.note_attention if graph is not None else None))
        yield


@contextmanager
def named_while_running(graph: OpGraph, module: nn.Module) -> Iterator[None]:
    """The graph knows which module runs."""

    def enter(name: str) -> Any:
        def hook(running: nn.Module, _arguments: Any) -> None:
            graph.modules.append((name, running))

        return hook

    def leave(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        graph.modules.pop()

    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_pre_hook(enter(name)).remove)
            stack.callback(part.register_forward_hook(leave).remove)
        yield


def _is_view(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements that lie in memory: an expanded dim has one."""
    lengths = (length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(lengths) * tensor.element_size()
