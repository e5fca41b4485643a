"""LayoutCosts: linear in the assignment, parts that sum, what each zero level gathers and reduces, and when."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.comm_cost import CommModel, Group
from planner.layout import Layout
from planner.part_seconds import PartSeconds, Seconds
from planner.plan import TIME_PARTS
from planner.search import Question
from planner.step_cost import CostModel, LayoutCosts, StageCount
from profiles.catalogue import resolve_cluster
from tests.oracles.brute_force import all_layouts, assignments
from tests.oracles.small_world import small_cluster, small_hardware, small_question
from tests.plans import tiny_gpt2, tiny_llama
from tests.property.worlds import questions

PHASES = ("forward", "backward", "recompute", "gather", "reduce", "optimizer")


def price(layout: Layout, question: Question | None = None, **hardware: Any) -> LayoutCosts:
    question = question or small_question(devices=layout.world_size, hardware=small_hardware(**hardware))
    return CostModel(question.model, question.cluster, question.hardware, question.job).price(layout)


def counts(*pairs: tuple[int, int]) -> list[StageCount]:
    return [StageCount(none, full) for none, full in pairs]


# ---- sums ------------------------------------------------------------------------------------------------


def test_seconds_and_parts_add_up_and_scale() -> None:
    assert Seconds(1, 2, 3) + Seconds(10, 20, 30) * 2 == Seconds(21, 42, 63)
    assert Seconds(1, 2, 3).total == 6
    one = PartSeconds(*(Seconds(i, 1, 0) for i in range(6)))
    assert one + one == one * 2
    assert [getattr(one * 3, phase).compute for phase in PHASES] == [0, 3, 6, 9, 12, 15]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_priced_assignment_decomposes(data: st.DataObject) -> None:
    question = data.draw(questions())
    if not (layouts := all_layouts(question)):
        return
    layout = data.draw(st.sampled_from(layouts))
    costs = price(layout, question)
    every = list(assignments(costs.layers, layout.pp))
    chosen = data.draw(st.sampled_from(every))
    breakdown = costs.breakdown(chosen)
    assert tuple(breakdown) == TIME_PARTS
    assert sum(breakdown.values()) == pytest.approx(costs.step(chosen), rel=1e-12)
    assert min(breakdown.values()) >= 0
    # A step is no shorter than any rank's own work, and memory adds up.
    for stage, count in enumerate(chosen):
        work = costs.stage_seconds(stage, count)
        own = costs.microbatches * (work.forward + work.backward + work.recompute).total
        own += (work.gather + work.reduce + work.optimizer).total + costs.step_seconds
        assert own <= costs.step(chosen) * (1 + 1e-12)
        bytes_used = costs.memory(chosen)[stage]
        assert bytes_used.total == pytest.approx(sum(bytes_used.items().values()))
        assert min(bytes_used.items().values()) >= 0
        tensors = bytes_used.total - bytes_used.context - bytes_used.communicators - bytes_used.allocator_slack
        assert bytes_used.allocator_slack == pytest.approx(costs.allocator_slack * tensors)


def test_a_stage_is_linear_in_its_blocks() -> None:
    costs = price(Layout(pp=2, dp=2, zero=1, dp_shard=2))
    for stage in (0, 1):
        empty = costs.stage_seconds(stage, StageCount(0, 0))
        for none, full in ((1, 0), (0, 1), (2, 3)):
            cost = costs.stage_seconds(stage, StageCount(none, full))
            for phase in PHASES:
                per_block = getattr(costs.block, phase).total
                number = full if phase == "recompute" else none + full
                assert getattr(cost, phase).total == pytest.approx(getattr(empty, phase).total + number * per_block)
    # The embedding sits on the first stage and the head on the last.
    ends = [costs.ends_seconds(s) for s in (0, 1)]
    assert ends[0] == costs.microbatch + costs.embedding
    assert ends[1] == costs.microbatch + costs.head
    assert costs.ends_seconds(0) != costs.ends_seconds(1)


def test_a_stages_memory_item_by_item() -> None:
    costs = price(Layout(pp=2))  # 8 microbatches; the first stage holds two in flight
    block, embedding = costs.block_memory, costs.embedding_memory
    assert costs.in_flight == (2, 1)
    used = costs.stage_memory(0, StageCount(2, 1))
    assert used.weights == 3 * block.state.weights + embedding.state.weights
    assert used.optimizer == 3 * block.state.optimizer + embedding.state.optimizer
    assert used.activations == 2 * (2 * block.held.activations + block.held_recomputed.activations)
    assert used.transient == block.transient_recomputed
    assert costs.stage_memory(0, StageCount(3, 0)).transient == block.transient
    assert costs.stage_memory(0, StageCount(0, 0)).transient == 0
    last = costs.stage_memory(1, StageCount(1, 0))
    assert last.logits == costs.head_memory.held.logits
    assert last.transient == max(block.transient, costs.head_memory.transient)
    assert last.pipeline_buffers == used.pipeline_buffers == 8 * 16 * 32 * 4


# ---- tensor parallelism ----------------------------------------------------------------------------------


def test_what_tp_sends() -> None:
    layout = Layout(tp=4, micro_batch=2)
    question = small_question(devices=4)
    comm = CommModel(question.cluster, question.hardware)
    hidden = 4.0 * 2 * 16 * 32
    reduced = comm.collective_seconds("all_reduce", Group(4, 1), hidden)
    loss = 3 * comm.collective_seconds("all_reduce", Group(4, 1), 4.0 * 2 * 16)
    plain = price(layout)
    assert plain.block.forward.tp == plain.block.backward.tp == pytest.approx(2 * reduced)
    # The recomputation ends before the sum that ends the MLP.
    assert plain.block.recompute.tp == pytest.approx(reduced)
    assert (plain.embedding.forward.tp, plain.embedding.backward.tp) == (pytest.approx(reduced), 0.0)
    assert (plain.head.forward.tp, plain.head.backward.tp) == (pytest.approx(loss), pytest.approx(reduced))
    cut = price(replace(layout, sequence_parallel=True))
    gather = comm.collective_seconds("all_gather", Group(4, 1), hidden)
    scatter = comm.collective_seconds("reduce_scatter", Group(4, 1), hidden)
    assert cut.block.forward.tp == cut.block.backward.tp == pytest.approx(2 * (gather + scatter))
    assert cut.block.recompute.tp == pytest.approx(2 * gather + scatter)
    assert (cut.embedding.forward.tp, cut.embedding.backward.tp) == (pytest.approx(scatter), pytest.approx(gather))
    assert (cut.head.forward.tp, cut.head.backward.tp) == (pytest.approx(gather + loss), pytest.approx(scatter))


def test_without_tp_and_dp_nothing_is_sent() -> None:
    costs = price(Layout())
    for part in (costs.block, costs.embedding, costs.head):
        assert all(getattr(part, phase).tp == getattr(part, phase).dp == 0.0 for phase in PHASES)
    assert costs.send_seconds == 0.0
    assert costs.step_seconds == 0.0


# ---- data parallelism ------------------------------------------------------------------------------------


# While both run each takes this many times as long: twice is one after the other.
NOTHING_HIDDEN = {"overlap_compute_slowdown": 2.0, "overlap_communication_slowdown": 2.0}
EVERYTHING_HIDDEN = {"overlap_compute_slowdown": 1.0, "overlap_communication_slowdown": 1.0}
SHARDED = {zero: Layout(dp=2, zero=zero, dp_shard=2) for zero in (1, 2, 3)}


def dp_seconds(zero: int, pp: int = 1, part: str = "block", **hardware: Any) -> dict[str, float]:
    layout = Layout(dp=2, pp=pp, zero=zero, dp_shard=2 if zero else 1)
    costs = getattr(price(layout, **(NOTHING_HIDDEN | hardware)), part)
    return {phase: getattr(costs, phase).dp for phase in PHASES if getattr(costs, phase).dp}


@pytest.mark.parametrize("pp", [1, 2])
def test_what_each_zero_level_gathers_and_reduces_and_when(pp: int) -> None:
    """fp32: a gather of the weights, a reduction of the gradients, each with a copy in and out of a flat buffer."""
    question = small_question(devices=2 * pp)
    comm, model = CommModel(question.cluster, question.hardware), question.model
    parts = {"block": model.block_parameters, "embedding": model.embedding_parameters, "head": model.head_parameters}
    for part, parameters in parts.items():
        group, copy = Group(2, 1), 2 * 4 * parameters / 1e10
        gather = pytest.approx(comm.collective_seconds("all_gather", group, 4.0 * parameters) + copy)
        scatter = pytest.approx(comm.collective_seconds("reduce_scatter", group, 4.0 * parameters) + copy)
        reduce = pytest.approx(comm.collective_seconds("all_reduce", group, 4.0 * parameters) + copy)
        assert dp_seconds(0, pp, part) == {"reduce": reduce}
        assert dp_seconds(1, pp, part) == {"gather": gather, "reduce": scatter}
        if pp == 2:
            # M + 1 gathers of a block and one of the root, as tests/distributed/test_collectives.py counts them.
            again = {"backward": gather} if part == "block" else {}
            assert dp_seconds(3, pp, part) == {"gather": gather, "reduce": scatter} | again
            continue
        assert dp_seconds(2, part=part) == {"gather": gather, "backward": scatter}
        # The root group, embedding and head, stays gathered from forward to backward.
        again = gather.expected if part == "block" else 0.0
        assert dp_seconds(3, part=part) == {"forward": gather, "backward": pytest.approx(again + scatter.expected)}


def test_what_shows_of_communication_is_what_compute_beside_it_leaves_over() -> None:
    brief = {"flops": 1e14, "launch_seconds": 0.0, "memory_bandwidth_bytes_per_second": 1e12}
    slowed = {"overlap_compute_slowdown": 1.25, "overlap_communication_slowdown": 1.5}
    alone = price(Layout(dp=2), small_question(devices=2, hardware=small_hardware(**NOTHING_HIDDEN, **brief))).block
    reduced, backward = alone.reduce.dp, alone.backward.total
    assert reduced > 2 * backward > 0  # the reduction outlasts the kernels
    # Both at full pace: the kernels' seconds are gone. At 1.25 and 1.5 they last 1.25 of them, in which the
    # reduction gets 1.25 / 1.5 as far; the rest of it comes after.
    shown = dp_seconds(0, **EVERYTHING_HIDDEN, **brief)["reduce"]
    assert shown == pytest.approx(reduced - backward, rel=1e-12)
    shown = dp_seconds(0, **slowed, **brief)["reduce"]
    assert shown == pytest.approx((1.25 - 1) * backward + reduced - 1.25 / 1.5 * backward, rel=1e-12)
    # A gather hides behind a forward; in zero 3's backward another gather and the reduction behind the backward.
    whole, shown_of_zero3 = (
        price(SHARDED[3], small_question(devices=2, hardware=small_hardware(**overlap, **brief))).block
        for overlap in (NOTHING_HIDDEN, EVERYTHING_HIDDEN)
    )
    assert whole.forward.dp - shown_of_zero3.forward.dp == pytest.approx(whole.forward.compute, rel=1e-9)
    assert whole.backward.dp - shown_of_zero3.backward.dp == pytest.approx(2 * whole.backward.compute, rel=1e-9)
    # Behind kernels that take long enough nothing shows at full pace; at a slower one, what they lose meanwhile.
    endless = {"flops": 1e7}
    assert dp_seconds(0, **EVERYTHING_HIDDEN, **endless) == {}
    whole_reduce = dp_seconds(0, **NOTHING_HIDDEN, **endless)["reduce"]
    assert dp_seconds(0, **slowed, **endless)["reduce"] == pytest.approx(whole_reduce * 1.5 * (1 - 1 / 1.25), rel=1e-12)


def test_what_nothing_runs_beside_shows_whole() -> None:
    """Embedding and head are gathered first and reduced last. Nor does anything follow a pipeline's last action."""
    for part in ("embedding", "head"):
        for zero in (0, 1, 2, 3):
            shown = dp_seconds(zero, part=part, **EVERYTHING_HIDDEN)
            assert shown == dp_seconds(zero, part=part, **NOTHING_HIDDEN) != {}
    pipelined = dp_seconds(0, 2, **EVERYTHING_HIDDEN)["reduce"]
    assert pipelined == pytest.approx(dp_seconds(0, 2, **NOTHING_HIDDEN)["reduce"], rel=1e-12)


