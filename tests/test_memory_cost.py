"""Bytes of one rank: the state table by precision and zero level, activations by hand, and what tp may not lose."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.job import TrainingJob
from planner.layout import Layout
from planner.memory_bytes import MemoryBytes
from planner.memory_cost import MemoryModel
from profiles.catalogue import list_catalogue, resolve_model
from profiles.model import ModelSpec
from tests.oracles.small_world import our_software, small_hardware
from tests.plans import tiny_gpt2, tiny_llama


def memory(
    model: ModelSpec | None = None, precision: str = "fp32", backend: str = "nccl", sequence: int = 16
) -> MemoryModel:
    job = TrainingJob(global_batch=8, sequence=sequence, precision=precision)
    return MemoryModel(model or tiny_llama(), small_hardware(backend=backend), job, our_software())


def parameters_of(model: MemoryModel, part: str, layout: Layout) -> float:
    """Parameters of one rank; a dense layer has none of experts."""
    if part != "block":
        return getattr(model, f"{part}_parameters")(layout)
    dense, of_experts = model.block_parameters(layout)
    assert of_experts == 0.0
    return dense


def sharded(zero: int, dp: int = 4, pp: int = 1) -> Layout:
    return Layout(dp=dp, pp=pp, zero=zero, dp_shard=dp if zero else 1)


# ---- state -----------------------------------------------------------------------------------------------

# Bytes per parameter with dp = 4: (weights, gathered weights, gradients, AdamW moments). Weights and moments are
# fp32 and cut by zero >= 1; the gathered copy, which `replicate` (zero 0) keeps too, is in the compute precision.
# Unsharded gradients of zero 1 go as their shards come, and both are there after the activations.
STATE = {
    ("fp32", 0, 1): (4, 4, 4, 8),
    ("fp32", 1, 1): (1, 4, 4, 2),
    ("fp32", 2, 1): (1, 4, 1, 2),
    ("fp32", 3, 1): (1, 0, 1, 2),
    ("bf16", 0, 1): (4, 2, 4, 8),
    ("bf16", 1, 1): (1, 2, 4, 2),
    ("bf16", 2, 1): (1, 2, 1, 2),
    ("bf16", 3, 1): (1, 0, 1, 2),
    # A pipeline gathers once and reduces once: zero 3 saves nothing over zero 1 there.
    ("fp32", 0, 2): (4, 4, 4, 8),
    ("fp32", 1, 2): (1, 4, 4, 2),
    ("fp32", 3, 2): (1, 4, 4, 2),
    ("bf16", 1, 2): (1, 2, 4, 2),
    ("bf16", 3, 2): (1, 2, 4, 2),
}
# Embedding and head are FSDP2's root group: gathered from forward to backward also under zero 3.
ROOT_STATE = STATE | {("fp32", 3, 1): (1, 4, 1, 2), ("bf16", 3, 1): (1, 2, 1, 2)}


@pytest.mark.parametrize(("precision", "zero", "pp"), list(STATE))
def test_state_bytes_per_parameter(precision: str, zero: int, pp: int) -> None:
    model = memory(precision=precision)
    layout = sharded(zero, pp=pp)
    for part, parameters, table in (
        (model.block(layout), parameters_of(model, "block", layout), STATE),
        (model.embedding(layout), model.embedding_parameters(layout), ROOT_STATE),
        (model.head(layout), model.head_parameters(layout), ROOT_STATE),
    ):
        state, per = part.state, table[precision, zero, pp]
        assert (state.weights, state.gathered_weights, state.gradients, state.optimizer) == tuple(
            bytes_each * parameters for bytes_each in per
        )
        assert state.total == sum(per) * parameters


def test_one_device_keeps_16_bytes_a_parameter_in_fp32_and_18_in_bf16() -> None:
    for precision, per in (("fp32", 16), ("bf16", 18)):
        model, layout = memory(precision=precision), Layout()
        states = [part(layout).state.total for part in (model.block, model.embedding, model.head)]
        parameters = 4 * (states[0] / per) + (states[1] + states[2]) / per
        assert parameters == tiny_llama().parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dp", [2, 4, 64])
def test_a_higher_zero_level_never_holds_more_and_more_ranks_never_do(precision: str, dp: int) -> None:
    model = memory(precision=precision)
    totals = [model.block(sharded(zero, dp)).state.total for zero in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert totals[2] > totals[3]
    for zero in (1, 2, 3):
        assert model.block(sharded(zero, 2 * dp)).state.total < totals[zero]
        for part in ("weights", "optimizer"):
            whole, share = (getattr(model.block(sharded(z, dp)).state, part) for z in (0, zero))
            assert share == pytest.approx(whole / dp)


# ---- parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in list_catalogue("models") if not resolve_model(n).features])
def test_one_rank_alone_holds_every_parameter(name: str) -> None:
    spec = resolve_model(name)
    model, layout = memory(spec), Layout()
    parts = [parameters_of(model, part, layout) for part in ("embedding", "block", "head")]
    assert parts[0] + spec.layers * parts[1] + parts[2] == spec.parameters


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(2, 300),
    st.booleans(),
    st.booleans(),
)
def test_tp_ranks_together_hold_every_parameter(tp: int, kv_heads: int, vocab: int, tied: bool, gpt2: bool) -> None:
    make = tiny_gpt2 if gpt2 else tiny_llama
    spec = make(heads=8, head_dim=4, kv_heads=kv_heads, vocab_size=vocab, tied_embeddings=tied)
    model = memory(spec)
    for part in ("block", "embedding", "head"):
        share = parameters_of(model, part, Layout(tp=tp))
        whole = parameters_of(model, part, Layout())
        assert whole <= tp * share
        assert share <= whole
    # No rank holds less than its share of the matrices, and exactly it where everything divides.
    if not gpt2 and kv_heads >= tp and vocab % tp == 0:
        norms = 2 * spec.norm_parameters
        assert tp * (parameters_of(model, "block", Layout(tp=tp)) - norms) == spec.block_parameters - norms


def test_the_last_stage_holds_a_copy_of_a_tied_matrix() -> None:
    model = memory(tiny_gpt2())
    assert model.head_parameters(Layout()) == 2 * 32
    assert model.head_parameters(Layout(pp=2)) == 61 * 32 + 2 * 32
    assert memory(tiny_llama()).head_parameters(Layout()) == 61 * 32 + 32


# ---- activations -----------------------------------------------------------------------------------------


def test_a_llama_block_tensor_by_tensor() -> None:
    """fp32, 2 x 16 tokens of width 32, 4 heads of 8 over 2 key-value heads, SwiGLU of 64."""
    tokens = 32
    block = memory().block(Layout(micro_batch=2))
    elements = 2 * (32 + 32) + (32 + 32) + (16 + 16) + 4 * 64
    assert block.held == MemoryBytes(activations=4 * tokens * elements)
    assert block.held_recomputed == MemoryBytes(activations=4 * tokens * 32)
    assert block.transient == 4 * tokens * 3 * 64
    # The input that recomputation keeps is the one that the first norm keeps.
    assert block.transient_recomputed == block.transient + block.held.total - block.held_recomputed.total


def test_a_gpt2_block_keeps_two_of_the_mlp() -> None:
    block = memory(tiny_gpt2(), "bf16").block(Layout())
    assert block.held.activations == 2 * 16 * (2 * (32 + 32) + 4 * 32 + 2 * 64)
    assert block.transient == 2 * 16 * 2 * 64


def test_torchs_rms_norm_on_cpu_keeps_its_input_twice() -> None:
    more = memory(backend="gloo").block(Layout()).held.total - memory().block(Layout()).held.total
    assert more == 4 * 16 * 2 * 32
    assert memory(tiny_gpt2(), backend="gloo").block(Layout()) == memory(tiny_gpt2()).block(Layout())


def test_tp_cuts_activations_and_sequence_parallelism_the_rest() -> None:
    tokens = 16
    plain = memory().block(Layout(tp=4))
    assert plain.held.activations == 4 * tokens * (2 * (32 + 32) + (32 + 32) / 4 + 2 * 8 + 4 * 64 / 4)
    assert plain.held_recomputed.activations == 4 * tokens * 32
    cut = memory().block(Layout(tp=4, sequence_parallel=True))
    assert plain.held.activations - cut.held.activations == 4 * tokens * 2 * 32 * 0.75
    assert cut.held_recomputed.activations == 4 * tokens * 32 / 4


def test_the_head_holds_its_logits_and_passes_the_rest() -> None:
    """All else goes before the backward of a layer: norm, log-probabilities, and gradients of their size in fp32."""
    rows, tokens = 31, 16  # 61 over 2
    head = memory(precision="bf16").head(Layout(tp=2))
    assert head.held == head.held_recomputed == MemoryBytes(logits=2 * tokens * rows)
    assert head.transient == 2 * tokens * (32 + 32) + (4 + 3 * 4) * tokens * rows
    alone = memory().head(Layout())
    assert alone.held == MemoryBytes(logits=4 * tokens * 61)
    assert alone.transient == 4 * tokens * (32 + 32) + (4 + 2 * 4) * tokens * 61


def test_under_gpipe_all_microbatches_but_one_hold_what_the_head_keeps() -> None:
    gpipe, tokens = Layout(pp=2, schedule="gpipe"), 16  # 8 microbatches
    norm, log_probabilities = 4 * tokens * (32 + 32), 4 * tokens * 61
    held, passing = memory().head(gpipe).held, memory().head(gpipe).transient
    assert 8 * held.activations == 7 * norm
    assert 8 * held.logits == 8 * log_probabilities + 7 * log_probabilities
    assert passing == norm + 3 * log_probabilities


def test_gradients_that_come_as_activations_go_count_for_what_they_exceed() -> None:
    """One microbatch, or gpipe: M·A before the first backward of a layer, (M-1)·A + G after it."""
    parameters = parameters_of(memory(), "block", Layout())
    for layout, in_flight in ((Layout(micro_batch=8), 1), (Layout(pp=2, schedule="gpipe"), 8)):
        block = memory().block(layout)
        assert block.state.gradients == 0
        for held in (block.held, block.held_recomputed):
            most = (in_flight - 1) * held.activations + max(held.activations, 4 * parameters)
            assert in_flight * held.total == pytest.approx(most)
    assert memory().block(Layout(micro_batch=4)).state.gradients == 4 * parameters
    assert memory().block(Layout(pp=2)).state.gradients == 4 * parameters


def test_what_went_into_the_last_reduction_outlives_it() -> None:
    """zero 2 over 4 ranks, 2 microbatches: of the root group till the head is done, of a layer till the one before."""
    model, layout = memory(), sharded(2)
    root = 4 * (model.embedding_parameters(layout) + model.head_parameters(layout))
    assert model.head(layout).transient - model.head(sharded(1)).transient == root
    block, parameters = model.block(layout), parameters_of(model, "block", layout)
    heads, head_gradient = 4 * 16 * (32 + 32 + 16 + 16), 4 * 61 * 32
    end = heads + 4 * parameters - block.held.activations
    before = max(root, 4 * parameters - block.held.activations)
    assert block.transient == max(4 * 16 * 3 * 64, end) + before + head_gradient


def test_zero_3_gathers_two_blocks_at_a_time() -> None:
    model = memory(precision="bf16")
    more = model.block(sharded(3)).transient - model.block(sharded(2)).transient
    assert more == 2 * 2 * parameters_of(model, "block", sharded(3))
    assert model.block(sharded(3, pp=2)).transient == model.block(sharded(1, pp=2)).transient


@pytest.mark.parametrize("part", ["block", "head"])
def test_more_tokens_never_hold_less(part: str) -> None:
    for less, more in (((1, 16), (2, 16)), ((2, 16), (2, 20)), ((1, 1), (4, 64))):
        a, b = (getattr(memory(sequence=sequence), part)(Layout(micro_batch=batch)) for batch, sequence in (less, more))
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


# ---- the rest --------------------------------------------------------------------------------------------


def test_what_a_stage_holds_whatever_its_layers() -> None:
    model, layout = memory(precision="bf16"), Layout(tp=2, pp=3, dp=2, micro_batch=2)
    boundary = 2 * 2 * 16 * 32
    assert model.boundary_bytes(layout) == boundary
    for stage, directions in ((0, 1), (1, 2), (2, 1)):
        fixed = model.fixed(layout, stage, 5)
        outputs = (3, 0, 0)[stage]  # of those in flight, less inputs that are receive buffers
        assert fixed == MemoryBytes(
            activations=outputs * boundary,
            pipeline_buffers=5 * directions * boundary,
            communicators=3 * 1e3,
            context=1e4,
        )
    assert model.boundary_bytes(replace(layout, sequence_parallel=True)) == boundary / 2
    assert model.fixed(Layout(), 0, 5) == MemoryBytes(context=1e4)
    assert model.fixed(Layout(dp=2), 0, 5) == MemoryBytes(communicators=1e3, context=1e4)


def test_the_allocator_loses_a_share_of_the_tensors_only() -> None:
    used = MemoryBytes(weights=100.0, activations=60.0, communicators=7.0, context=30.0)
    assert used.with_slack(0.05) == replace(used, allocator_slack=0.05 * 160)


def test_bytes_add_up_and_scale_part_by_part() -> None:
    names = list(MemoryBytes().items())
    one = MemoryBytes(*(float(i) for i in range(len(names))))
    assert (one + one * 2).items() == {name: 3.0 * i for i, name in enumerate(names)}
    assert one.total == sum(range(len(names)))
