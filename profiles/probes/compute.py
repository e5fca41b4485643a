"""Probes of one device's compute: GEMM by shape, attention, and memory-bound operations by size.

[Note: Cold operands]
Between two uses of a tensor training moves far more than a cache holds. So operands change from call to call until
enough bytes have gone by; the same ones again and again would be found in the cache, at half the seconds on a CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from ..points import AttentionPoint, GemmPoint, ManyGemmPoint, MemoryPoint
from .timing import Rank, Timing, time_alone

TORCH_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_COLD_BYTES = 32e6  # [Note: Cold operands]
_MOST_COPIES = 16
Differentiable = tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]  # an action and what it has gradients for


def measure_gemm(rank: Rank, dtype: str, operation: str, m: int, n: int, k: int) -> GemmPoint:
    """Time one product with its operands laid out as autograd lays them out for a linear."""
    if dtype == "fp8":
        timing = time_alone(rank, _fp8_product(rank, m, n, k))
    else:
        kind = TORCH_DTYPES[dtype]
        copies = _copies(kind.itemsize * (m * k + n * k))
        left = [_random(rank, kind, (k, m) if operation == "weight_grad" else (m, k)) for _ in range(copies)]
        right = [_random(rank, kind, (n, k) if operation == "forward" else (k, n)) for _ in range(copies)]
        pairs = cycle(zip(left, right, strict=True))

        def action() -> torch.Tensor:
            a, b = next(pairs)
            if operation == "forward":
                return F.linear(a.view(1, m, k), b)
            return torch.mm(a.t() if operation == "weight_grad" else a, b)

        with _tf32(dtype == "tf32"):
            timing = time_alone(rank, action)
    return GemmPoint(dtype=dtype, operation=operation, m=m, n=n, k=k, seconds=timing.seconds, spread=timing.spread)


def _copies(operand_bytes: int) -> int:
    return max(1, min(_MOST_COPIES, int(_COLD_BYTES // max(operand_bytes, 1))))


def _random(rank: Rank, kind: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, device=rank.device).to(kind)


def _fp8_product(rank: Rank, m: int, n: int, k: int) -> Callable[[], object]:
    """torch's scaled product of two float8 matrices (the right one column-major), result in bf16."""
    left = _random(rank, torch.bfloat16, (m, k)).to(torch.float8_e4m3fn)
    right = _random(rank, torch.bfloat16, (n, k)).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=rank.device)
    return lambda: torch.ops.aten._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)