def test_in_bf16_weights_travel_in_bf16_and_gradients_in_fp32() -> None:
    fields = {"devices": 2, "hardware": small_hardware(**NOTHING_HIDDEN), "global_batch": 8}
    fast = small_cluster(2, inside=(1e9, 0.0))
    one, two = (
        price(Layout(dp=2, zero=1, dp_shard=2), small_question(cluster=fast, precision=precision, **fields)).block
        for precision in ("fp32", "bf16")
    )
    parameters = small_question().model.block_parameters
    assert one.gather.dp - two.gather.dp == pytest.approx(0.5 * 2 * parameters / 1e9)
    assert one.reduce.dp == pytest.approx(two.reduce.dp)


def test_the_optimizer_works_on_its_shard_and_accumulation_on_all() -> None:
    plain, shard = price(Layout(dp=4)), price(Layout(dp=4, zero=1, dp_shard=4))
    parameters = small_question().model.block_parameters
    assert plain.block.optimizer.total == pytest.approx(10 * 4 * parameters / 1e10)
    assert shard.block.optimizer.total == pytest.approx(plain.block.optimizer.total / 4)
    # One microbatch needs no sum; of M, M - 1 do.
    alone, four = price(Layout(dp=4, micro_batch=2)), price(Layout(dp=4, micro_batch=1))
    assert (alone.microbatches, four.microbatches) == (1, 2)
    question = small_question(devices=1, global_batch=8)
    backward = [
        price(Layout(micro_batch=1), replace(question, job=replace(question.job, global_batch=batch)))
        for batch in (1, 8)
    ]
    assert backward[1].block.backward.total - backward[0].block.backward.total == pytest.approx(
        7 / 8 * 3 * 4 * parameters / 1e10
    )


