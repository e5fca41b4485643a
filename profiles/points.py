"""The measured points of a HardwareProfile: one dataclass a kind, each with seconds and their spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .cluster import COLLECTIVES
from .store import Reader

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")
DTYPE_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
GEMM_OPERATIONS = ("forward", "input_grad", "weight_grad")
DIRECTIONS = ("forward", "backward")

# What FSDP2 does for the parameters of one module, its own packing and Python included. `bytes` is the whole of
# them, unsharded: gathered before use; gradients reduced into shards; gradients summed where all is replicated.
DATA_PARALLEL = ("fsdp_all_gather", "fsdp_reduce_scatter", "replicate_all_reduce")
FSDP_COLLECTIVES: dict[str, str] = dict(zip(DATA_PARALLEL, ("all_gather", "reduce_scatter", "all_reduce"), strict=True))

# Loss and gradient norm of a step, two float64 numbers summed over all ranks. With fewer numbers than ranks most of the
# messages of gloo's ring are empty and not sent, so that it may take half of what a kilobyte does.
SUM_OF_SCALARS, SCALARS_BYTES = "scalar_all_reduce", 16

# Tensors that cross memory per element, (forward, backward), when each operation is one eager kernel:
# a read or a write of one element each. Counted from what torch's CUDA kernels do.
EAGER_PASSES = {
    "rmsnorm": (2, 3),  # read x, write y; read x and dy, write dx
    "layernorm": (2, 3),
    "rope": (8, 8),  # negate-and-join halves (3), two products (2·2.5), their sum; the same back
    "swiglu": (5, 9),  # silu (2), product (3); two product gradients (6), silu gradient (3)
    "gelu": (2, 3),
    "gelu_tanh": (2, 3),
    "bias": (2, 0),
    "bias_gradient": (0, 1),  # the sum over all tokens
    # In fp32, so twice the bytes: cast (3), square (4), mean (2), two products (4 and 4), cast (3). Back: cast (3), two
    # products and a sum for the weight (6, 4, 2) and for the root (6, 4, 2), mean and square (2, 4, 4, 6), the branches
    # meet (6), cast (3). Counted by a dispatch mode over torch's composite rms_norm.
    "norm_eager": (20, 52),
    "rope_fused": (2, 2),
    "swiglu_fused": (3, 5),  # read gate and up, write; read both and the gradient, write two
    "softmax": (2, 3),  # scale, mask and softmax in one kernel; back: read output and gradient, write
    "scale_mask": (6, 4),  # scale (2), product with the mask (2), difference (2); product and scale back
    "dropout": (2.5, 2.5),  # read, write, one byte of mask in 16 bits
    "dropout_add": (3.5, 5.5),  # read two, write one and the mask; mask and scale (2.5), the branches meet (3)
    "residual": (3, 3),  # sum of two; the gradients of the two branches meet
    "copy": (2, 2),
    "cast": (1.5, 1.5),  # read one width, write the other
    "cast_delayed": (2, 2),  # bf16 to fp8 and its transpose in one kernel
    "cast_dynamic": (2.5, 3.5),  # largest element (1), cast (1.5); of gradients the transpose (1) besides
    "embedding": (2, 3),
    "permute": (2, 3),  # rows by index; back: their gradients added to the tokens'
    # Product with the weight (2), added to the token's row (3); back: rows by index (2), products for the rows (2) and
    # for the weights (3), whose sum reads (1).
    "unpermute": (5, 8),
    # torch's own: cast to fp32 (3), log-softmax (4), pick; back: zeros and a one (2), softmax (6), cast (3).
    "cross_entropy": (7, 11),
    # Cast (3), maximum (2), difference (4), exponential (4), sum (2), quotient (4); back: product (4), cast (3).
    "cross_entropy_chain": (19, 7),
    "loss_metric": (7, 0),  # torch's cross-entropy without its backward
    "cross_entropy_fused": (2, 2),  # read for maximum and sum; read and write the gradient in place
    "accumulate": (3, 0),  # gradient += new gradient
    "gradient_norm": (3, 0),  # read for the norm, read and write for the scaling
    "overflow_sum": (2.5, 0),  # of 16-bit gradients: cast to fp32 (1.5), sum (1)
    "zero": (1, 0),
    "unscale": (2, 0),  # read, look for what is not finite, write
    "adamw": (7, 0),  # read weight, gradient and two moments, write three
    # Decay (2), both moments scaled and added to (2, 3, 2, 3), root, sum and quotient (2, 2, 2), step (4).
    "adamw_eager": (22, 0),
}

# Times as long as their bytes say that torch's elementwise kernels take in 16 bits where they move one element at a
# time, until torch 1.5 (pytorch/pytorch#31975): published, 80 % of the time in 32 bits (pytorch/pytorch#22612, 2019).
SCALAR_SLOWDOWN = 1.6
ELEMENTWISE = ("scale_mask", "gelu", "gelu_tanh", "dropout", "residual", "copy", "bias")

# Operations that the host issues for a kernel or a chain of them, (forward, backward), views and autograd's own
# included: counted by a dispatch mode over an eager layer (benchmarks/host_operations.py). "router" with its losses,
# "permute" with the way back; "exchange" of rows within ep or etp, which sorts them anew; "experts" where they are a
# loop, and each "expert" of it (runtime/experts.py). "ring" with its first step, and each "ring_step" more, beside what
# attention in one call issues (runtime/ring_attention.py); "head_exchange" likewise (runtime/head_exchange.py).
# "described": two tensors between stages forward and one back, 16 operations to send each and 31 to receive it, counted
# in huggingface/nanotron, src/nanotron/parallel/pipeline_parallel/p2p.py (_send_meta and _recv_meta, and what they
# call).
HOST_OPERATIONS = {
    "linear": (4, 7),
    "memory": (2, 3),
    "flash": (5, 6),
    "chain": (14, 24),
    "joined": (7, 21),
    "router": (29, 29),
    "permute": (12, 10),
    "exchange": (25, 8),
    "experts": (5, 4),
    "expert": (8, 23),
    "ring": (12, 19),
    "ring_step": (26, 36),
    "head_exchange": (25, 23),
    "described": (94, 47),
}
# What Megatron-LM's tracker of random states does around a dropout (get, set, get, set), and what a recomputed layer
# does for the states of CPU and GPU: two gets in the forward, two gets and four sets in the backward
# (megatron/mpu/random.py: CudaRNGStatesTracker.fork, CheckpointFunction).
FORK_OPERATIONS, CHECKPOINT_OPERATIONS = 4, 8
# Its layers put four autograd functions beside the products (mpu/layers.py: copy_to, reduce_from) and call four kernels
# by such functions (two norms, softmax, GELU with bias): what they take of the host, (forward, backward), in
# operations, of which a launch is a part that functions do not have (benchmarks/host_operations.py).
FUNCTION_OPERATIONS = (4, 2.5)


@dataclass(frozen=True, kw_only=True)
class GemmPoint:
    """Seconds of one product (m × k)·(k × n), measured with every rank computing.

    Here and below `spread` is the interquartile range of the samples over their median.
    """

    dtype: str
    operation: str
    m: int
    n: int
    k: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ManyGemmPoint:
    """Seconds of `count` products (m × k)·(k × n) issued as one: `batched`, or `grouped` as those of experts are."""

    kind: str
    dtype: str
    count: int
    m: int
    n: int
    k: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GemmModel:
    """A GEMM by tiles and waves where nothing was measured: `units` multiprocessors, `achievable_flops_per_second`
    together."""

    dtype: str
    achievable_flops_per_second: float
    units: int
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class AttentionPoint:
    """Seconds of attention of `batch` sequences.

    `kv_heads` 0 is as many as heads. `backend` is torch's own choice (`default`) or one it was told to use.
    """

    dtype: str
    direction: str
    batch: int
    heads: int
    sequence: int
    head_dim: int
    kv_heads: int = 0
    causal: bool = True
    backend: str = "default"
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionModel:
    """FLOP/s of a flash kernel on the causal half, where nothing was measured; `kernel` names an older generation."""

    dtype: str
    kernel: str = ""
    forward_flops_per_second: float
    backward_flops_per_second: float
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """Seconds of a memory-bound operation on `elements` elements."""

    dtype: str
    operation: str
    direction: str
    elements: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CollectivePoint:
    """Seconds of a collective over `ranks` ranks, `stride` apart, all groups of that kind at once.

    `bytes` is the whole tensor (gathered, or before scatter), of an all-to-all one rank's buffer, of a send the
    message. `uneven` is an all-to-all in which one rank gets half of what each sends.
    """

    operation: str
    ranks: int
    stride: int = 1
    bytes: int
    uneven: bool = False
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OverlapPoint:
    """How many times as long a GEMM and a collective of `bytes` take while both run."""

    operation: str
    ranks: int
    bytes: int
    compute_slowdown: float
    communication_slowdown: float


@dataclass(frozen=True, kw_only=True)
class ContentionPoint:
    """How long a kernel takes with `active` ranks computing, in times of what it takes with one.

    A GEMM, or where `memory_bytes` says so one bound by memory on tensors of so many bytes.
    """

    active: int
    memory_bytes: int = 0
    slowdown: float


@dataclass(frozen=True, kw_only=True)
class WaitPoint:
    """What the mean rank waits for the slowest where all meet after `compute_seconds` of equal work."""

    compute_seconds: float
    wait_seconds: float


@dataclass(frozen=True, kw_only=True)
class ShardPoint:
    """What DTensor adds to one forward or backward of a block cut over tp, on CPUs by the bytes that one of its linears
    reads and writes: they drive out of the caches what Python needs. `sequence`: under sequence parallelism."""

    sequence: bool = False
    bytes: int
    seconds: float


_CHOICES: dict[tuple[type, str], tuple[str, ...]] = {
    (GemmPoint, "operation"): GEMM_OPERATIONS,
    (ManyGemmPoint, "kind"): ("batched", "grouped"),
    (MemoryPoint, "operation"): tuple(EAGER_PASSES),
    (CollectivePoint, "operation"): (*COLLECTIVES, *DATA_PARALLEL, SUM_OF_SCALARS),
    (OverlapPoint, "operation"): COLLECTIVES,
}
_LEAST = {"ranks": 2, "kv_heads": 0, "memory_bytes": 0}  # other whole numbers count something from 1 on


def read_point(kind: type, reader: Reader) -> Any:
    """One point or model of class `kind`, read field by field; an InputError names the key that is wrong."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        take: dict[str, Callable[..., Any]] = {
            "str": reader.text,
            "int": reader.integer,
            "float": reader.number,
            "bool": reader.boolean,
        }
        options: dict[str, Any] = {}
        if field.default is not MISSING:
            options["default"] = field.default
        if field.type == "int":
            options["minimum"] = _LEAST.get(field.name, 1)
        elif field.name in ("spread", "wait_seconds"):
            options["minimum"] = 0
        elif field.type == "float":
            options["above"] = 0
        elif field.name in ("dtype", "direction"):
            options["choices"] = DTYPES if field.name == "dtype" else DIRECTIONS
        elif field.type == "str":
            options["choices"] = _CHOICES.get((kind, field.name))
        values[field.name] = take[str(field.type)](field.name, **options)
    reader.finish()
    return kind(**values)
