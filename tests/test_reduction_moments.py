"""Bytes of a pipeline rank when a chunk has turned and while its gradients are reduced."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest

from planner import reduction_moments
from planner.gradient_moments import _done_of_list, _phases_of_list, reducing_by_torch
from planner.in_flight import NO_GRADIENTS, REDUCED, REDUCING, ROOT, SUMMED
from planner.layout import MESSAGE_BYTES, Layout
from planner.layout_costs import Blocks, LayoutCosts, StageCount
from planner.schedule import Action, Pipeline
from planner.step_cost import CostModel
from tests.oracles.small_world import small_hardware, small_question
from tests.plans import tiny_llama


def costs_of(layout: Layout, *, microbatches: int = 1, sequence: int = 16, precision: str = "bf16") -> LayoutCosts:
    batch = microbatches * layout.micro_batch * layout.dp
    question = small_question(
        tiny_llama(layers=4),
        devices=layout.world_size,
        hardware=small_hardware(allocator_slack=0.0),
        global_batch=batch,
        sequence=sequence,
        precision=precision,
    )
    return CostModel(question.model, question.cluster, question.hardware, question.job).price(layout)


def even(costs: LayoutCosts, mode: str) -> list[StageCount]:
    return [(Blocks(**{mode: costs.layers // costs.layout.stages}),)] * costs.layout.stages


@pytest.mark.parametrize(("zero", "copies"), [(0, 2), (1, 1)])
def test_a_layers_reduction_comes_on_top_of_all_sums(zero: int, copies: int) -> None:
    """One token a sequence: an inner rank is fullest then. Its layer's gathered weights are gone, and where no other
    rank has a shard a third copy is there, divided."""
    costs = costs_of(Layout(pp=4, dp=2, zero=zero, dp_shard=1 + (zero > 0), schedule="gpipe"), sequence=1)
    peak, (segment,) = costs.rank_memory(1, even(costs, "none")), costs.segments
    layer, gathered = segment.memory, segment.memory.state.gathered_weights
    parameters = gathered / 2
    assert peak.gradients == layer.summed.total == 4 * parameters
    assert peak.transient == copies * 4 * parameters - gathered
    assert peak.activations == 0.0
    assert costs.rank_bytes(1, even(costs, "none")) == pytest.approx(peak.total)


def test_the_first_message_has_all_gradients_of_a_small_rank() -> None:
    """fp32 and zero 0: the sum is ours, after the schedule, with the embedding's gradients in the same message."""
    costs = costs_of(Layout(pp=2, dp=2, schedule="gpipe"), sequence=1, precision="fp32")
    peak = costs.rank_memory(0, even(costs, "none"))
    sums = 2 * costs.segments[0].memory.summed.total + costs.embedding_memory.summed.total
    assert peak.gradients + peak.transient == pytest.approx(2 * sums)
    assert 2 * sums < MESSAGE_BYTES


def test_what_turns_last_passes_before_its_gradients_are_there() -> None:
    """gpipe: its first layer has its own activations, recomputed or not, where it will have gradients."""
    for sequence, modes in ((16, ("none", "full")), (1, ("full",))):
        costs = costs_of(Layout(pp=4, schedule="gpipe"), microbatches=4, sequence=sequence, precision="fp32")
        (segment,) = costs.segments
        layer, (first, turned, summed) = segment.memory, costs.in_flight[1]
        whole = layer.held.total + layer.transient
        assert layer.passing_turned == max(0.0, whole - layer.summed.total)
        assert (layer.passing_turned == 0.0) == (sequence == 1)
        for mode in modes:
            begin, end, again, *_ = costs.moment_bytes(1, even(costs, mode))
            assert again - end == pytest.approx(layer.transient_by(mode) - layer.passing_turned)
            held = layer.held_by(mode).total
            assert (first.full, turned.full, summed.full) == ((4,), (3,), (3,))
            assert end - begin == pytest.approx(
                layer.summed.total + layer.passing_turned - held - layer.transient_by(mode)
            )


