"""Small made-up hardware, clusters and questions, every figure a parameter, for tests of the planner."""

from __future__ import annotations

from typing import Any

from planner.job import TrainingJob
from planner.layout import Layout
from planner.layout_costs import Blocks, LayoutCosts, StageCount
from planner.part_seconds import PartSeconds
from planner.question import Question
from planner.rules import RuleContext
from planner.step_cost import CostModel
from profiles.cluster import ClusterSpec, LinkTier
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import AttentionModel, GemmModel
from profiles.software import Software, load_software
from tests.plans import tiny_llama


def small_hardware(
    *, flops: float = 1e11, units: int = 4, halves: tuple[str, ...] = ("bf16",), **changes: Any
) -> HardwareProfile:
    """A device of `flops` FLOP/s in fp32 and twice that in 16 bits, modelled (nothing measured)."""
    rates = {"fp32": flops} | dict.fromkeys(halves, 2 * flops)
    fields: dict[str, Any] = {
        "name": "small",
        "device": "made up",
        "backend": "nccl",
        "memory_bytes": 1e9,
        "context_bytes": 1e4,
        "communicator_bytes": 1e3,
        "allocator_slack": 0.05,
        "memory_bandwidth_bytes_per_second": 1e10,
        "launch_seconds": 1e-6,
        "overlap_compute_slowdown": 1.25,
        "overlap_communication_slowdown": 1.5,
        "microbatch_overhead_seconds": 1e-5,
        "shard_overhead_seconds": 1e-6,
        "sequence_shard_overhead_seconds": 2e-6,
        "peak_flops_per_second": rates,
        "provenance": {"kind": "made up"},
        "gemm_models": tuple(
            GemmModel(dtype=dtype, achievable_flops_per_second=rate, units=units) for dtype, rate in rates.items()
        ),
        "attention_models": tuple(
            AttentionModel(dtype=dtype, forward_flops_per_second=rate / 2, backward_flops_per_second=rate / 3)
            for dtype, rate in rates.items()
        ),
    }
    return HardwareProfile(**(fields | changes))


def our_software() -> Software:
    """The facts of the runtime here."""
    entry = load_software("meshwright")
    return getattr(entry, "software", entry)


def small_cluster(
    devices: int = 4,
    nodes: int = 1,
    *,
    inside: tuple[float, float] = (1e9, 1e-5),
    across: tuple[float, float] = (1e8, 1e-4),
    memory_bytes: float = 1e9,
) -> ClusterSpec:
    """`devices` devices on `nodes` nodes; (bytes per second, latency) of the links inside and across."""
    per_node = devices // nodes
    tiers = [("node", per_node, inside)] + ([("network", devices, across)] if nodes > 1 else [])
    return ClusterSpec(
        name="small",
        hardware="small",
        nodes=nodes,
        devices_per_node=per_node,
        memory_bytes=memory_bytes,
        links=tuple(
            LinkTier(tier=tier, span=span, bandwidth_bytes_per_second=bandwidth, latency_seconds=latency)
            for tier, span, (bandwidth, latency) in tiers
        ),
    )


def small_question(
    model: ModelSpec | None = None,
    *,
    devices: int = 4,
    hardware: HardwareProfile | None = None,
    cluster: ClusterSpec | None = None,
    **job: Any,
) -> Question:
    """A tiny Llama with 8 sequences of 16 tokens in fp32 on 4 devices, but for what is given."""
    fields: dict[str, Any] = {"global_batch": 8, "sequence": 16, "precision": "fp32"}
    return Question(
        model=model or tiny_llama(),
        cluster=cluster or small_cluster(devices),
        hardware=hardware or small_hardware(),
        job=TrainingJob(**(fields | job)),
    )


def rule_context(world: int = 8, model: ModelSpec | None = None, **job: Any) -> RuleContext:
    """8 heads, 2 key-value heads, 4 layers, ffn 64, vocabulary 61; 8 sequences of 16 tokens."""
    fields: dict[str, Any] = {"global_batch": 8, "sequence": 16}
    model = model or tiny_llama(heads=8, head_dim=4)
    return RuleContext(model, TrainingJob(**(fields | job)), world)


# ---- prices ----------------------------------------------------------------------------------------------


def price(layout: Layout, question: Question | None = None, **hardware: Any) -> LayoutCosts:
    """The layout's costs; of the small question on as many devices, its hardware changed, where none is given."""
    question = question or small_question(devices=layout.world_size, hardware=small_hardware(**hardware))
    return CostModel(question.model, question.cluster, question.hardware, question.job).price(layout)


def block_of(costs: LayoutCosts) -> PartSeconds:
    """The seconds of a layer, all layers being alike."""
    (segment,) = costs.segments
    return segment.seconds


def counts(*pairs: tuple[int, int]) -> tuple[StageCount, ...]:
    """(kept, recomputed in full) of each stage, all layers being alike."""
    return tuple((Blocks(none=none, full=full),) for none, full in pairs)
