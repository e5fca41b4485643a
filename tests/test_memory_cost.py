"""Bytes of one rank: the state table by precision and zero level, activations by hand, and what tp may not lose."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.in_flight import in_flight, input_halves
from planner.job import TrainingJob
from planner.layout import Layout
from planner.memory_bytes import MemoryBytes
from planner.memory_cost import MemoryModel
from profiles.catalogue import list_catalogue, resolve_model
from profiles.model import ModelSpec
from profiles.software import load_software
from tests.oracles.small_world import small_hardware
from tests.plans import tiny_gpt2, tiny_llama


def memory(
    model: ModelSpec | None = None,
    precision: str = "fp32",
    backend: str = "nccl",
    sequence: int = 16,
    software: str = "meshwright",
) -> MemoryModel:
    job = TrainingJob(global_batch=8, sequence=sequence, precision=precision)
    trainer = load_software(software).software
    return MemoryModel(model or tiny_llama(), small_hardware(backend=backend), job, trainer)


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
    ("fp32", 0, 1): (4, 0, 4, 8),
    ("fp32", 1, 1): (1, 4, 4, 2),
    ("fp32", 2, 1): (1, 4, 1, 2),
    ("fp32", 3, 1): (1, 0, 1, 2),
    ("bf16", 0, 1): (4, 2, 4, 8),
    ("bf16", 1, 1): (1, 2, 4, 2),
    ("bf16", 2, 1): (1, 2, 1, 2),
    ("bf16", 3, 1): (1, 0, 1, 2),
    # A pipeline reduces once; of weights that stages free, what backwards leave is among the bytes of activations.
    ("fp32", 0, 2): (4, 0, 4, 8),
    ("fp32", 1, 2): (1, 4, 4, 2),
    ("fp32", 3, 2): (1, 0, 4, 2),
    ("bf16", 1, 2): (1, 2, 4, 2),
    ("bf16", 3, 2): (1, 0, 4, 2),
}
# Embedding and head are FSDP2's root group: gathered from forward to backward also under zero 3.
ROOT_STATE = STATE | {
    ("fp32", 3, 1): (1, 4, 1, 2),
    ("bf16", 3, 1): (1, 2, 1, 2),
    ("fp32", 3, 2): (1, 4, 4, 2),
    ("bf16", 3, 2): (1, 2, 4, 2),
}


@pytest.mark.parametrize(("precision", "zero", "pp"), list(STATE))
def test_state_bytes_per_parameter(precision: str, zero: int, pp: int) -> None:
    model = memory(precision=precision)
    layout = sharded(zero, pp=pp)
    for part, parameters, table in (
        (model.block(layout), parameters_of(model, "block", layout), STATE),
        (model.embedding(layout), model.embedding_parameters(layout), ROOT_STATE),
        (model.head(layout), model.head_parameters(layout), ROOT_STATE),
    ):
        state, per = part.state + part.summed, table[precision, zero, pp]
        assert (state.weights, state.gathered_weights, state.gradients, state.optimizer) == tuple(
            bytes_each * parameters for bytes_each in per
        )
        assert state.total == sum(per) * parameters


def test_one_device_keeps_16_bytes_a_parameter_in_fp32_and_18_in_bf16() -> None:
    for precision, per in (("fp32", 16), ("bf16", 18)):
        model, layout = memory(precision=precision), Layout()
        parts = [part(layout) for part in (model.block, model.embedding, model.head)]
        states = [(part.state + part.summed).total for part in parts]
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
    # Of the gate's backward, when the activation's output is gone.
    assert block.transient == 4 * tokens * 2 * 64
    # The input that recomputation keeps is the one that the first norm keeps.
    assert block.transient_recomputed == block.transient + block.held.total - block.held_recomputed.total


def test_a_gpt2_block_keeps_two_of_the_mlp() -> None:
    block = memory(tiny_gpt2(), "bf16").block(Layout())
    assert block.held.activations == 2 * 16 * (2 * (32 + 32) + 4 * 32 + 2 * 64)
    # Of the last product's backward: the gradients of its input and of its weight.
    assert block.transient == 2 * (16 + 32) * 64


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


def test_selective_recomputation_keeps_products_attention_and_sums() -> None:
    """The layer's input, attention's output, and those of wq, wk, wv, wo, w1, w3, w2; over tp two sums besides.

    Of them the last product's comes back to nobody, so it is there beside all that recomputation brings back.
    """
    tokens = 16
    alone = memory().block(Layout())
    assert alone.held_selective == MemoryBytes(activations=4 * tokens * (32 + 32 + 32 + 2 * 16 + 32 + 2 * 64 + 32))
    whole, kept = alone.held.total, alone.held_selective.total
    assert alone.transient_selective == alone.transient + whole - kept + 4 * tokens * 32
    for sp, outside in ((False, tokens), (True, tokens / 4)):
        cut = memory().block(Layout(tp=4, sequence_parallel=sp))
        inside = 32 / 4 + 32 / 4 + 2 * 8 + 32 + 2 * 64 / 4 + 32  # two key-value heads: each rank has wk and wv whole
        inside += 2 * 8
        assert cut.held_selective.activations == 4 * (tokens * inside + outside * 3 * 32)
        back = cut.held.total - cut.held_selective.total
        assert cut.transient_selective - cut.transient == back + 4 * (tokens + outside) * 32


def test_between_the_halves_of_a_backward_torch_frees_nothing_and_adds_gradients() -> None:
    """Of the outputs of all products and both norms; DualPipeV's passing gradients are not among what is left."""
    tokens, zb1p = 16, Layout(pp=2, schedule="zb1p")
    block = memory().block(zb1p)
    gradients = 4 * tokens * (32 + 2 * 16 + 32 + 2 * 64 + 32 + 2 * 32)
    assert block.held_weight.total == block.held.total + gradients
    assert block.transient == 0  # of gate, up and product, which are among them
    assert memory().block(replace(zb1p, schedule="dualpipev", virtual_stages=2)).transient == 4 * tokens * 3 * 64
    # In 16 bits they wait to be added: a layer's own, and those of the other chunks.
    narrow, parameters = memory(precision="bf16").block(zb1p), parameters_of(memory(), "block", zb1p)
    assert narrow.transient == 2 * parameters
    for chunks, waiting in ((1, 0.0), (2, 1.0), (4, 1.5)):
        several = memory(precision="bf16").block(replace(zb1p, virtual_stages=chunks))
        assert several.state.gradients == waiting * parameters
        assert several.summed.gradients == 4 * parameters
    assert memory(precision="bf16").block(Layout(pp=2, schedule="dualpipev", virtual_stages=2)).state.gradients == 0