# ---- the step --------------------------------------------------------------------------------------------


def test_without_a_pipeline_the_step_is_a_sum() -> None:
    costs = price(Layout(micro_batch=2))
    chosen = counts((1, 3))
    work = costs.stage_seconds(0, chosen[0])
    assert costs.microbatches == 4
    assert costs.step(chosen) == pytest.approx(
        4 * (work.forward.total + work.backward.total + 3 * costs.block.recompute.total)
        + work.optimizer.total
        + costs.step_seconds
    )
    assert costs.breakdown(chosen)["recompute"] == pytest.approx(4 * 3 * costs.block.forward.compute)
    assert costs.breakdown(chosen)["bubble"] == pytest.approx(0.0, abs=1e-15)


def test_a_boundary_is_sent_once_a_microbatch() -> None:
    layout = Layout(pp=2, dp=2, micro_batch=2)
    assert price(layout).send_seconds == pytest.approx(1e-5 + 4 * 2 * 16 * 32 / 1e9)


def test_loss_and_gradient_norm_are_summed_over_all_ranks() -> None:
    costs = price(Layout(tp=2, pp=2, dp=2), small_question(devices=8))
    # A ring all-reduce of 8 ranks: 14 steps of latency, and 2 · 7/8 of two float64 numbers over 1 GB/s.
    assert costs.step_seconds == pytest.approx(14 * 1e-5 + 1.75 * 16 / 1e9)