@pytest.mark.parametrize("stage", [0, 1])
def test_the_first_stage_has_no_inputs_half_in_either_count(stage: int) -> None:
    """I W of chunk 0 around B of chunk 1, as no list of ours has it: what the first stage held stays until its W."""
    parts = [(stage, "F"), (3, "F"), (stage, "I"), (3, "B"), (stage, "W")]
    actions = [(Action(own, kind, 0), int(own == 3)) for own, kind in parts]
    with patch("planner.gradient_moments.parts_of", lambda *_: actions):
        pipeline = Pipeline("zb1p", 2, 2, 1)
        done = _done_of_list(pipeline, stage)
        during = _phases_of_list.__wrapped__(pipeline, stage)
    assert (done[0].full, done[0].weight_only) == (((1, 0), (0, 0)) if stage == 0 else ((0, 0), (1, 0)))
    assert (done[0].full, done[0].weight_only) in [(one.full, one.weight_only) for one in during]


def test_chunks_are_reduced_one_after_the_other() -> None:
    """Of two chunks the second is done first, with microbatches of the first still in flight."""
    two = Layout(pp=2, schedule="interleaved-1f1b", virtual_stages=2)
    later, _, last, _ = reducing_by_torch(two.pipeline(8))[0]
    assert later.gradients == (SUMMED, ROOT)
    assert later.full[0] > 0 == later.full[1]
    assert (last.full, last.gradients) == ((0, 0), (ROOT, REDUCED))
    later, _, last, _ = reducing_by_torch(replace(two, schedule="looped-bfs").pipeline(8))[0]
    assert (later.full, later.gradients) == ((8, 0), (NO_GRADIENTS, ROOT))
    assert (last.full, last.gradients) == ((0, 0), (ROOT, REDUCED))
    assert [one.gradients for one in reducing_by_torch(Layout(pp=2).pipeline(8))[1]] == [(ROOT,), (REDUCING,)]


LAYOUTS = [
    Layout(pp=2, schedule="gpipe"),
    Layout(pp=4, dp=2, zero=1, dp_shard=2),
    Layout(pp=2, dp=2, zero=3, dp_shard=2),
    Layout(pp=2, schedule="zb1p"),
    Layout(pp=2, dp=2, zero=2, dp_shard=2, schedule="interleaved-1f1b", virtual_stages=2),
    Layout(pp=2, dp=2, zero=3, dp_shard=2, schedule="looped-bfs", virtual_stages=2),
    Layout(pp=2, schedule="zbv", virtual_stages=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.short)
def test_moments_left_out_are_never_the_fullest(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    left_out = 0
    for microbatches, sequence in product((2, 4), (1, 4, 64)):
        of_all = {}
        for keep_all in (False, True):
            with monkeypatch.context() as patch:
                if keep_all:
                    patch.setattr(reduction_moments, "_may_be_fuller", lambda *_: True)
                of_all[keep_all] = costs_of(layout, microbatches=microbatches, sequence=sequence)
                assert len(of_all[keep_all].reductions) == layout.pp  # found now
        some, every = of_all[False], of_all[True]
        left_out += sum(map(len, every.reductions)) - sum(map(len, some.reductions))
        for mode, rank in product(("none", "selective", "full"), range(layout.pp)):
            counts = even(some, mode)
            assert some.rank_bytes(rank, counts) == pytest.approx(every.rank_bytes(rank, counts), rel=1e-12)
    assert left_out > 0


def test_what_passes_is_that_of_the_layers_that_recompute_least() -> None:
    """1F1B: where the last layer keeps all, that is gone when it is the turn of one that recomputes."""
    costs = costs_of(Layout(pp=2), microbatches=4, sequence=512)
    (segment,), layers = costs.segments, costs.layers // 2
    none, full = segment.memory.transient, segment.memory.transient_recomputed
    assert full == none + segment.memory.held.total - segment.memory.held_recomputed.total
    ends = costs.end_parts(1)
    for blocks, least in ((Blocks(none=1, full=layers - 1), none), (Blocks(full=layers), full)):
        peak = costs.rank_memory(1, [(blocks,)] * 2)
        assert peak.transient == max(least, *(end.transient for _, end, _, _ in ends))
    chunks = costs_of(Layout(pp=2, schedule="interleaved-1f1b", virtual_stages=2), microbatches=4)
    assert not chunks.last_recompute_least