def test_torchs_pipeline_has_the_weights_of_three_chunks_gathered() -> None:
    for chunks, share in ((1, 1.0), (3, 1.0), (4, 0.75), (6, 0.5)):
        layout = Layout(pp=2, dp=2, zero=1, dp_shard=2, schedule="interleaved-1f1b", virtual_stages=chunks)
        model = memory(precision="bf16")
        assert model.block(layout).state.gathered_weights == share * 2 * parameters_of(model, "block", layout)
        assert model.head(layout).state.gathered_weights == 2 * model.head_parameters(layout)


# ---- the head --------------------------------------------------------------------------------------------


def test_the_head_in_pieces_tensor_by_tensor() -> None:
    """Everything passes in its forward, but in 16 bits the weight's gradient, which waits for the backward's end."""
    rows, tokens = 31, 16  # 61 over 2
    head = memory(precision="bf16").head(Layout(tp=2))
    norm, of_hidden, of_weight = 2 * tokens * (32 + 32), 2 * tokens * 32, 2 * rows * 32
    # Widened logits beside their log-softmax; or gradients in both widths and the product for the weight.
    most = of_hidden + max(8 * tokens * rows, (4 + 2) * tokens * rows + of_weight)
    assert head.held == head.held_recomputed == MemoryBytes(logits=of_weight)
    assert head.transient == norm + most - of_weight
    alone, of_weight = memory().head(Layout()), 4 * 61 * 32
    assert alone.held == MemoryBytes()
    assert alone.transient == 4 * tokens * (32 + 32 + 32) + max(8 * tokens * 61, 4 * tokens * 61 + of_weight)


def test_in_fp32_the_weights_gradient_waits_where_it_is_the_first_or_the_matrix_is_tied() -> None:
    of_weight = 4 * 61 * 32
    for layout in (Layout(micro_batch=8), sharded(2), sharded(3)):
        assert memory().head(layout).held == MemoryBytes(logits=of_weight)
    for layout in (Layout(), sharded(0), sharded(1), Layout(pp=2)):
        assert memory().head(layout).held == MemoryBytes()
    assert memory(tiny_gpt2()).head(Layout()).held == MemoryBytes(logits=of_weight)
    assert memory(tiny_gpt2()).head(Layout(pp=2)).held == MemoryBytes()


@pytest.mark.parametrize(("precision", "each", "beside"), [("fp32", 4, 0), ("bf16", 2, 2)])
def test_of_several_pieces_one_has_logits_and_the_weights_gradient_is_summed(
    precision: str, each: int, beside: int
) -> None:
    """2,080 tokens in pieces of 1,024: the sum is fp32, and a product in 16 bits stands beside it."""
    tokens, piece, matrix = 2080, 1024 * 61, 61 * 32
    model, layout = memory(precision=precision, sequence=tokens), Layout(pp=2, schedule="dualpipev", virtual_stages=2)
    head = model.head(layout)
    of_hidden, kept = each * tokens * 32, 4 * matrix
    assert head.held == MemoryBytes(activations=each * tokens * 64, logits=of_hidden + kept)
    assert head.transient == max(8 * piece + kept, (4 + beside) * piece + kept + beside * matrix) - kept