def test_a_tied_matrix_is_summed_over_first_and_last_stage() -> None:
    fields = {"devices": 2, "cluster": small_cluster(2, inside=(1e9, 0.0))}
    tied, untied = (
        price(Layout(pp=2), small_question(tiny_gpt2(tied_embeddings=tie), **fields)).step_seconds
        for tie in (True, False)
    )
    assert tied - untied == pytest.approx(4.0 * 61 * 32 / 1e9)


def test_a_tied_matrix_inside_one_node_does_not_cross_the_network() -> None:
    """dgx-a100 is one node, with a network tier for those who add nodes."""
    question = replace(small_question(tiny_gpt2(layers=8)), cluster=resolve_cluster("dgx-a100"))
    inside = replace(question, cluster=question.cluster.with_devices(8))
    assert [tier.tier for tier in inside.cluster.links] == ["node"]
    assert price(Layout(pp=8), question).step_seconds == pytest.approx(price(Layout(pp=8), inside).step_seconds)


def test_recomputation_costs_a_forward_and_saves_activations() -> None:
    costs = price(Layout(tp=2, pp=2))
    assert costs.block.recompute.compute == costs.block.forward.compute > 0
    assert costs.block.recompute.dp == 0
    steps = [costs.step(counts((2 - x, x), (2, 0))) for x in range(3)]
    assert all(less < more for less, more in pairwise(steps))
    held = [costs.stage_memory(0, StageCount(2 - x, x)).activations for x in range(3)]
    assert all(more > less for more, less in pairwise(held))


