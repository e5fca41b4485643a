"""Everything the profiler can measure, as named cases: what is needed first, what refines it, what completes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..cluster import COLLECTIVES
from ..points import GEMM_OPERATIONS, SCALARS_BYTES
from . import chains, compute, concurrency, overheads
from .collectives import PlacedGroup, Placement, measure_bandwidths, measure_collective, measure_scalars
from .compute import linear_products, linear_shapes
from .timing import Rank

QUICK, DEFAULT, FULL = 0, 1, 2
Groups = dict[Placement, PlacedGroup]
# Shares of the time that the quick cases of each phase get (`worker.in_turn`): about what all of them take on CPUs.
PHASES = {"links": 0.25, "overheads": 0.45, "memory": 0.1, "attention": 0.03, "gemm": 0.17}


@dataclass(frozen=True)
class Case:
    """One measurement that all ranks make together. `name` tells it apart from all others, also in a file.

    `level` is QUICK where no plan can do without it, DEFAULT where it makes plans truer, FULL for the rest.
    Cases of one `ladder` differ by their `size`, which their time rises with: it is known before it is spent. `seconds`
    is about what a long one takes that no ladder tells of.
    What is `needed` is measured though time is up: without it no plan can be priced. `optional` is what needs a kernel
    that a device or a build of torch may lack: it is skipped there, while any other case that fails, but for want of
    memory, shows a bug.
    """

    name: str
    phase: str
    level: int
    measure: Callable[[Rank], Any]
    ladder: str = ""
    size: int = 0
    optional: bool = False
    needed: bool = False
    seconds: float = 0.0


def all_cases(rank: Rank, groups: Groups, dtypes: tuple[str, ...]) -> list[Case]:
    """Every case, by level, within the levels by phase, those of a phase in the order in which to measure."""
    cases = [
        *_links(rank, groups),
        *_overheads(rank, groups),
        *(case for dtype in dtypes for case in _memory(rank, dtype)),
        *(case for dtype in dtypes for case in _attention(rank, dtype)),
        *(case for dtype in dtypes for case in _gemm(rank, dtype)),
    ]
    ordered = [case for phase in PHASES for case in cases if case.level == QUICK and case.phase == phase]
    for level in (DEFAULT, FULL):
        # Each phase spread over the level, so that a budget that ends in the middle has seen some of each.
        queues = [[case for case in cases if (case.level, case.phase) == (level, phase)] for phase in PHASES]
        spread = [(i / len(queue), case) for queue in queues for i, case in enumerate(queue)]
        ordered += [case for _, case in sorted(spread, key=lambda pair: pair[0])]
    return ordered


# What every layout sends first.
_IN_ORDER = ("send_recv", "all_reduce", "all_gather", "reduce_scatter", "exchange", "all_to_all", "broadcast")
assert set(_IN_ORDER) == set(COLLECTIVES)

# ---- links -------------------------------------------------------------------------------------------------


def _links(rank: Rank, groups: Groups) -> Iterator[Case]:
    if rank.world_size == 1:
        return
    cuda = rank.device.type == "cuda"
    if cuda:
        sizes = {2**10: QUICK, 2**16: QUICK, 2**20: QUICK, 2**24: QUICK, 2**28: QUICK}
        sizes |= {2**p: DEFAULT for p in (12, 14, 18, 22, 26)} | {2**30: FULL, 2**13: FULL, 2**23: FULL}
    else:
        sizes = {2**10: QUICK, 2**18: QUICK, 2**22: QUICK}
        sizes |= {2**p: DEFAULT for p in (14, 16, 20, 21, 24)} | {2**p: FULL for p in (19, 26, 28, 30)}
    pair_bytes = 2**26 if cuda else 2**21
    yield Case("bandwidths", "links", QUICK, lambda r: {"bandwidths": measure_bandwidths(r, pair_bytes)})
    world = groups[rank.world_size, 1]
    yield Case("sum of loss and norm", "links", QUICK, partial(measure_scalars, placed=world), size=SCALARS_BYTES)
    # Small ones of all operations first: a slow link that leaves no time for the large ones has latencies then.
    for size, level in sorted(sizes.items()):
        for operation in _IN_ORDER:
            needed = operation != "broadcast"
            for placement, placed in groups.items():
                if operation == "send_recv" and placed.size != 2:
                    continue
                name = f"{operation} {_name(placement)} {size} bytes"
                run = partial(measure_collective, placed=placed, operation=operation, size_bytes=size)
                ladder = f"{operation} {placement}"
                yield Case(name, "links", level if needed else max(level, DEFAULT), run, ladder, size)
    for size in (2**16, 2**20, 2**24):
        for placement, placed in groups.items():
            run = partial(measure_collective, placed=placed, operation="all_to_all", size_bytes=size, uneven=True)
            name = f"all_to_all uneven {_name(placement)} {size} bytes"
            yield Case(name, "links", FULL, run, f"all_to_all {placement}", size)


def _name(placement: Placement) -> str:
    return f"{placement[0]} ranks {placement[1]} apart"


# ---- what surrounds the kernels ----------------------------------------------------------------------------


def _overheads(rank: Rank, groups: Groups) -> Iterator[Case]:
    cuda = rank.device.type == "cuda"
    yield Case("microbatch overhead", "overheads", QUICK, overheads.measure_microbatch)
    yield Case("parameter overhead", "overheads", QUICK, overheads.measure_parameter)
    yield Case("launch", "overheads", QUICK, compute.measure_launch)
    if not cuda:
        yield Case("chain", "overheads", QUICK, chains.measure_chain, seconds=1.5)
    if cuda:
        yield Case("issue", "overheads", QUICK, chains.measure_issue)
        yield Case("issue compiled", "overheads", DEFAULT, chains.measure_compiled_issue, optional=True, seconds=30.0)
        yield Case("host link", "overheads", DEFAULT, compute.measure_host_link)
    if rank.world_size == 1:
        return
    smallest, widest = min(groups), max(groups, key=lambda p: (p[0], -p[1]))
    fsdp = {2**18: QUICK, 2**20: QUICK, 2**23: QUICK, 2**16: DEFAULT, 2**21: DEFAULT, 2**25: DEFAULT}
    if cuda:
        fsdp |= {2**28: QUICK, 2**29: FULL}

    first, *others = fsdp

    def of_fsdp(size: int) -> Iterator[Case]:
        for placement, placed in groups.items():
            run = partial(overheads.measure_data_parallel, placed=placed, size_bytes=size)
            name, ladder = f"FSDP {_name(placement)} {size} bytes", f"FSDP {placement}"
            yield Case(name, "overheads", fsdp[size], run, ladder, size, seconds=1.5)

    # Where time is short the first of each count most.
    yield Case("contention", "overheads", QUICK, concurrency.measure_contention)
    if not cuda:
        for pair in [placed for placed in groups.values() if placed.size == 2][:1]:
            yield Case("messages", "overheads", QUICK, partial(concurrency.measure_messages, placed=pair))
        run = partial(overheads.measure_unsynchronised, placed=groups[smallest])
        yield Case("FSDP without collectives", "overheads", QUICK, run)
    yield from of_fsdp(first)
    run = partial(overheads.measure_sharded_block, placed=groups[smallest])
    yield Case("sharded block", "overheads", QUICK, run, seconds=3.0)
    run = partial(concurrency.measure_stragglers, placed=groups[smallest])
    yield Case("stragglers", "overheads", QUICK, run, seconds=3.0)
    if not cuda:
        for size in concurrency.CONTENTION_BYTES:
            run = partial(concurrency.measure_memory_contention, size_bytes=size)
            yield Case(f"contention {size} bytes", "overheads", QUICK, run)
    for size in others:
        yield from of_fsdp(size)
    for operation in ("all_reduce", "all_gather"):
        for size in (2**24, 2**27) if cuda else (2**20, 2**23):
            run = partial(concurrency.measure_overlap, placed=groups[widest], operation=operation, size_bytes=size)
            yield Case(f"overlap {operation} {size} bytes", "overheads", DEFAULT, run)


# ---- kernels -----------------------------------------------------------------------------------------------


def _memory(rank: Rank, dtype: str) -> Iterator[Case]:
    if dtype not in compute.TORCH_DTYPES or dtype == "tf32":
        return
    first, then = compute.memory_sizes(rank.device.type == "cuda")
    for level, sizes in ((QUICK, first), (DEFAULT, then)):
        for elements in sizes:
            for operation in compute.MEMORY_OPERATIONS:
                run = partial(compute.measure_memory, dtype=dtype, operation=operation, elements=elements)
                yield Case(f"{operation} {dtype} {elements} elements", "memory", level, run)


def _attention(rank: Rank, dtype: str) -> Iterator[Case]:
    if dtype not in compute.TORCH_DTYPES or dtype == "tf32":
        return
    cuda = rank.device.type == "cuda"
    if cuda:
        tokens, heads = 16384, 16
        ladder = {(64, QUICK): (512, 2048, 8192), (128, QUICK): (512, 2048, 8192)}
        ladder |= {(64, DEFAULT): (1024, 4096, 16384), (128, DEFAULT): (1024, 4096, 16384), (128, FULL): (32768,)}
        variant, backends = 4096, ("flash", "efficient", "cudnn", "math")
    else:
        tokens, heads = 1024, 4
        ladder = {(32, QUICK): (64, 256, 1024), (64, QUICK): (64, 256, 1024)}
        ladder |= {(32, DEFAULT): (128, 512), (64, DEFAULT): (128, 512, 2048), (128, DEFAULT): (64, 256, 1024)}
        ladder |= {(128, FULL): (128, 512, 2048), (64, FULL): (4096,)}
        variant, backends = 256, ("flash", "math")

    def case(level: int, head_dim: int, sequence: int, **kind: Any) -> Case:
        shape = (max(1, tokens // sequence), heads, sequence, head_dim)
        run = partial(_attend, dtype=dtype, shape=shape, **kind)
        words = " ".join(f"{key} {value}" for key, value in kind.items())
        name = f"attention {dtype} {'×'.join(map(str, shape))} {words}".strip()
        return Case(name, "attention", level, run, optional=bool(kind))

    for (head_dim, level), sequences in ladder.items():
        for sequence in sequences:
            yield case(level, head_dim, sequence)
    yield case(DEFAULT, 64, variant, kv_heads=heads // 4)
    yield case(DEFAULT, 64, variant, causal=False)
    for backend in backends:
        yield case(FULL, 64, variant, backend=backend)


def _attend(rank: Rank, *, dtype: str, shape: tuple[int, int, int, int], **kind: Any) -> Any:
    return compute.measure_attention(rank, dtype, *shape, **kind)


# Off the grid: odd widths and models' own, to judge interpolation by. (tokens, outputs, inputs)
_CPU_CHECKS = ((384, 192, 512), (1024, 96, 192), (768, 320, 704), (1536, 512, 192), (3072, 384, 96))
_CUDA_CHECKS = (
    (8192, 4096, 14336),
    (4096, 1280, 5120),
    (3072, 3584, 4736),
    (12288, 6144, 1536),
    (2048, 11008, 4096),
    (6144, 2304, 12288),
)


def _gemm(rank: Rank, dtype: str) -> Iterator[Case]:
    cuda = rank.device.type == "cuda"
    # (tokens, widths, most FLOPs of a product) of each level; a level measures what those before it have not.
    if cuda:
        ladders = (
            ((1024, 4096, 16384), (512, 2048, 8192), 1e13),
            ((256, 1024, 4096, 16384, 65536), (128, 512, 1024, 2048, 4096, 8192, 16384), 3e13),
            (
                (256, 512, 1024, 2048, 4096, 8192, 16384, 65536, 131072),
                (128, 512, 1024, 2048, 4096, 8192, 16384, 28672),
                1e14,
            ),
        )
    else:
        ladders = (
            ((128, 512, 2048), (64, 256, 1024), 5e9),
            ((32, 128, 512, 2048, 8192), (64, 128, 256, 512, 1024), 1e10),
            ((32, 128, 256, 512, 1024, 2048, 8192), (32, 64, 128, 256, 512, 1024, 2048), 4e10),
        )
    seen: set[tuple[str, int, int, int]] = set()
    for level, (tokens, widths, most) in enumerate(ladders):
        for shape in linear_shapes(tokens, widths):
            if shape not in seen and 2.0 * shape[1] * shape[2] * shape[3] <= most:
                first = len(seen) < len(GEMM_OPERATIONS)
                seen.add(shape)
                yield replace(_product(dtype, level, "gemm", *shape), needed=first)
    for index, (tokens, outputs, inputs) in enumerate(_CUDA_CHECKS if cuda else _CPU_CHECKS):
        for shape in linear_products(tokens, outputs, inputs):
            yield _product(dtype, QUICK if index < 2 else DEFAULT, "gemm_checks", *shape)
    if dtype in compute.TORCH_DTYPES:
        for kind in ("batched", "grouped"):
            for count in (4, 8) if not cuda else (8, 64):
                for rows in (64, 512):
                    width = (512, 256) if not cuda else (4096, 2048)
                    run = partial(
                        compute.measure_many_gemm, kind=kind, dtype=dtype, count=count, m=rows, n=width[0], k=width[1]
                    )
                    name = f"{kind} gemm {dtype} {count} of {rows}×{width[0]}×{width[1]}"
                    yield Case(name, "gemm", FULL, run, optional=True)


def _product(dtype: str, level: int, goes_to: str, operation: str, m: int, n: int, k: int) -> Case:
    run = partial(_multiply, goes_to=goes_to, dtype=dtype, operation=operation, m=m, n=n, k=k)
    return Case(f"{goes_to} {dtype} {operation} {m}×{n}×{k}", "gemm", level, run, optional=dtype == "fp8")


def _multiply(rank: Rank, *, goes_to: str, **shape: Any) -> Any:
    return {goes_to: [compute.measure_gemm(rank, **shape)]}
