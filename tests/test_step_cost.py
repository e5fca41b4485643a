"""CostModel: what a step is made of besides its layers, and that more work or slower hardware takes longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.layout import Layout
from planner.space import layout_groups
from planner.step_cost import CostModel
from profiles.catalogue import resolve_cluster
from profiles.points import ContentionPoint
from tests.oracles.brute_force import all_layouts, assignments
from tests.oracles.small_world import counts, price, small_cluster, small_hardware, small_question
from tests.plans import tiny_bert, tiny_gpt2, tiny_llama


def test_a_boundary_is_sent_once_a_microbatch() -> None:
    layout = Layout(pp=2, dp=2, micro_batch=2)
    assert price(layout).hop_seconds == pytest.approx((1e-5 + 4 * 2 * 16 * 32 / 1e9,))


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


def test_what_tp_ranks_have_of_the_heads_transform_is_summed_once_a_step() -> None:
    fields = {"devices": 2, "cluster": small_cluster(2, inside=(1e9, 0.0))}
    plain, transformed = (
        price(Layout(tp=2), small_question(tiny_bert(output_transform=has), **fields)).step_seconds
        for has in (False, True)
    )
    assert transformed - plain == pytest.approx(4.0 * (32 + 1) * 32 / 1e9)  # a ring of two sends it once each way


def test_a_tied_matrix_inside_one_node_does_not_cross_the_network() -> None:
    """dgx-a100 is one node, with a network tier for those who add nodes."""
    question = replace(small_question(tiny_gpt2(layers=8)), cluster=resolve_cluster("dgx-a100"))
    inside = replace(question, cluster=question.cluster.with_devices(8))
    assert [tier.tier for tier in inside.cluster.links] == ["node"]
    assert price(Layout(pp=8), question).step_seconds == pytest.approx(price(Layout(pp=8), inside).step_seconds)


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
        ({"overlap_compute_slowdown": 2.0}, Layout(dp=4, zero=1, dp_shard=4)),
        ({"overlap_communication_slowdown": 2.0}, Layout(dp=4, zero=1, dp_shard=4)),
        ({"corrections": {"gemm": 1.1}}, Layout(dp=4)),
        ({"corrections": {"optimizer": 1.1}}, Layout(dp=4)),
        ({"corrections": {"tp": 1.1}}, Layout(tp=4)),
        ({"corrections": {"dp": 1.1}}, Layout(dp=4)),
        ({"straggler_slowdown": 1.1}, Layout(dp=4)),
        ({"parameter_overhead_seconds": 1e-6}, Layout(dp=4)),
        ({"microbatch_overhead_seconds": 1.0}, Layout(pp=4)),
        ({"shard_overhead_seconds": 1.0}, Layout(tp=4)),
        ({"sequence_shard_overhead_seconds": 1.0}, Layout(tp=4, sequence_parallel=True)),
        ({"operation_overhead_seconds": 1e-6}, Layout(dp=4)),
        ({"split_overhead_seconds": 1e-6}, Layout(pp=4, schedule="zb1p")),
        ({"fsdp_forward_overhead_seconds": 1e-4}, Layout(dp=4, zero=1, dp_shard=4)),
        ({"fsdp_backward_overhead_seconds": 1e-4}, Layout(dp=4, zero=1, dp_shard=4)),
        ({"message_overhead_seconds": 1e-4}, Layout(pp=4)),
        ({"message_overhead_seconds_per_byte": 1e-7}, Layout(pp=4)),
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


def test_a_groups_bound_knows_that_idle_ranks_leave_their_node_to_the_others() -> None:
    """Two stages in a node of two: while one waits, the other has its memory bandwidth, and is faster than measured."""
    contention = (ContentionPoint(active=1, slowdown=1.0), ContentionPoint(active=2, slowdown=3.0))
    hardware = small_hardware(flops=1e8, contention_points=contention)
    question = small_question(devices=2, hardware=hardware, global_batch=2, pins={"pp": 2, "virtual_stages": 1})
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    for group in layout_groups(question.rules):
        for layout in group:
            some = next(assignments([question.model.layers], layout.stages))
            assert prices.least_work(group) <= prices.price(layout).step(some)


def test_the_head_of_a_schedule_is_not_taken_for_that_of_another() -> None:
    """Logits are computed again under gpipe and looped-bfs: one cost model that has priced one must see the other."""
    question = small_question(devices=2)
    shared = CostModel(question.model, question.cluster, question.hardware, question.job)
    layouts = [Layout(pp=2, schedule=schedule) for schedule in ("1f1b", "gpipe", "zb1p", "looped-bfs")]
    backward = [shared.price(layout).head.backward.compute for layout in layouts]
    assert backward[0] == backward[2] < backward[1] == backward[3]
    for group in layout_groups(question.rules):
        for layout in group:
            some = next(assignments([question.model.layers], layout.stages))
            assert shared.least_work(group) <= shared.price(layout).step(some)
