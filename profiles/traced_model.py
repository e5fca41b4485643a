"""TracedModel: what tracing found of a module that a factory of another package makes, as facts to plan with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from .model import ModelSpec
from .store import Reader

TP_STYLES = ("colwise", "rowwise")
TRACED_PRECISIONS = ("fp32", "bf16")
FAMILY = "module"
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def names_a_factory(text: str) -> bool:
    """Whether `text` is of the form package.module:factory."""
    return _FACTORY.fullmatch(text) is not None


@dataclass(frozen=True, kw_only=True)
class BytesByPrecision:
    """Bytes of one sample, where parameters and activations are fp32 or bf16."""

    fp32: int
    bf16: int

    def of(self, precision: str) -> int:
        return self.fp32 if precision == "fp32" else self.bf16

    @classmethod
    def from_dict(cls, reader: Reader) -> BytesByPrecision:
        found = cls(fp32=reader.integer("fp32"), bf16=reader.integer("bf16"))
        reader.finish()
        return found


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product [rows, inputs] · [inputs, outputs] of one sample, by the module that runs it.

    `matrices` of them are one batched product. `weight` is whether the right factor is a parameter, `bias` whether
    one is added. A convolution is the product of its patches and its kernel.
    """

    module: str
    rows: int
    outputs: int
    inputs: int
    matrices: int = 1
    weight: bool = True
    bias: bool = False

    @property
    def flops(self) -> float:
        """Forward FLOPs, two a multiplication and addition."""
        return 2.0 * self.matrices * self.rows * self.outputs * self.inputs

    @classmethod
    def from_dict(cls, reader: Reader) -> Product:
        found = cls(
            module=reader.text("module"),
            **{key: reader.integer(key, minimum=1) for key in ("rows", "outputs", "inputs", "matrices")},
            weight=reader.boolean("weight"),
            bias=reader.boolean("bias"),
        )
        reader.finish()
        return found


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """One scaled_dot_product_attention of one sample: heads of queries and of keys, their lengths and widths."""

    module: str
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    causal: bool

    @property
    def flops(self) -> float:
        """Forward FLOPs of both products, every query with every key: what is not causal of them counts too."""
        return 2.0 * self.heads * self.queries * self.keys * (self.head_dim + self.value_dim)

    @classmethod
    def from_dict(cls, reader: Reader) -> AttentionWork:
        sizes = ("heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")
        found = cls(
            module=reader.text("module"),
            **{key: reader.integer(key, minimum=1) for key in sizes},
            causal=reader.boolean("causal"),
        )
        reader.finish()
        return found


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A memory-bound operation that hardware profiles know by name, over so many elements of one sample."""

    operation: str
    elements: int

    @classmethod
    def from_dict(cls, reader: Reader) -> Kernel:
        found = cls(operation=reader.text("operation"), elements=reader.integer("elements"))
        reader.finish()
        return found


@dataclass(frozen=True, kw_only=True)
class TracedPart:
    """What lies before the blocks, one block, or what lies after them, for one sample.

    `moved_bytes` are read and written in the forward by operations that are neither products, attention nor kernels.
    `kept_bytes` stay from the forward to the backward: of a block, what it adds to what was there before it, its
    output included. `passing_bytes` are the most that its backward has besides. `parameter_names` are those of the
    module's parameters that are used here; of a block they are left out.
    """

    parameters: int
    tensors: int
    largest_parameter: int
    products: tuple[Product, ...]
    attention: tuple[AttentionWork, ...]
    kernels: tuple[Kernel, ...]
    moved_bytes: BytesByPrecision
    kept_bytes: BytesByPrecision
    passing_bytes: BytesByPrecision
    parameter_names: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Forward FLOPs of one sample."""
        return sum(work.flops for work in (*self.products, *self.attention))

    @classmethod
    def from_dict(cls, reader: Reader) -> TracedPart:
        names = reader.anything("parameter_names", default=[])
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise reader.fail("parameter_names", "a list of names", names)
        found = cls(
            parameters=reader.integer("parameters"),
            tensors=reader.integer("tensors"),
            largest_parameter=reader.integer("largest_parameter"),
            products=tuple(map(Product.from_dict, reader.children("products"))),
            attention=tuple(map(AttentionWork.from_dict, reader.children("attention"))),
            kernels=tuple(map(Kernel.from_dict, reader.children("kernels"))),
            moved_bytes=BytesByPrecision.from_dict(reader.child("moved_bytes")),
            kept_bytes=BytesByPrecision.from_dict(reader.child("kept_bytes")),
            passing_bytes=BytesByPrecision.from_dict(reader.child("passing_bytes")),
            parameter_names=tuple(names),
        )
        reader.finish()
        return found