class _tf32:
    """Products of fp32 matrices in TF32 inside."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.wanted:
            torch.set_float32_matmul_precision("high")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def measure_many_gemm(rank: Rank, kind: str, dtype: str, count: int, m: int, n: int, k: int) -> ManyGemmPoint:
    """Time `count` products of m rows each: one batched call, or grouped as the tokens of experts are.

    Grouped is torch's grouped kernel where the device has it, else a loop over the experts.
    """
    torch_dtype = TORCH_DTYPES[dtype]
    right = _random(rank, torch_dtype, (count, k, n))
    if kind == "batched":
        left = _random(rank, torch_dtype, (count, m, k))
        timing = time_alone(rank, lambda: torch.bmm(left, right))
    else:
        tokens = _random(rank, torch_dtype, (count * m, k))
        if rank.device.type == "cuda" and dtype == "bf16":
            ends = torch.arange(m, count * m + 1, m, device=rank.device, dtype=torch.int32)
            timing = time_alone(rank, lambda: torch.ops.aten._grouped_mm(tokens, right, offs=ends))
        else:
            parts = tokens.split(m)
            timing = time_alone(rank, lambda: torch.cat([torch.mm(a, b) for a, b in zip(parts, right, strict=True)]))
    return ManyGemmPoint(
        kind=kind, dtype=dtype, count=count, m=m, n=n, k=k, seconds=timing.seconds, spread=timing.spread
    )


def measure_attention(
    rank: Rank,
    dtype: str,
    batch: int,
    heads: int,
    sequence: int,
    head_dim: int,
    kv_heads: int = 0,
    causal: bool = True,
    backend: str = "default",
) -> list[AttentionPoint]:
    """Time scaled-dot-product attention forward, and its backward; `kv_heads` 0 is as many as heads."""

    def tensor(number: int) -> torch.Tensor:
        shape = (batch, sequence, number, head_dim)
        return _random(rank, TORCH_DTYPES[dtype], shape).transpose(1, 2).requires_grad_()

    q, k, v = tensor(heads), tensor(kv_heads or heads), tensor(kv_heads or heads)
    with _backend(backend):
        forward, backward = _forward_backward(
            rank,
            [
                (
                    lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=bool(kv_heads)),
                    (q, k, v),
                )
            ],
        )
    shape: dict[str, Any] = {"batch": batch, "heads": heads, "sequence": sequence, "head_dim": head_dim}
    kind: dict[str, Any] = {"dtype": dtype, "kv_heads": kv_heads, "causal": causal, "backend": backend}
    return [
        AttentionPoint(direction=direction, seconds=timing.seconds, spread=timing.spread, **shape, **kind)
        for direction, timing in (("forward", forward), ("backward", backward))
    ]


def _backend(name: str) -> Any:
    """SDPA told to use one backend; torch raises where it cannot."""
    if name == "default":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(
        {
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "math": SDPBackend.MATH,
        }[name]
    )


STATE_OPERATIONS = ("accumulate", "gradient_norm", "adamw")
MEMORY_OPERATIONS = (
    "rmsnorm",
    "layernorm",
    "rope",
    "swiglu",
    "gelu",
    "gelu_tanh",
    "residual",
    "copy",
    "cast",
    "embedding",
    "permute",
    "unpermute",
    "cross_entropy",
    *STATE_OPERATIONS,
)
# Elements of a row, of what norms and activations see, of logits and of a head; a GPU's kernels want many.
_WIDTHS = {"cpu": (256, 256, 64), "cuda": (4096, 32768, 128)}


def measure_memory(rank: Rank, dtype: str, operation: str, elements: int) -> list[MemoryPoint]:
    """Time a memory-bound operation on `elements` elements, forward and, where there is one, backward."""
    if operation in STATE_OPERATIONS:
        timings = {"forward": _time_update(rank, operation, elements)}
    else:
        forward, backward = _time_differentiable(rank, dtype, operation, elements)
        timings = {"forward": forward, "backward": backward}
    return [
        MemoryPoint(
            dtype=dtype,
            operation=operation,
            direction=direction,
            elements=elements,
            seconds=timing.seconds,
            spread=timing.spread,
        )
        for direction, timing in timings.items()
    ]


def _time_update(rank: Rank, operation: str, elements: int) -> Timing:
    """Updates of state run in fp32 whatever the precision of the compute; cold, since each comes once a step."""
    actions = cycle([_update(rank, operation, elements) for _ in range(_copies(16 * elements))])
    return time_alone(rank, lambda: next(actions)())


def _update(rank: Rank, operation: str, elements: int) -> Callable[[], object]:
    """The update of a state of its own."""
    weight = torch.nn.Parameter(torch.randn(elements, device=rank.device))
    gradient = weight.grad = torch.randn_like(weight)
    if operation == "adamw":
        return torch.optim.AdamW([weight], lr=1e-3, fused=True).step
    if operation == "accumulate":
        fresh = torch.randn_like(weight)
        return lambda: gradient.add_(fresh)
    return lambda: (torch.linalg.vector_norm(gradient), gradient.mul_(1.0))


def _time_differentiable(rank: Rank, dtype: str, operation: str, elements: int) -> tuple[Timing, Timing]:
    """Timings of the operation forward and backward, on other operands from call to call ([Note: Cold operands])."""
    copies = _copies(2 * TORCH_DTYPES[dtype].itemsize * elements)
    timings = _forward_backward(rank, [_differentiable(rank, dtype, operation, elements) for _ in range(copies)])
    # Back through a residual sum the gradients of both branches meet, which is the same sum. Of two leaves none meet.
    return (timings[0], timings[0]) if operation == "residual" else timings


def _differentiable(rank: Rank, dtype: str, operation: str, elements: int) -> Differentiable:
    """The operation on operands of its own."""
    kind = TORCH_DTYPES[dtype]
    width, classes, head_dim = _WIDTHS[rank.device.type]
    width = classes if operation == "cross_entropy" else width
    rows = max(2, elements // width)

    def tensor(*shape: int) -> torch.Tensor:
        return _random(rank, kind, shape).requires_grad_()

    if operation in ("rope", "copy"):
        heads = tensor(1, width // head_dim, rows, head_dim)
        cosine = torch.randn(rows, head_dim, device=rank.device)

        def rope() -> torch.Tensor:
            turned = heads * cosine + heads.roll(head_dim // 2, dims=-1) * cosine  # as runtime/rotary.py does
            return turned.to(kind)

        return (rope if operation == "rope" else lambda: heads.transpose(1, 2).reshape(1, rows, width)), (heads,)
    tokens = torch.randint(0, width, (rows,), device=rank.device)
    if operation == "embedding":
        table = tensor(width, width)
        return lambda: F.embedding(tokens, table), (table,)
    x = tensor(rows, width)
    if operation in ("permute", "unpermute"):
        return _permuted(operation, x)
    if operation in ("swiglu", "residual"):
        other = tensor(rows, width)
        return (lambda: F.silu(x) * other) if operation == "swiglu" else (lambda: x + other), (x, other)
    weight, bias = tensor(width), tensor(width)
    wider = torch.bfloat16 if kind == torch.float32 else torch.float32
    actions: dict[str, Differentiable] = {
        "rmsnorm": (lambda: F.rms_norm(x, (width,), weight, 1e-5), (x, weight)),
        "layernorm": (lambda: F.layer_norm(x, (width,), weight, bias), (x, weight, bias)),
        "gelu": (lambda: F.gelu(x), (x,)),
        "gelu_tanh": (lambda: F.gelu(x, approximate="tanh"), (x,)),
        "cast": (lambda: x.to(wider), (x,)),
        "cross_entropy": (lambda: F.cross_entropy(x.float(), tokens, reduction="sum"), (x,)),
    }
    return actions[operation]


def _permuted(operation: str, x: torch.Tensor) -> Differentiable:
    """Rows of tokens sorted by expert, each token twice, or their weighted sums (runtime/experts.py)."""
    rows = len(x)
    token = torch.randperm(rows, device=x.device) // 2
    if operation == "permute":
        tokens = x.detach()[: rows // 2].clone().requires_grad_()
        return (lambda: tokens[token]), (tokens,)
    weight = torch.rand(rows, 1, device=x.device).to(x.dtype).requires_grad_()
    return (lambda: torch.zeros_like(x[: rows // 2]).index_add(0, token, x * weight)), (x, weight)


def _forward_backward(rank: Rank, operands: Sequence[Differentiable]) -> tuple[Timing, Timing]:
    """Timings of an action and of its backward, each on the next of the operands; as many outputs are kept, as
    training keeps them for the backward pass."""
    outputs: deque[torch.Tensor] = deque(maxlen=len(operands))
    actions = cycle(action for action, _ in operands)
    forward = time_alone(rank, lambda: outputs.append(next(actions)()))
    graphs = []
    for action, inputs in operands:
        output = action()
        graphs.append((output, inputs, torch.randn_like(output)))
    turns = cycle(graphs)
    backward = time_alone(rank, lambda: torch.autograd.grad(*next(turns), retain_graph=True))
    return forward, backward


def memory_sizes(cuda: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements of memory-bound operations: (at least, besides when there is time)."""
    if cuda:
        return (1 << 16, 1 << 22, 1 << 26), (1 << 19, 1 << 24, 1 << 28)
    return (1 << 14, 1 << 18, 1 << 21), (1 << 16, 1 << 20, 1 << 23)