def test_a_price_does_not_depend_on_what_was_priced_before() -> None:
    question = small_question(devices=4)
    shared = CostModel(question.model, question.cluster, question.hardware, question.job)
    for layout in all_layouts(question):
        assert shared.price(layout) == price(layout, question)


@pytest.mark.parametrize(
    ("slower", "layout"),
    [
        ({"memory_bandwidth_bytes_per_second": 5e9}, Layout(dp=4)),
        ({"flops": 1e9}, Layout(dp=4)),
        ({"launch_seconds": 1e-3}, Layout(dp=4)),
        ({"overlap_compute_slowdown": 2.0}, Layout(dp=4)),
        ({"overlap_communication_slowdown": 2.0}, Layout(dp=4)),
        ({"corrections": {"gemm": 1.1}}, Layout(dp=4)),
        ({"corrections": {"optimizer": 1.1}}, Layout(dp=4)),
        ({"corrections": {"tp": 1.1}}, Layout(tp=4)),
        ({"corrections": {"dp": 1.1}}, Layout(dp=4)),
        ({"straggler_slowdown": 1.1}, Layout(dp=4)),
        ({"parameter_overhead_seconds": 1e-6}, Layout(dp=4)),
        ({"microbatch_overhead_seconds": 1.0}, Layout(pp=4)),
        ({"shard_overhead_seconds": 1.0}, Layout(tp=4)),
        ({"sequence_shard_overhead_seconds": 1.0}, Layout(tp=4, sequence_parallel=True)),
    ],
)
def test_slower_hardware_is_a_slower_step(slower: dict[str, Any], layout: Layout) -> None:
    chosen = counts(*[(4 // layout.pp, 0)] * layout.pp)
    assert price(layout, **slower).step(chosen) > price(layout).step(chosen)


def test_more_layers_more_tokens_more_seconds() -> None:
    for layout in (Layout(), Layout(pp=2), Layout(pp=2, tp=2)):
        one = price(layout, small_question(devices=layout.world_size))
        split = [(4 // layout.pp, 0)] * layout.pp
        longer = price(layout, small_question(devices=layout.world_size, sequence=32))
        batch = price(layout, small_question(devices=layout.world_size, global_batch=16))
        deep = price(layout, small_question(tiny_llama(layers=8), devices=layout.world_size))
        assert longer.step(counts(*split)) > one.step(counts(*split))
        assert batch.step(counts(*split)) > one.step(counts(*split))
        assert deep.step(counts(*[(2 * n, 0) for n, _ in split])) > one.step(counts(*split))
