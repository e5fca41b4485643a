"""Hypothesis strategies: small random models, machines and jobs whose every layout can be tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

from hypothesis import strategies as st

from planner.gradient_moments import gradients_by_torch
from planner.in_flight import in_flight
from planner.layout import RECOMPUTE_MODES, SCHEDULES, Layout
from planner.layout_costs import LayoutCosts, SegmentCosts
from planner.memory_bytes import MemoryBytes, PartMemory
from planner.part_seconds import PartSeconds, Seconds
from planner.question import Question
from planner.schedule import SPLIT_BACKWARD, Pipeline, why_illegal
from profiles.experts_spec import Experts
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import DATA_PARALLEL, CollectivePoint, ContentionPoint, ShardPoint, WaitPoint
from tests.oracles.brute_force import all_layouts, assignments, is_legal, modes_of
from tests.oracles.small_world import small_cluster, small_hardware, small_question

# Actions that brute force simulates for one question, about: a third of a second.
MOST_ACTIONS = 12_000


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """10^x, x between the two: figures whose size is unknown."""
    return st.floats(low, high, allow_nan=False).map(lambda exponent: 10.0**exponent)


def or_zero(figures: st.SearchStrategy[float]) -> st.SearchStrategy[float]:
    return st.just(0.0) | figures


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    heads = draw(st.sampled_from((1, 2, 4, 6, 8)))
    head_dim = draw(st.sampled_from((2, 4, 16)))
    kv_heads = draw(st.sampled_from([kv for kv in range(1, heads + 1) if heads % kv == 0]))
    biases = draw(st.booleans())
    return ModelSpec(
        name="random",
        family="random",
        layers=draw(st.integers(1, 6)),
        hidden_size=heads * head_dim,
        ffn_hidden_size=draw(st.sampled_from((8, 24, 64, 200))),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(2, 300)),
        max_positions=draw(st.sampled_from((32, 100))),
        norm=draw(st.sampled_from(("rmsnorm", "layernorm"))),
        activation=draw(st.sampled_from(("gelu", "gelu_tanh", "swiglu"))),
        positions=draw(st.sampled_from(("rope", "learned"))),
        qkv_bias=biases,
        mlp_bias=biases,
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def measured_sizes(draw: st.DrawFn, operation: str, sizes: tuple[int, ...]) -> list[CollectivePoint]:
    """A collective at two sizes over one kind of group."""
    ranks, stride, small = draw(st.sampled_from(sizes)), draw(st.sampled_from((1, 2))), draw(powers(-6, -3))
    points = ((1024, small), (1 << 20, small * draw(st.floats(1, 100))))
    return [CollectivePoint(operation=operation, ranks=ranks, stride=stride, bytes=b, seconds=s) for b, s in points]


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    collectives = []
    if draw(st.integers(0, 3)) == 0:
        for operation in draw(
            st.sets(st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")))
        ):
            collectives += draw(measured_sizes(operation, (2,) if operation == "send_recv" else (2, 4)))
    if draw(st.integers(0, 3)) == 0:
        collectives += draw(measured_sizes(draw(st.sampled_from(DATA_PARALLEL)), (2, 3, 4)))
    slowdowns = [1.0, *draw(st.sampled_from(((), (1.1,), (1.1, 1.6))))]
    waits = [WaitPoint(compute_seconds=10.0**-e, wait_seconds=draw(powers(-6, -3))) for e in (4, 3, 2)]
    shards = [ShardPoint(bytes=size, seconds=draw(powers(-6, -3))) for size in (2**6, 2**10)]
    contention = [ContentionPoint(active=2**i, slowdown=slowdown) for i, slowdown in enumerate(slowdowns)]
    return small_hardware(
        flops=draw(powers(7, 13)),
        units=draw(st.sampled_from((1, 4, 108))),
        backend=draw(st.sampled_from(("nccl", "gloo"))),
        context_bytes=draw(or_zero(powers(2, 6))),
        communicator_bytes=draw(or_zero(powers(2, 5))),
        allocator_slack=draw(st.sampled_from((0.0, 0.05, 0.3))),
        memory_bandwidth_bytes_per_second=draw(powers(7, 12)),
        launch_seconds=draw(or_zero(powers(-7, -4))),
        overlap_compute_slowdown=draw(st.sampled_from((1.0, 1.2, 2.0))),
        overlap_communication_slowdown=draw(st.sampled_from((1.0, 1.2, 2.0))),
        straggler_slowdown=draw(st.sampled_from((1.0, 1.05, 1.5))),
        microbatch_overhead_seconds=draw(or_zero(powers(-6, -3))),
        shard_overhead_seconds=draw(or_zero(powers(-6, -3))),
        sequence_shard_overhead_seconds=draw(or_zero(powers(-6, -3))),
        operation_overhead_seconds=draw(or_zero(powers(-7, -5))),
        split_overhead_seconds=draw(or_zero(powers(-7, -5))),
        selective_overhead_seconds=draw(or_zero(powers(-7, -5))),
        fsdp_forward_overhead_seconds=draw(or_zero(powers(-6, -3))),
        fsdp_backward_overhead_seconds=draw(or_zero(powers(-6, -3))),
        message_overhead_seconds=draw(or_zero(powers(-6, -3))),
        message_overhead_seconds_per_byte=draw(or_zero(powers(-10, -8))),
        parameter_overhead_seconds=draw(or_zero(powers(-7, -4))),
        corrections=draw(st.sampled_from(({}, {"gemm": 1.3, "memory": 0.8, "optimizer": 2.0, "tp": 1.2, "dp": 0.7}))),
        contention_points=tuple(contention) if draw(st.booleans()) else (),
        waits=tuple(waits) if draw(st.booleans()) else (),
        shard_overheads=tuple(shards) if draw(st.booleans()) else (),
        collectives=tuple(collectives),
    )


@st.composite
def with_experts(draw: st.DrawFn) -> ModelSpec:
    """The first layer or none dense; some experts are shared by all tokens."""
    model = draw(models())
    layers, width = max(2, model.layers), draw(st.sampled_from((8, 24)))
    dense = draw(st.integers(0, layers - 1))
    number = draw(st.sampled_from((2, 4, 6)))
    experts = Experts(
        number=number,
        top_k=draw(st.integers(1, number)),
        ffn_hidden_size=width,
        shared=draw(st.sampled_from((0, 1, 2))),
        dense_layers=dense,
        router_bias=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
    )
    return replace(model, layers=layers, experts=experts, ffn_hidden_size=model.ffn_hidden_size if dense else width)


@cache
def _actions_of(segments: tuple[int, ...], stages: int, modes: tuple[str, ...]) -> int:
    return stages * sum(1 for _ in assignments(segments, stages, modes))


def actions(question: Question, layouts: Sequence[Layout]) -> int:
    """Actions that brute force simulates for the question, whose layouts these are."""
    segments = tuple(segment.count for segment in question.model.segments)
    return sum(
        2
        * layout.microbatches(question.job.global_batch)
        * _actions_of(segments, layout.stages, modes_of(layout, question))
        for layout in layouts
    )


@st.composite
def questions(draw: st.DrawFn, target: str = "meshwright", most_actions: int = MOST_ACTIONS) -> Question:
    """A question without a memory limit that brute force answers in about a third of a second.

    What is too large gets pins, fewer layers and a smaller batch.
    """
    devices = draw(st.sampled_from((1, 2, 3, 4, 6, 8)))
    nodes = draw(st.sampled_from((1, 2))) if devices % 2 == 0 else 1
    experts = target == "megatron" and draw(st.booleans())
    question = small_question(
        draw(with_experts() if experts else models()),
        hardware=draw(machines()),
        cluster=small_cluster(
            devices,
            nodes,
            inside=(draw(powers(6, 11)), draw(or_zero(powers(-7, -4)))),
            across=(draw(powers(5, 10)), draw(or_zero(powers(-6, -3)))),
            memory_bytes=1e15,
        ),
        global_batch=draw(st.integers(1, 8)),
        sequence=draw(st.sampled_from((1, 4, 16, 24))),
        precision=draw(st.sampled_from(("fp32", "bf16"))),
        target=target,
        expert_imbalance=draw(st.sampled_from((1.0, 1.3))) if experts else 1.0,
        expert_capacity=draw(st.sampled_from((None, 1.25))) if experts else None,
    )
    keys: list[str] = list(draw(st.permutations(_PINNED_FIRST)))
    layouts = all_layouts(question)
    while actions(question, layouts) > most_actions:
        if keys:
            question = _pinned(draw, question, keys.pop(), layouts)
            layouts = [layout for layout in layouts if is_legal(layout, question)]  # all that a pin can leave
        else:
            question = _smaller(question)
            layouts = all_layouts(question)
    return question


_PINNED_FIRST = ("tp", "cp", "pp", "schedule", "virtual_stages", "zero", "micro_batch", "ep", "cp_style", "recompute")


def _pinned(draw: st.DrawFn, question: Question, key: str, layouts: Sequence[Layout]) -> Question:
    layout = draw(st.sampled_from(layouts))
    value = draw(st.sampled_from(modes_of(layout, question))) if key == "recompute" else vars(layout)[key]
    return replace(question, job=replace(question.job, pins={**question.job.pins, key: value}))


def _smaller(question: Question) -> Question:
    model, job = question.model, question.job
    dense = model.experts.dense_layers if model.experts else 0
    if model.layers > max(2, dense + 1):
        return replace(question, model=replace(model, layers=model.layers - 1))
    if job.global_batch > 1:
        free = {key: value for key, value in job.pins.items() if key != "micro_batch"}
        return replace(question, job=replace(job, global_batch=job.global_batch // 2, pins=free))
    assert model.experts is not None
    fewer = replace(model.experts, dense_layers=max(1, dense - 1))
    return replace(question, model=replace(model, layers=model.layers - 1, experts=fewer))


# ---- costs that no model gives rise to ------------------------------------------------------------------

_seconds = st.just(0.0) | st.floats(0.001, 10.0).map(lambda value: round(value, 3))
_causes = st.builds(Seconds, compute=_seconds, tp=_seconds, cp=_seconds, ep=_seconds, dp=_seconds)
_parts = st.builds(PartSeconds, *[_causes] * 8)
_sizes = st.floats(0.0, 100.0).map(lambda value: round(value, 1))


@st.composite
def part_memories(draw: st.DrawFn) -> PartMemory:
    """Recomputing holds no more and needs no less at once, and gradients and weights take activations' place, as
    `memory_cost` has it."""
    held, transient = draw(_sizes), draw(_sizes)
    shares = [draw(st.floats(0, 1)) for _ in range(3)]
    selective, full, weight = (round(held * share, 1) for share in (max(shares[:2]), min(shares[:2]), shares[2]))
    more = sorted((draw(_sizes), draw(_sizes)))
    by_mode = dict(zip(RECOMPUTE_MODES, (held, selective, full), strict=True))
    gradients, gathered = draw(_sizes), draw(_sizes)
    left = {mode: max(0.0, gathered - kept) for mode, kept in by_mode.items()}
    passing = sorted(draw(_sizes) for _ in RECOMPUTE_MODES)
    return PartMemory(
        MemoryBytes(weights=draw(_sizes)),
        MemoryBytes(activations=held),
        MemoryBytes(activations=full),
        transient,
        transient + more[1],
        MemoryBytes(activations=selective),
        transient + more[0],
        MemoryBytes(activations=weight),
        *left.values(),
        summed=MemoryBytes(gradients=gradients),
        reduced=MemoryBytes(gradients=gradients * draw(st.floats(0, 1))),
        turned=MemoryBytes(gradients=gradients, gathered_weights=gathered),
        ahead=gathered,
        transient_first={"none": passing[0], "selective": passing[1], "full": passing[2]},
    )


@st.composite
def _hops(draw: st.DrawFn, pipeline: Pipeline) -> tuple[float, ...]:
    """Seconds of a message of each hop, each as its ranks are placed; the same ranks' stages need none."""
    ranks = list(map(pipeline.rank_of, range(pipeline.stages)))
    seconds = {pair: draw(_seconds) for pair in dict.fromkeys(map(frozenset, pairwise(ranks)))}
    return tuple(seconds[frozenset(pair)] if pair[0] != pair[1] else 0.0 for pair in pairwise(ranks))