@dataclass(frozen=True, kw_only=True)
class TracedModel(ModelSpec):
    """A module as a chain: what is before its blocks (`embedding`), alike blocks (the layers), what is after (`head`).

    `factory` makes the module, `block_list` is the name of the list that holds its blocks. A sample goes in as
    `input_shape` of `input_dtype`, is judged by its target, and between blocks is `stream_shape`, whose last dim counts
    as the hidden size and the others together as the tokens; blocks take it as the argument `stream_argument` (a place
    or a keyword) and give it alone (`block_returns` 0) or as the first of so many. `reads_tokens`: a causal language
    model, which trains on text. `tp_plan` says how a linear of a block is cut over tp, by its name in the block, and
    `tp_heads` whether that cuts attention's heads too; empty where nobody said and no pair was found.
    What of ModelSpec says how a layer is made (norm, activation, positions) does not hold for it:
    the parts do.
    """

    factory: str
    block_list: str
    input_shape: tuple[int, ...]
    input_dtype: str
    target_shape: tuple[int, ...]
    target_dtype: str
    stream_shape: tuple[int, ...]
    stream_argument: str
    block_returns: int
    reads_tokens: bool
    tp_plan: tuple[tuple[str, str], ...]
    tp_heads: bool
    before: TracedPart
    block: TracedPart
    after: TracedPart

    @property
    def tokens(self) -> int:
        """Tokens of a sample: the plan's sequence."""
        return prod(self.stream_shape[:-1])

    @property
    def features(self) -> tuple[str, ...]:
        return ("a module of its own",)

    def style_of(self, product: Product) -> str | None:
        """How tp cuts the product of a block."""
        return dict(self.tp_plan).get(product.module)

    # ---- parameters and FLOPs --------------------------------------------------------------------------

    @property
    def block_parameters(self) -> int:
        return self.block.parameters

    def layer_parameters(self, kind: str) -> int:
        return self.block.parameters

    def layer_tensors(self, kind: str) -> int:
        return self.block.tensors

    @property
    def end_tensors(self) -> tuple[int, int]:
        return self.before.tensors, self.after.tensors

    @property
    def embedding_parameters(self) -> int:
        return self.before.parameters

    @property
    def head_parameters(self) -> int:
        return self.after.parameters

    def step_flops(self, global_batch: int, sequence: int) -> float:
        """Model FLOPs of one optimizer step, attention counted in full, no recomputation: the backward is twice the
        forward (arXiv 2104.04473, section 5.1)."""
        return 3.0 * global_batch * (self.before.flops + self.layers * self.block.flops + self.after.flops)

    # ---- files -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        document = asdict(self)
        return {key: document[key] for key in _KEYS}

    @classmethod
    def from_dict(cls, reader: Reader) -> TracedModel:
        factory = reader.text("factory")
        if not names_a_factory(factory):
            raise reader.fail("factory", "package.module:factory", factory)
        found = traced_model(
            factory=factory,
            block_list=reader.text("block_list"),
            name=reader.text("name"),
            layers=reader.integer("layers", minimum=1),
            vocab_size=reader.integer("vocab_size", minimum=2),
            tied_embeddings=reader.boolean("tied_embeddings"),
            input_shape=_shape(reader, "input_shape"),
            input_dtype=reader.text("input_dtype"),
            target_shape=_shape(reader, "target_shape"),
            target_dtype=reader.text("target_dtype"),
            stream_shape=_stream_shape(reader),
            stream_argument=reader.text("stream_argument"),
            block_returns=reader.integer("block_returns"),
            reads_tokens=reader.boolean("reads_tokens"),
            tp_plan=tuple(_tp_plan(reader)),
            tp_heads=reader.boolean("tp_heads"),
            before=TracedPart.from_dict(reader.child("before")),
            block=TracedPart.from_dict(reader.child("block")),
            after=TracedPart.from_dict(reader.child("after")),
        )
        reader.finish()
        return found


_KEYS = (
    *("name", "factory", "block_list", "layers", "vocab_size", "tied_embeddings", "input_shape", "input_dtype"),
    *("target_shape", "target_dtype"),
    *(
        "stream_shape",
        "stream_argument",
        "block_returns",
        "reads_tokens",
        "tp_plan",
        "tp_heads",
        "before",
        "block",
        "after",
    ),
)


def traced_model(**found: Any) -> TracedModel:
    """A TracedModel of its own fields; what ModelSpec asks for besides is read off them."""
    block: TracedPart = found["block"]
    first = block.attention[0] if block.attention else None
    return TracedModel(
        family=FAMILY,
        hidden_size=found["stream_shape"][-1],
        ffn_hidden_size=max((product.outputs for product in block.products), default=1),
        heads=first.heads if first else 1,
        kv_heads=first.kv_heads if first else 1,
        head_dim=first.head_dim if first else 1,
        max_positions=prod(found["stream_shape"][:-1]),
        **found,
    )


def read_model(reader: Reader) -> ModelSpec:
    """The model of a plan: traced where it names a factory."""
    return TracedModel.from_dict(reader) if "factory" in reader else ModelSpec.from_dict(reader)


def _shape(reader: Reader, key: str) -> tuple[int, ...]:
    value = reader.anything(key)
    if not isinstance(value, list | tuple):
        raise reader.fail(key, "a list of whole numbers >= 1", value)
    return reader.integers(key, length=len(value), minimum=1)


def _stream_shape(reader: Reader) -> tuple[int, ...]:
    shape = _shape(reader, "stream_shape")
    if not shape:
        raise reader.fail("stream_shape", "one dim at least", list(shape))
    return shape


def _tp_plan(reader: Reader) -> Iterator[tuple[str, str]]:
    value = reader.anything("tp_plan", default=[])
    if not isinstance(value, list | tuple):
        raise reader.fail("tp_plan", "a list of [linear, style]", value)
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or entry[1] not in TP_STYLES:
            raise reader.fail("tp_plan", "pairs of a linear's name and one of " + ", ".join(TP_STYLES), entry)
        yield str(entry[0]), entry[1]


def keeps_documents_apart(model: ModelSpec) -> bool:
    """Whether the runtime's attention can stay within documents that share a sequence: causal, and of our own."""
    return not (model.bidirectional or isinstance(model, TracedModel))
