"""What passes at the moments of a layer's backward, and what gradients and weights a chunk has in each phase."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.backward_moments import KeptOfLayer, backward_moments
from planner.in_flight import FIRST, LEAST, NO_GRADIENTS, REDUCED, SUMMED, TURNED
from planner.layout import Layout
from tests.plans import tiny_gpt2, tiny_llama
from tests.test_memory_cost import memory, parameters_of, sharded

KEPT = KeptOfLayer(whole=5000.0, feed_forward=2000.0, norm=500.0, heads=700.0, activation=5000.0)
GPT2 = tiny_gpt2()  # hidden 32, feed-forward 64


def test_a_layer_gives_up_what_it_kept_as_its_backward_goes_on() -> None:
    product, activation, norm, attention, last = backward_moments(GPT2, Layout(), 16, 16, 2, KEPT, wide=False)
    assert product == (2 * (16 * 64 + 32 * 64), 0.0, 0.0)
    assert activation == (5000.0, 2 * 16 * 64, 32 * 64)
    assert norm == (0.0, 2000.0, 2 * 32 * 64)
    assert attention == (700.0, 2500.0, 2 * 32 * 64)
    assert last == (0.0, 4500.0, 2 * 32 * 64 + 4 * 32 * 32)
    wide = backward_moments(GPT2, Layout(), 16, 16, 2, KEPT, wide=True)
    assert [one.passing for one in wide[2::2]] == [5 * 4 * 16 * 32] * 2


def test_sequence_parallelism_gathers_the_gradient_of_the_last_product() -> None:
    plain, gathers = (
        backward_moments(GPT2, Layout(tp=2, sequence_parallel=parallel), 16, 8, 2, KEPT, wide=False)[0].passing
        for parallel in (False, True)
    )
    assert gathers - plain == 2 * 16 * 32


def test_nothing_goes_in_an_inputs_half() -> None:
    moments = backward_moments(GPT2, Layout(pp=2, schedule="zb1p"), 16, 16, 2, KEPT, wide=True)
    assert [(one.gone, one.weights) for one in moments] == [(0.0, 0.0)] * 3


def test_a_ring_passes_keys_values_and_their_gradients() -> None:
    two, four = (
        backward_moments(GPT2, Layout(cp=cp, cp_style="ring"), 16, 16, 2, KEPT, wide=False)[3].passing for cp in (2, 4)
    )
    assert two == 16 * (2 * (5 * 2 * 32 + 32 / 2) + 4 * 32)
    assert four - two == 16 * 2 * 2 * 32


@pytest.mark.parametrize(("chunks", "gone"), [(2, 2.0), (4, 0.0)])
def test_a_reduced_chunk_has_no_gathered_weights(chunks: int, gone: float) -> None:
    """Of more than three others are gathered in its place."""
    layout = replace(sharded(1, pp=2), schedule="interleaved-1f1b", virtual_stages=chunks)
    block = memory(tiny_llama(layers=8), "bf16").block(layout)
    parameters = block.summed.total / 4
    assert block.gradients_by(REDUCED, "none").total == (4 / layout.shards - gone) * parameters
    assert block.gradients_by(LEAST, "none").total == min(0.0, (4 / layout.shards - gone) * parameters)


def test_what_split_backwards_leave_is_not_there_before_the_first() -> None:
    layout = Layout(pp=2, schedule="zb1p", virtual_stages=2)
    model = memory(precision="bf16")
    block, narrow = model.block(layout), parameters_of(model, "block", layout)
    assert block.state.gradients == narrow  # of two chunks one has them in 16 bits
    for phase in (NO_GRADIENTS, FIRST):
        assert block.gradients_by(phase, "none").gradients == -narrow
    assert block.gradients_by(SUMMED, "none").gradients == 4 * narrow


@pytest.mark.parametrize(("precision", "first", "turned"), [("bf16", 0, 2), ("fp32", 4, 4)])
def test_a_heads_gradients_of_16_bits_are_widened_last(precision: str, first: int, turned: int) -> None:
    layout = replace(sharded(1, pp=2), schedule="gpipe")
    model = memory(precision=precision)
    head, parameters = model.head(layout), model.head_parameters(layout)
    assert head.gradients_by(FIRST, "none").total == pytest.approx(first * parameters, abs=4 * 32)
    assert head.gradients_by(TURNED, "none").total == turned * parameters
    assert head.passing_turned == (4 - turned) * parameters


def test_a_layer_alone_on_its_stage_is_gathered_once() -> None:
    """zero 3: of two layers the one before is gathered ahead of its backward."""
    layout = replace(sharded(3, pp=2), schedule="gpipe")
    two, alone = (memory(tiny_llama(layers=layers), sequence=64).block(layout, reshard=True) for layers in (4, 2))
    parameters = two.summed.total / 4
    passing = two.transient - 2 * 4 * parameters
    output = 4 * 64 * 32  # of the last product, in its forward
    assert alone.transient == 4 * parameters + max(passing, 4 * parameters + output)


def test_what_a_layer_recomputes_is_gone_in_its_forward_and_left_weights_are_gathered_no_more() -> None:
    """Alone on its stage under zero 3, one token a sequence."""
    layout = replace(sharded(3, pp=2), schedule="gpipe")
    model = memory(tiny_llama(layers=2), sequence=1)
    freed, left = (model.block(layout, reshard=reshard) for reshard in (True, None))
    weights, output, last_input = freed.summed.total, 4 * 32, 4 * 64
    assert freed.transient == 2 * weights + output
    assert freed.transient_recomputed == 2 * weights + last_input + output
    assert left.transient_first["full"] == freed.transient_recomputed > left.transient_recomputed
    whole = model.block(replace(layout, schedule="looped-bfs"))
    assert whole.transient_first["full"] < freed.transient_recomputed