def test_where_forwards_come_first_each_microbatch_holds_hidden_states_and_a_number_a_token() -> None:
    gpipe, tokens = Layout(pp=2, schedule="gpipe"), 16  # 8 microbatches
    norm, of_hidden = 4 * tokens * (32 + 32), 4 * tokens * 32
    for layout in (gpipe, replace(gpipe, schedule="looped-bfs", virtual_stages=2)):
        head = memory().head(layout)
        assert 8 * head.held.activations == 7 * norm
        assert 8 * head.held.logits == 7 * 4 * tokens
        # The sum of the weight's gradients is counted with the state: it begins here.
        assert head.transient == norm + 4 * tokens + of_hidden + 4 * tokens * 61


def test_a_split_backward_holds_the_heads_gradients_between_its_halves() -> None:
    tokens, layout = 16, Layout(pp=2, schedule="zb1p")
    head = memory().head(layout)
    norm, of_hidden, of_weight = 4 * tokens * 64, 4 * tokens * 32, 4 * 61 * 32
    assert head.held == MemoryBytes()
    assert head.held_weight == MemoryBytes(activations=norm, logits=of_hidden + of_weight)
    assert head.transient == max(8 * tokens * 61, 4 * tokens * 61 + of_weight) - of_weight


def test_the_last_layers_gathered_buffer_is_there_till_the_forward_ends() -> None:
    """Of every microbatch's forward under zero 3, of the first one's else."""
    for layout, gathers in (
        (sharded(3), True),
        (sharded(1), False),
        (replace(sharded(1), micro_batch=2), True),
        (replace(sharded(0), micro_batch=2), False),
    ):
        model = memory(precision="bf16")
        head, plain = model.head(layout), model.head(replace(layout, dp=1, dp_shard=1, zero=0))
        passing = head.transient - model._root_reduction(layout)
        buffer = 2 * parameters_of(model, "block", layout) if gathers else 0.0
        assert passing == plain.transient + buffer


def test_a_whole_head_holds_its_logits_and_passes_the_rest() -> None:
    """torchtitan's. Before the backward of a layer go norm, log-probabilities, and gradients of their size in fp32."""
    rows, tokens = 31, 16  # 61 over 2
    head = memory(precision="bf16", software="torchtitan-2024").head(Layout(tp=2))
    assert head.held == head.held_recomputed == MemoryBytes(logits=2 * tokens * rows)
    assert head.transient == 2 * tokens * (32 + 32) + (4 + 3 * 4) * tokens * rows
    alone = memory(software="torchtitan-2024").head(Layout())
    assert alone.held == MemoryBytes(logits=4 * tokens * 61)
    assert alone.transient == 4 * tokens * (32 + 32) + (4 + 2 * 4) * tokens * 61


def test_under_gpipe_all_microbatches_but_one_hold_what_a_whole_head_keeps() -> None:
    gpipe, tokens = Layout(pp=2, schedule="gpipe"), 16  # 8 microbatches
    norm, log_probabilities = 4 * tokens * (32 + 32), 4 * tokens * 61
    head = memory(software="torchtitan-2024").head(gpipe)
    assert 8 * head.held.activations == 7 * norm
    assert 8 * head.held.logits == 8 * log_probabilities + 7 * log_probabilities
    assert head.transient == norm + 3 * log_probabilities


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


def test_what_torchs_split_backward_leaves_at_the_boundary() -> None:
    """zb1p on 2 ranks, 8 microbatches: the last rank begins all 8 input's halves by the end of its last forward, each
    of which leaves the gradient of an input; rank 0 has the first stage, whose halves leave none."""
    model, layout = memory(precision="bf16"), Layout(pp=2, schedule="zb1p")
    boundary, passing = model.boundary_bytes(layout), 2 * 16 * 3 * 64
    first, last = (model.fixed(layout, rank, 8) for rank in (0, 1))
    assert first.activations == 2 * boundary  # outputs of the two in flight
    assert first.transient == min(passing, passing + 2 * parameters_of(model, "block", layout) - 2 * 61 * 32)
    assert (last.activations, last.transient) == (8 * boundary, 0.0)


def test_between_two_stages_of_a_rank_the_output_is_the_buffer() -> None:
    """The last rank of a V of two: of its stages 1 and 2 one sends to itself, the other to rank 0."""
    model, layout = memory(precision="bf16"), Layout(pp=2, schedule="dualpipev", virtual_stages=2)
    boundary = model.boundary_bytes(layout)
    fixed = model.fixed(layout, 1, 8)
    assert fixed.pipeline_buffers == 8 * 4 * boundary
    most = max(moment.full[1] - sum(moment.full) for moment in in_flight(layout.pipeline(8))[1])
    left = input_halves(layout.pipeline(8), 1)[0]
    assert fixed.activations == (max(0, most) + left) * boundary


def test_the_allocator_loses_a_share_of_the_tensors_only() -> None:
    used = MemoryBytes(weights=100.0, activations=60.0, communicators=7.0, context=30.0)
    assert used.with_slack(0.05) == replace(used, allocator_slack=0.05 * 160)


def test_bytes_add_up_and_scale_part_by_part() -> None:
    names = list(MemoryBytes().items())
    one = MemoryBytes(*(float(i) for i in range(len(names))))
    assert (one + one * 2).items() == {name: 3.0 * i for i, name in enumerate(names)}
    assert one.total == sum(range(len(names)))