def linear_shapes(tokens: tuple[int, ...], widths: tuple[int, ...]) -> Iterator[tuple[str, int, int, int]]:
    """(operation, m, n, k) of the products of every linear of the ladders, small ones first."""
    linears = [(t, o, i) for t in tokens for o in widths for i in widths]
    for linear in sorted(linears, key=lambda shape: shape[0] * shape[1] * shape[2]):
        yield from linear_products(*linear)


def linear_products(tokens: int, outputs: int, inputs: int) -> Iterator[tuple[str, int, int, int]]:
    """(operation, m, n, k) of the three products that a linear of `tokens × inputs -> outputs` issues."""
    yield "forward", tokens, outputs, inputs
    yield "input_grad", tokens, inputs, outputs
    yield "weight_grad", outputs, inputs, tokens


def measure_launch(rank: Rank) -> dict[str, float]:
    """Seconds of a kernel that does nothing worth its launch."""
    x = torch.zeros(8, device=rank.device)
    loops = 100

    def many() -> None:
        for _ in range(loops):
            x.add_(1.0)

    return {"launch_seconds": time_alone(rank, many).seconds / loops}


def measure_host_link(rank: Rank) -> dict[str, float]:
    """Bytes per second between pinned host memory and the device, all ranks at once."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device=rank.device)
    there = time_alone(rank, lambda: device.copy_(host, non_blocking=True)).seconds
    back = time_alone(rank, lambda: host.copy_(device, non_blocking=True)).seconds
    return {
        "host_to_device_bytes_per_second": host.nbytes / there,
        "device_to_host_bytes_per_second": host.nbytes / back,
    }
