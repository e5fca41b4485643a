"""Probes of one device's compute: GEMM by shape, attention, and memory-bound operations by size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..hardware import AttentionPoint, GemmPoint, MemoryPoint
from .timing import Rank, median_seconds

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A ladder of sizes: outputs and inputs of linears down to what tp leaves of them, and tokens of a microbatch.
CPU_TOKENS = (128, 512, 2048, 8192)
CPU_WIDTHS = (64, 256, 1024)
CUDA_TOKENS = (512, 2048, 8192, 32768)
CUDA_WIDTHS = (256, 1024, 4096, 16384)
GEMM_REPEATS = 3


def gemm_shapes(cuda: bool) -> Iterator[tuple[str, int, int, int]]:
    """(operation, m, n, k) of the products that a linear of `tokens × in -> out` issues, small ones first."""
    tokens_ladder, widths = (CUDA_TOKENS, CUDA_WIDTHS) if cuda else (CPU_TOKENS, CPU_WIDTHS)
    linears = [(t, o, i) for t in tokens_ladder for o in widths for i in widths]
    for tokens, outputs, inputs in sorted(linears, key=lambda shape: shape[0] * shape[1] * shape[2]):
        yield "forward", tokens, outputs, inputs
        yield "input_grad", tokens, inputs, outputs
        yield "weight_grad", outputs, inputs, tokens


def measure_gemm(rank: Rank, dtype: str, operation: str, m: int, n: int, k: int) -> GemmPoint:
    """Time one product with its operands laid out as autograd lays them out for a linear."""
    kind = TORCH_DTYPES[dtype]
    left = torch.randn((k, m) if operation == "weight_grad" else (m, k), device=rank.device).to(kind)
    right = torch.randn((n, k) if operation == "forward" else (k, n), device=rank.device).to(kind)
    if operation == "forward":
        left = left.view(1, m, k)

    def action() -> torch.Tensor:
        if operation == "forward":
            return F.linear(left, right)
        return torch.mm(left.t() if operation == "weight_grad" else left, right)

    seconds = median_seconds(rank, action, repeats=GEMM_REPEATS)
    return GemmPoint(dtype=dtype, operation=operation, m=m, n=n, k=k, seconds=seconds)


def attention_shapes(cuda: bool) -> Iterator[tuple[int, int, int, int]]:
    """(batch, heads, sequence, head_dim)."""
    dims = (64, 128) if cuda else (32, 64)
    sequences = (512, 2048, 8192) if cuda else (64, 128, 256, 512, 1024)
    for head_dim in dims:
        for sequence in sequences:
            yield max(1, (16384 if cuda else 2048) // sequence), 8, sequence, head_dim


def measure_attention(
    rank: Rank, dtype: str, batch: int, heads: int, sequence: int, head_dim: int
) -> list[AttentionPoint]:
    """Time causal scaled-dot-product attention forward, and its backward."""
    shape = (batch, sequence, heads, head_dim)
    q, k, v = (
        torch.randn(shape, device=rank.device).to(TORCH_DTYPES[dtype]).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    forward, backward = _forward_backward(
        rank, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v)
    )
    common = {"dtype": dtype, "batch": batch, "heads": heads, "sequence": sequence, "head_dim": head_dim}
    return [
        AttentionPoint(direction="forward", seconds=forward, **common),
        AttentionPoint(direction="backward", seconds=backward, **common),
    ]


MEMORY_OPERATIONS = (
    "rmsnorm",
    "layernorm",
    "rope",
    "swiglu",
    "gelu",
    "gelu_tanh",
    "residual",
    "copy",
    "embedding",
    "cross_entropy",
    "accumulate",
    "gradient_norm",
    "adamw",
)
CPU_ELEMENTS = (1 << 14, 1 << 18, 1 << 20, 1 << 22)
CUDA_ELEMENTS = (1 << 16, 1 << 20, 1 << 24, 1 << 27)
_WIDTH = 256


def measure_memory(rank: Rank, dtype: str, operation: str, elements: int) -> list[MemoryPoint]:
    """Time a memory-bound operation on `elements` elements, forward and, where there is one, backward."""
    if operation in ("accumulate", "gradient_norm", "adamw"):
        directions = {"forward": _measure_update(rank, operation, elements)}
    else:
        forward, backward = _measure_differentiable(rank, dtype, operation, elements)
        directions = {"forward": forward, "backward": backward}
    return [
        MemoryPoint(dtype=dtype, operation=operation, direction=direction, elements=elements, seconds=seconds)
        for direction, seconds in directions.items()
    ]


def _measure_update(rank: Rank, operation: str, elements: int) -> float:
    """Updates of state run in fp32 whatever the precision of the compute."""
    weight = torch.nn.Parameter(torch.randn(elements, device=rank.device))
    weight.grad = torch.randn_like(weight)
    if operation == "adamw":
        optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
        return median_seconds(rank, optimizer.step)
    fresh = torch.randn_like(weight)
    gradient = weight.grad
    if operation == "accumulate":
        return median_seconds(rank, lambda: gradient.add_(fresh))
    return median_seconds(rank, lambda: (torch.linalg.vector_norm(gradient), gradient.mul_(1.0)))


def _measure_differentiable(rank: Rank, dtype: str, operation: str, elements: int) -> tuple[float, float]:
    kind = TORCH_DTYPES[dtype]
    rows = max(1, elements // _WIDTH)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=rank.device).to(kind).requires_grad_()

    x = tensor(rows, _WIDTH)
    weight, bias = tensor(_WIDTH), tensor(_WIDTH)
    other = tensor(rows, _WIDTH)
    tokens = torch.randint(0, _WIDTH, (rows,), device=rank.device)
    heads = tensor(1, 4, rows, _WIDTH // 4)
    cosine = torch.randn(rows, _WIDTH // 4, device=rank.device).to(kind)
    table = tensor(_WIDTH, _WIDTH)

    def rope() -> torch.Tensor:
        low, high = heads.chunk(2, dim=-1)
        return heads * cosine + torch.cat((-high, low), dim=-1) * cosine

    actions: dict[str, tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]] = {
        "rmsnorm": (lambda: F.rms_norm(x, (_WIDTH,), weight, 1e-5), (x, weight)),
        "layernorm": (lambda: F.layer_norm(x, (_WIDTH,), weight, bias), (x, weight, bias)),
        "rope": (rope, (heads,)),
        "swiglu": (lambda: F.silu(x) * other, (x, other)),
        "gelu": (lambda: F.gelu(x), (x,)),
        "gelu_tanh": (lambda: F.gelu(x, approximate="tanh"), (x,)),
        "residual": (lambda: x + other, (x, other)),
        "copy": (lambda: heads.transpose(1, 2).reshape(1, rows, _WIDTH), (heads,)),
        "embedding": (lambda: F.embedding(tokens, table), (table,)),
        "cross_entropy": (lambda: F.cross_entropy(x.float(), tokens, reduction="sum"), (x,)),
    }
    action, inputs = actions[operation]
    return _forward_backward(rank, action, inputs)


def _forward_backward(
    rank: Rank, action: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]
) -> tuple[float, float]:
    """Median seconds of `action` and of its backward."""
    forward = median_seconds(rank, action)
    output = action()
    gradient = torch.randn_like(output)
    backward = median_seconds(rank, lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True))
    return forward, backward