@st.composite
def layout_costs(draw: st.DrawFn, schedules: Sequence[str] = ("gpipe", "1f1b"), segments: int = 1) -> LayoutCosts:
    """Any seconds and bytes at all, on up to 4 pipeline ranks, 6 stages and 5 layers."""
    ranks, schedule = draw(st.integers(1, 4)), draw(st.sampled_from(schedules))
    if schedule not in ("gpipe", "1f1b"):
        ranks = draw(st.integers(2, 3))
    pipelines = [
        Pipeline(schedule, ranks, chunks, microbatches)
        for chunks in range(1, 6 // ranks + 1)
        for microbatches in range(1, 7)
    ]
    pipeline = draw(st.sampled_from([each for each in pipelines if why_illegal(each) is None]))
    layers = draw(st.integers(max(1, pipeline.stages - 2), 5))
    cuts = sorted(draw(st.lists(st.integers(1, layers - 1), unique=True, max_size=segments - 1))) if layers > 1 else []
    runs = [end - first for first, end in zip([0, *cuts], [*cuts, layers], strict=True)]
    kinds = [(draw(_parts), draw(part_memories())) for _ in range(2)]
    return LayoutCosts(
        layout=Layout(pp=ranks, schedule=schedule, virtual_stages=pipeline.chunks),
        microbatches=pipeline.microbatches,
        segments=tuple(
            SegmentCosts(("dense", "experts")[k % 2], number, *kinds[k % 2]) for k, number in enumerate(runs)
        ),
        embedding=draw(_parts),
        head=draw(_parts),
        microbatch=PartSeconds(forward=Seconds(draw(_seconds)), backward_input=Seconds(draw(_seconds))),
        hop_seconds=draw(_hops(pipeline)),
        step_seconds=draw(_seconds),
        embedding_memory=draw(part_memories()),
        head_memory=draw(part_memories()),
        fixed_memory=(MemoryBytes(context=draw(_sizes)),) * ranks,
        in_flight=draw(st.sampled_from((in_flight, gradients_by_torch)))(pipeline),
        allocator_slack=draw(st.sampled_from((0.0, 0.1))),
        receives_early=draw(st.booleans()),
    )


@st.composite
def any_layout_costs(draw: st.DrawFn) -> tuple[LayoutCosts, tuple[str, ...]]:
    """Costs of any schedule and chain of segments, and what its layers may recompute."""
    costs = draw(layout_costs(SCHEDULES, segments=3))
    split = costs.layout.schedule in SPLIT_BACKWARD
    modes = (("none",),) if split else (("none", "selective", "full"), ("none", "full"), ("selective",), ("full",))
    return costs, draw(st.sampled_from(modes))
