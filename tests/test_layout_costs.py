"""LayoutCosts: linear in the assignment, and parts that sum to the step and to the bytes of a rank."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.in_flight import InFlight
from planner.layout import Layout
from planner.layout_costs import Blocks
from planner.memory_bytes import MemoryBytes
from planner.part_seconds import PHASES, PartSeconds, Seconds, least_of
from planner.plan import TIME_PARTS
from tests.oracles.brute_force import all_layouts, assignments
from tests.oracles.small_world import block_of, counts, price
from tests.property.worlds import questions


def test_seconds_and_parts_add_up_and_scale() -> None:
    assert Seconds(1, 2, 3) + Seconds(10, 20, 30) * 2 == Seconds(21, 42, 63)
    assert Seconds(1, 2, 3).total == 6
    assert Seconds(1, 2, 3, 4, 5) + Seconds(10, 20, 30, 40, 50) == Seconds(11, 22, 33, 44, 55)
    one = PartSeconds(*(Seconds(i, 1, 0) for i in range(8)))
    assert one + one == one * 2
    assert [getattr(one * 3, phase).compute for phase in PHASES] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert one.backward == Seconds(3, 2, 0)
    assert [one.recompute(mode).compute for mode in ("none", "selective", "full")] == [0, 3, 4]


def test_the_least_of_parts_is_no_longer_than_any_however_often() -> None:
    """The second as where FSDP2's own work around a backward is more than what gathering again adds to it."""
    kept = PartSeconds(forward=Seconds(3.0, dp=0.5), backward_input=Seconds(4.0, dp=2.0), gather=Seconds(dp=1.0))
    freed = PartSeconds(forward=Seconds(3.0, dp=1.0), backward_input=Seconds(4.0, dp=0.25))
    for options in ((kept, freed), (freed, kept)):
        least = least_of(options)
        assert (least.forward.total, least.gather.total, least.backward.total) == (3.5, 0.5, 4.25)
        for one, often in product(options, (1, 2, 9)):
            assert least.gather.total + often * least.forward.total <= one.gather.total + often * one.forward.total
    assert least_of([kept]) == kept


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_priced_assignment_decomposes(data: st.DataObject) -> None:
    question = data.draw(questions())
    if not (layouts := all_layouts(question)):
        return
    layout = data.draw(st.sampled_from(layouts))
    costs = price(layout, question)
    chosen = data.draw(st.sampled_from(list(assignments([costs.layers], layout.stages))))
    breakdown = costs.breakdown(chosen)
    assert tuple(breakdown) == TIME_PARTS
    assert sum(breakdown.values()) == pytest.approx(costs.step(chosen), rel=1e-12)
    assert min(breakdown.values()) >= 0
    # A step is no shorter than any rank's own work, and memory adds up.
    for stage, count in enumerate(chosen):
        work = costs.stage_seconds(stage, count)
        own = costs.microbatches * (work.forward + work.backward + work.recompute_full).total
        own += (work.gather + work.reduce + work.optimizer).total + costs.step_seconds
        assert own <= costs.step(chosen) * (1 + 1e-12)
        bytes_used = costs.memory(chosen)[costs.pipeline.rank_of(stage)]
        assert bytes_used.total == pytest.approx(sum(bytes_used.items().values()))
        assert min(bytes_used.items().values()) >= 0
        tensors = bytes_used.total - bytes_used.context - bytes_used.communicators - bytes_used.allocator_slack
        assert bytes_used.allocator_slack == pytest.approx(costs.allocator_slack * tensors)


def test_a_stage_is_linear_in_its_blocks() -> None:
    costs = price(Layout(pp=2, dp=2, zero=1, dp_shard=2))
    for stage in (0, 1):
        empty = costs.stage_seconds(stage, (Blocks(),))
        for blocks in (Blocks(1), Blocks(full=1), Blocks(selective=1), Blocks(2, 1, 3)):
            cost = costs.stage_seconds(stage, (blocks,))
            each = block_of(costs)
            again = blocks.selective * each.recompute_selective.total + blocks.full * each.recompute_full.total
            assert cost.recompute_full.total == pytest.approx(again)
            for phase in set(PHASES) - {"recompute_selective", "recompute_full"}:
                added = blocks.total * getattr(each, phase).total
                assert getattr(cost, phase).total == pytest.approx(getattr(empty, phase).total + added)
    # The embedding sits on the first stage and the head on the last.
    ends = [costs.ends_seconds(s) for s in (0, 1)]
    assert ends[0] == costs.microbatch + costs.embedding
    assert ends[1] == costs.microbatch + costs.head
    assert costs.ends_seconds(0) != costs.ends_seconds(1)


def test_a_stages_memory_item_by_item() -> None:
    costs = price(Layout(pp=2))  # 8 microbatches; the first stage holds two in flight
    block, embedding = costs.segments[0].memory, costs.embedding_memory
    assert costs.in_flight == ((InFlight((2,), (0,)),), (InFlight((1,), (0,)),))

    def used_by(stage: int, none: int, full: int) -> MemoryBytes:
        held = [(Blocks(),), (Blocks(),)]
        held[stage] = (Blocks(none=none, full=full),)
        return costs.rank_memory(stage, held)

    used = used_by(0, 2, 1)
    assert used.weights == 3 * block.state.weights + embedding.state.weights
    assert used.optimizer == 3 * block.state.optimizer + embedding.state.optimizer
    outputs = 16 * 32 * 4  # of the stage, a microbatch
    assert used.activations == 2 * (2 * block.held.activations + block.held_recomputed.activations + outputs)
    assert used.transient == block.transient
    assert used_by(0, 3, 0).transient == block.transient
    assert used_by(0, 0, 0).transient == embedding.transient == 4 * 61 * 32
    last = used_by(1, 1, 0)
    assert last.logits == costs.head_memory.held.logits
    assert last.transient == max(block.transient, costs.head_memory.transient)
    assert last.pipeline_buffers == used.pipeline_buffers == 8 * 16 * 32 * 4


def test_without_a_pipeline_the_step_is_a_sum() -> None:
    costs = price(Layout(micro_batch=2))
    chosen = counts((1, 3))
    work = costs.stage_seconds(0, chosen[0])
    assert costs.microbatches == 4
    assert costs.step(chosen) == pytest.approx(
        4 * (work.forward.total + work.backward.total + 3 * block_of(costs).recompute_full.total)
        + work.optimizer.total
        + costs.step_seconds
    )
    assert costs.breakdown(chosen)["recompute"] == pytest.approx(4 * 3 * block_of(costs).forward.compute)
    assert costs.breakdown(chosen)["bubble"] == pytest.approx(0.0, abs=1e-15)


def test_recomputation_costs_a_forward_and_saves_activations() -> None:
    costs = price(Layout(tp=2, pp=2))
    assert block_of(costs).recompute_full.compute == block_of(costs).forward.compute > 0
    assert block_of(costs).recompute_full.dp == 0
    steps = [costs.step(counts((2 - x, x), (2, 0))) for x in range(3)]
    assert all(less < more for less, more in pairwise(steps))
    held = [costs.rank_memory(0, counts((2 - x, x), (2, 0))).activations for x in range(3)]
    assert all(more > less for more, less in pairwise(held))
