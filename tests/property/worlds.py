"""Hypothesis strategies: small random models, machines and jobs whose every layout can be tried."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from hypothesis import strategies as st

from planner.layout import Layout
from planner.memory_cost import MemoryBytes, PartMemory
from planner.part_seconds import PartSeconds, Seconds
from planner.schedule import Pipeline, in_flight
from planner.search import Question
from planner.step_cost import LayoutCosts
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import DATA_PARALLEL, CollectivePoint, ContentionPoint, WaitPoint
from tests.oracles.brute_force import all_layouts, assignments
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
        for operation in draw(st.sets(st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "send_recv")))):
            collectives += draw(measured_sizes(operation, (2,) if operation == "send_recv" else (2, 4)))
    if draw(st.integers(0, 3)) == 0:
        collectives += draw(measured_sizes(draw(st.sampled_from(DATA_PARALLEL)), (2, 3, 4)))
    slowdowns = [1.0, *draw(st.sampled_from(((), (1.1,), (1.1, 1.6))))]
    waits = [WaitPoint(compute_seconds=10.0**-e, wait_seconds=draw(powers(-6, -3))) for e in (4, 3, 2)]
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
        parameter_overhead_seconds=draw(or_zero(powers(-7, -4))),
        corrections=draw(st.sampled_from(({}, {"gemm": 1.3, "memory": 0.8, "optimizer": 2.0, "tp": 1.2, "dp": 0.7}))),
        contention_points=tuple(contention) if draw(st.booleans()) else (),
        waits=tuple(waits) if draw(st.booleans()) else (),
        collectives=tuple(collectives),
    )


@cache
def _actions_of(layers: int, stages: int) -> int:
    return stages * sum(1 for _ in assignments(layers, stages))


def actions(question: Question) -> int:
    """Actions that brute force simulates for the question."""
    job = question.job
    return sum(
        2 * layout.microbatches(job.global_batch) * _actions_of(question.model.layers, layout.pp)
        for layout in all_layouts(question)
    )


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """A question without a memory limit that brute force answers in about a third of a second."""
    devices = draw(st.sampled_from((1, 2, 3, 4, 6, 8)))
    nodes = draw(st.sampled_from((1, 2))) if devices % 2 == 0 else 1
    question = small_question(
        draw(models()),
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
    )
    while actions(question) > MOST_ACTIONS:
        model, job = question.model, question.job
        if model.layers > 2:
            question = replace(question, model=replace(model, layers=model.layers - 1))
        else:
            question = replace(question, job=replace(job, global_batch=job.global_batch // 2))
    return question


# ---- costs that no model gives rise to ------------------------------------------------------------------

_seconds = st.just(0.0) | st.floats(0.001, 10.0).map(lambda value: round(value, 3))
_parts = st.builds(PartSeconds, *[st.builds(Seconds, compute=_seconds, tp=_seconds, dp=_seconds)] * 6)
_sizes = st.floats(0.0, 100.0).map(lambda value: round(value, 1))


@st.composite
def part_memories(draw: st.DrawFn) -> PartMemory:
    """Recomputing holds no more and needs no less at once, as `memory_cost` has it."""
    held, transient = draw(_sizes), draw(_sizes)
    return PartMemory(
        MemoryBytes(weights=draw(_sizes)),
        MemoryBytes(activations=held),
        MemoryBytes(activations=round(held * draw(st.floats(0, 1)), 1)),
        transient,
        transient + draw(_sizes),
    )


@st.composite
def layout_costs(draw: st.DrawFn) -> LayoutCosts:
    """Any seconds and bytes at all, on a pipeline of up to 4 stages and 5 layers."""
    stages = draw(st.integers(1, 4))
    schedule = draw(st.sampled_from(("gpipe", "1f1b")))
    microbatches = draw(st.integers(stages if schedule == "1f1b" else 1, 6))
    return LayoutCosts(
        layout=Layout(pp=stages, schedule=schedule),
        microbatches=microbatches,
        layers=draw(st.integers(max(1, stages - 2), 5)),
        block=draw(_parts),
        embedding=draw(_parts),
        head=draw(_parts),
        microbatch=PartSeconds(forward=Seconds(draw(_seconds)), backward=Seconds(draw(_seconds))),
        send_seconds=draw(_seconds) if stages > 1 else 0.0,
        step_seconds=draw(_seconds),
        block_memory=draw(part_memories()),
        embedding_memory=draw(part_memories()),
        head_memory=draw(part_memories()),
        fixed_memory=(MemoryBytes(context=draw(_sizes)),) * stages,
        in_flight=tuple(moment.full[0] for (moment,) in in_flight(Pipeline(schedule, stages, 1, microbatches))),
        allocator_slack=draw(st.sampled_from((0.0, 0.1))),
    )
