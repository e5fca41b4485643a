"""Bytes of gradients: when they come, in which precision, and what their reduction holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.gradient_moments import gradients_by_torch, least_phases
from planner.in_flight import (
    AHEAD,
    FIRST,
    FIRST_AHEAD,
    NO_GRADIENTS,
    REDUCED,
    SUMMED,
    TURNED,
)
from planner.layout import RECOMPUTE_MODES, Layout
from profiles.model import ModelSpec
from tests.plans import tiny_gpt2, tiny_llama
from tests.test_memory_cost import memory, parameters_of, sharded


def test_a_first_backward_begins_without_gradients_and_ends_without_its_activations() -> None:
    """One microbatch, or gpipe: M·A before it, (M-1)·A + G after it, whichever blocks recompute."""
    parameters = parameters_of(memory(), "block", Layout())
    for layout, number in ((Layout(micro_batch=8), 1), (Layout(pp=2, schedule="gpipe"), 8)):
        moments = gradients_by_torch(layout.pipeline(number))[0]
        second = (((number - 1,), (0,), (SUMMED,)),) if number > 1 else ()
        assert moments == (((number,), (0,), (FIRST,)), ((number - 1,), (0,), (TURNED,)), *second)
        block, head = memory().block(layout), memory().head(layout)
        assert block.state.gradients == block.gradients_by(FIRST, "none").total == 0
        assert {block.gradients_by(TURNED, mode).total for mode in RECOMPUTE_MODES} == {4 * parameters}
        assert (head.gradients_by(FIRST, "none").total > 0) == (layout.pp > 1)
    for layout in (Layout(micro_batch=4), Layout(pp=2)):
        assert memory().block(layout).gradients_by(SUMMED, "none").gradients == 4 * parameters


def test_of_looped_bfs_one_chunk_at_a_time_has_all_its_gradients() -> None:
    """zero 3: four chunks turn one after the other; the first, evicted meanwhile, is gathered ahead of its turn."""
    layout = replace(sharded(3, pp=2), schedule="looped-bfs", virtual_stages=4)
    moments = gradients_by_torch(layout.pipeline(8))[1]
    begun = [moment for moment in moments if SUMMED in moment.gradients]
    assert [moment.full for moment in begun] == [(8, 8, 8, 7), (8, 8, 7, 0), (8, 7, 0, 0), (7, 0, 0, 0)]
    assert [(moment.full, moment.gradients) for moment in moments if moment not in begun] == [
        ((8, 8, 8, 8), (NO_GRADIENTS, NO_GRADIENTS, NO_GRADIENTS, FIRST)),
        ((8, 8, 8, 7), (NO_GRADIENTS, NO_GRADIENTS, NO_GRADIENTS, TURNED)),
        ((8, 8, 8, 0), (AHEAD, NO_GRADIENTS, FIRST, REDUCED)),
        ((8, 8, 7, 0), (AHEAD, NO_GRADIENTS, TURNED, REDUCED)),
        ((8, 8, 0, 0), (AHEAD, FIRST, REDUCED, REDUCED)),
        ((8, 7, 0, 0), (AHEAD, TURNED, REDUCED, REDUCED)),
        ((8, 0, 0, 0), (FIRST_AHEAD, REDUCED, REDUCED, REDUCED)),
        ((7, 0, 0, 0), (TURNED, REDUCED, REDUCED, REDUCED)),
    ]
    model = memory(precision="bf16")
    block, parameters = model.block(layout), parameters_of(model, "block", layout)
    assert block.gradients_by(NO_GRADIENTS, "none").total == block.state.gathered_weights == 0
    assert block.gradients_by(AHEAD, "none").gathered_weights == 2 * parameters
    assert block.gradients_by(FIRST_AHEAD, "full").gathered_weights == 2 * parameters
    assert block.gradients_by(TURNED, "full").total == (4 + 2) * parameters
    assert block.gradients_by(REDUCED, "none").total == parameters


def test_the_first_rank_of_1f1b_with_as_many_microbatches_as_ranks_sums_nothing() -> None:
    """All its forwards come before its first backward; a microbatch more and the first sums are there with it full."""
    for count, phases in ((4, (NO_GRADIENTS, SUMMED, SUMMED, SUMMED)), (5, (SUMMED,) * 4)):
        assert least_phases(gradients_by_torch(Layout(pp=4).pipeline(count))) == phases
    assert least_phases(gradients_by_torch(Layout().pipeline(1))) == (NO_GRADIENTS,)
    phases = [moment.gradients for moment in gradients_by_torch(Layout(pp=4).pipeline(4))[0]]
    assert phases == [(FIRST,), (TURNED,), (SUMMED,)]


def test_chunks_of_one_microbatch_have_their_gradients_one_after_the_other() -> None:
    """interleaved-1f1b runs one round of it: no moment at which two chunks have unreduced gradients."""
    for moment in gradients_by_torch(Layout(pp=2, schedule="interleaved-1f1b", virtual_stages=4).pipeline(1))[1]:
        turning = [phase in (FIRST, TURNED, SUMMED) for phase in moment.gradients]
        assert sum(turning) == 1
        chunk = turning.index(True)
        assert moment.full[:chunk] == (1,) * chunk
        assert moment.gradients[chunk + 1 :] == (REDUCED,) * (3 - chunk)


def test_what_went_into_the_last_reduction_outlives_it() -> None:
    """zero 2 over 4 ranks, 2 microbatches: of the root group till the head is done, of a layer till the one before."""
    model, layout = memory(), sharded(2)
    root = 4 * (model.embedding_parameters(layout) + model.head_parameters(layout))
    # The weight's gradient of each microbatch waits for its reduction.
    head, summed = model.head(layout), model.head(sharded(1))
    assert head.transient + head.held.total - summed.transient == root
    block, parameters = model.block(layout), parameters_of(model, "block", layout)
    heads = 4 * 16 * (32 + 32 + 16 + 16)
    end = heads + 4 * parameters - block.held.activations
    before = max(root, 4 * parameters - block.held.activations)
    assert block.transient == max(4 * 16 * 3 * 64, end) + before


def test_zero_3_gathers_two_blocks_at_a_time() -> None:
    model = memory(precision="bf16")
    more = model.block(sharded(3)).transient - model.block(sharded(2)).transient
    assert more == 2 * 2 * parameters_of(model, "block", sharded(3))
    piped, zero1 = sharded(3, pp=2), model.block(sharded(1, pp=2))
    assert model.block(piped, reshard=False) == zero1
    assert model.block(piped, reshard=True).transient == zero1.transient + more
    # Under interleaved-1f1b stages have no choice, and torch's pipeline has all weights there.
    free, kept = (replace(sharded(zero, pp=2), schedule="interleaved-1f1b", virtual_stages=2) for zero in (3, 1))
    assert model.block(free) == model.block(kept)


def test_weights_that_a_backward_leaves_take_the_place_of_activations() -> None:
    piped = sharded(3, pp=2)
    for sequence in (1, 64):  # weights are more than a microbatch's activations, or less
        model = memory(precision="bf16", sequence=sequence)
        weights, block = 2 * parameters_of(model, "block", piped), model.block(piped)
        for mode in ("none", "selective", "full"):
            held = block.held_by(mode).total
            assert block.left_by(mode) == max(0.0, weights - held)
            assert model.block(piped, reshard=True).left_by(mode) == 0.0
        assert (block.left > 0) == (sequence == 1)


@pytest.mark.parametrize(("part", "axes"), [("block", {}), ("head", {"pp": 2, "schedule": "gpipe"})])
def test_more_tokens_never_hold_less(part: str, axes: dict[str, Any]) -> None:
    for less, more in (((1, 16), (2, 16)), ((2, 16), (2, 20)), ((1, 1), (4, 64))):
        a, b = (
            getattr(memory(sequence=sequence), part)(Layout(micro_batch=batch, **axes))
            for batch, sequence in (less, more)
        )
        assert a.held.total < b.held.total
        assert a.transient < b.transient
        assert a.held_recomputed.total < b.held_recomputed.total
        assert a.state == b.state


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True), sharded(3)])
@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_recomputing_holds_less_and_needs_more_at_once(layout: Layout, model: ModelSpec) -> None:
    block = memory(model).block(layout)
    assert block.held_recomputed.total < block.held.total
    assert block.transient_recomputed >= block.transient
