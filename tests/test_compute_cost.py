"""Seconds of compute: each part's kernels by shape, what tp takes away, and that parts add up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from planner.compute_cost import ComputeCost, ComputeModel, ComputeSeconds
from planner.job import TrainingJob
from planner.layout import Layout
from planner.local_shapes import local_kv_width, local_linear_shape
from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.points import MemoryPoint, ShardPoint
from profiles.software import load_software
from tests.oracles.small_world import our_software, small_hardware
from tests.plans import tiny_bert, tiny_gpt2, tiny_llama, tiny_megatron_bert

HARDWARE = small_hardware(units=1, launch_seconds=0.0)


def compute_model(model: ModelSpec, hardware: HardwareProfile, precision: str, sequence: int = 16) -> ComputeModel:
    job = TrainingJob(global_batch=8, sequence=sequence, precision=precision)
    return ComputeModel(model, hardware, job, our_software())


def price(model: ModelSpec, layout: Layout, sequence: int = 16, **changes: Any) -> dict[str, Any]:
    hardware = small_hardware(units=1, **({"launch_seconds": 0.0} | changes))
    compute = compute_model(model, hardware, "fp32", sequence)
    return {"block": compute.block(layout), "embedding": compute.embedding(layout), "head": compute.head(layout)}


def test_passes_add_up_part_by_part() -> None:
    total = ComputeSeconds(1, 2, 3, 4) + ComputeSeconds(10, 20, 30, 40)
    assert total == ComputeSeconds(11, 22, 33, 44)
    assert total.total == 110


def test_a_block_kernel_by_kernel() -> None:
    """A Llama block of width 32, grouped queries 4 to 2, SwiGLU 64, 2 x 16 tokens, counted by hand."""
    block = price(tiny_llama(), Layout(micro_batch=2))["block"]
    tokens, seconds = 32, HARDWARE.gemm_seconds
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    assert block.forward.gemm == pytest.approx(sum(seconds("forward", "fp32", tokens, n, k) for n, k in shapes))
    assert block.backward.gemm == pytest.approx(
        sum(
            seconds("input_grad", "fp32", tokens, k, n) + seconds("weight_grad", "fp32", n, k, tokens)
            for n, k in shapes
        )
    )
    assert block.forward.attention == pytest.approx(2.0 * 2 * 4 * 16**2 * 8 / (1e11 / 2))
    assert block.backward.attention == pytest.approx(5.0 * 2 * 4 * 16**2 * 8 / (1e11 / 3))
    # Bytes: two norms, RoPE on q and k, the head transpose, SwiGLU, two residual sums; see EAGER_PASSES.
    elements = 2 * 2 * 32 + 8 * (32 + 16) + 2 * 32 + 5 * 64 + 2 * 3 * 32
    assert block.forward.memory == pytest.approx(tokens * elements * 4 / 1e10)
    backward = 2 * 3 * 32 + 8 * (32 + 16) + 2 * 32 + 9 * 64 + 2 * 3 * 32
    backward += 3 * 3 * 32  # the gradients that wq, wk and wv leave of their input add up, and those of w1 and w3
    assert block.backward.memory == pytest.approx(tokens * backward * 4 / 1e10)
    assert (block.forward.overhead, block.backward.overhead) == (0.0, 0.0)


def test_embedding_and_head_of_gpt2() -> None:
    parts = price(tiny_gpt2(), Layout())
    tokens = 16
    # The lookup and the sum with the learned positions.
    assert parts["embedding"].forward.memory == pytest.approx(tokens * 32 * (2 + 3) * 4 / 1e10)
    assert parts["embedding"].forward.gemm == 0.0
    # All of the loss is in the forward: three products, and cross-entropy there and back.
    head, gemm = parts["head"], head_gemm(tokens)
    assert head.forward.gemm == pytest.approx(sum(gemm.values()))
    assert head.backward.gemm == 0.0
    assert head.forward.memory == pytest.approx(tokens * (2 * 32 + (7 + 11) * 61) * 4 / 1e10)
    assert head.backward.memory == pytest.approx(tokens * 3 * 32 * 4 / 1e10)


def test_embedding_and_head_of_bert() -> None:
    """Of 40 tokens 6 are predicted, at which alone transform and loss look."""
    post, pre = (price(model, Layout(), sequence=40) for model in (tiny_bert(), tiny_megatron_bert()))
    # Lookup, positions and types; behind them a norm, or none.
    embedding = 40 * 32 * (2 + 3 + 3)
    assert pre["embedding"].forward.memory == pytest.approx(embedding * 4 / 1e10)
    assert post["embedding"].forward.memory == pytest.approx((embedding + 40 * 32 * 2) * 4 / 1e10)
    seconds, gemm = HARDWARE.gemm_seconds, head_gemm(6)
    back = [seconds(way, "fp32", *shape) for way, shape in (("input_grad", (6, 32, 32)), ("weight_grad", (32, 32, 6)))]
    for parts, last_norm in ((post, 0), (pre, 1)):
        head = parts["head"]
        assert head.forward.gemm == pytest.approx(sum(gemm.values()) + seconds("forward", "fp32", 6, 32, 32))
        assert head.backward.gemm == pytest.approx(sum(back))
        # Rows looked up, GELU and norm of the 6; the loss with the gradient of its bias.
        bytes_ = 4 * (last_norm * 40 * 2 * 32 + 6 * 32 * (2 + 2 + 2) + 6 * 61 * (7 + 11 + 1))
        assert head.forward.memory == pytest.approx(bytes_ / 1e10)
    # A decoder's scores twice over: nothing is hidden from a token.
    causal = price(tiny_gpt2(), Layout(), sequence=40)["block"]
    assert pre["block"].forward.attention == pytest.approx(2 * causal.forward.attention)
    # Ranks of a ring have room for all that are predicted, those of a long one for all that they hold.
    ring = price(tiny_bert(), Layout(cp=4, cp_style="ring"), sequence=40)["head"]
    assert ring.forward.gemm == pytest.approx(post["head"].forward.gemm)


def test_trainers_that_predict_every_token_are_priced_so() -> None:
    job = TrainingJob(global_batch=8, sequence=40, precision="fp32", target="megatron")
    theirs = ComputeModel(tiny_bert(), HARDWARE, job, load_software("megatron-core-2025").software).head(Layout())
    seconds = HARDWARE.gemm_seconds
    assert theirs.forward.gemm == pytest.approx(
        seconds("forward", "fp32", 40, 32, 32) + seconds("forward", "fp32", 40, 61, 32)
    )


def head_gemm(tokens: int, dtype: str = "fp32") -> dict[str, float]:
    shapes = {"forward": (tokens, 61, 32), "input_grad": (tokens, 32, 61), "weight_grad": (61, 32, tokens)}
    return {way: HARDWARE.gemm_seconds(way, dtype, *shape) for way, shape in shapes.items()}


@pytest.mark.parametrize("schedule", ["gpipe", "looped-bfs"])
def test_where_forwards_come_first_the_logits_are_computed_again(schedule: str) -> None:
    """The forward has product and loss; the backward both again, and the gradients."""
    head, gemm = price(tiny_gpt2(), Layout(pp=2, schedule=schedule))["head"], head_gemm(16)
    assert head.forward.gemm == pytest.approx(gemm["forward"])
    assert head.backward.gemm == pytest.approx(sum(gemm.values()))
    assert head.forward.memory == pytest.approx(16 * (2 * 32 + 7 * 61) * 4 / 1e10)
    assert head.backward.memory == pytest.approx(16 * (3 * 32 + (7 + 11) * 61) * 4 / 1e10)
    for layout in (Layout(pp=2, schedule=schedule, micro_batch=8), Layout(pp=2)):  # one microbatch; 1F1B
        assert price(tiny_gpt2(), layout)["head"].backward.gemm == 0.0


def test_a_head_of_several_pieces_runs_their_products_and_sums_the_weights_gradient() -> None:
    """2 x 1040 tokens: two pieces of 1024, one of 32."""
    layout, weights = Layout(micro_batch=2), 61 * 32
    head = price(tiny_gpt2(), layout, 1040)["head"]
    assert head.forward.gemm == pytest.approx(2 * sum(head_gemm(1024).values()) + sum(head_gemm(32).values()))
    assert head.forward.memory == pytest.approx(2080 * (2 * 32 + 18 * 61) * 4 / 1e10)  # fp32 products add up
    narrow = compute_model(tiny_gpt2(), HARDWARE, "bf16", 1040).head(layout).forward.memory
    # Two sums in fp32 of three passes each, and a pass and a half to widen the first product and to narrow the sum.
    assert narrow == pytest.approx((2080 * (2 * 32 + 18 * 61) * 2 + weights * (2 * 3 + 2 * 1.5) * 4) / 1e10)


def test_others_run_the_loss_as_a_whole() -> None:
    job = TrainingJob(global_batch=8, sequence=1040, precision="fp32")
    titan = ComputeModel(tiny_gpt2(), HARDWARE, job, load_software("torchtitan-2024").software)
    for layout in (Layout(micro_batch=2), Layout(micro_batch=2, pp=2, schedule="gpipe")):
        assert titan.head(layout).forward.gemm == pytest.approx(head_gemm(2080)["forward"])


def test_gelu_blocks_have_no_gate_and_no_rope() -> None:
    block = price(tiny_gpt2(), Layout())["block"]
    elements = 2 * 2 * 32 + 2 * 32 + 2 * 64 + 2 * 3 * 32
    assert block.forward.memory == pytest.approx(16 * elements * 4 / 1e10)


@pytest.mark.parametrize("part", ["block", "embedding", "head"])
@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_more_tokens_are_never_cheaper(part: str, model: ModelSpec) -> None:
    costs = [price(model, Layout(micro_batch=b), s)[part] for b, s in ((1, 16), (2, 16), (2, 17), (2, 32), (4, 64))]
    for less, more in pairwise(costs):
        assert less.forward.total < more.forward.total
        assert less.backward.total < more.backward.total


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tp_cuts_the_work_but_never_below_its_share(tp: int) -> None:
    """tp ranks together do at least the whole work; the norms and residuals outside are not cut."""
    whole, share = price(tiny_llama(), Layout()), price(tiny_llama(), Layout(tp=tp), shard_overhead_seconds=0.0)
    for part in ("block", "embedding", "head"):
        for one, cut in ((whole[part].forward, share[part].forward), (whole[part].backward, share[part].backward)):
            assert one.total / tp <= cut.total * (1 + 1e-12) <= one.total * (1 + 1e-12)
    assert share["block"].forward.attention == pytest.approx(whole["block"].forward.attention / tp)


def test_sequence_parallelism_cuts_what_is_outside_of_the_products() -> None:
    plain = price(tiny_llama(), Layout(tp=4))["block"]
    cut = price(tiny_llama(), Layout(tp=4, sequence_parallel=True))["block"]
    assert cut.forward.gemm == plain.forward.gemm
    # Two norms (2 passes) and two residual sums (3) over 16 tokens of width 32, of which a quarter stays; what two
    # scatters move along the sequence, a copy (2 passes) each, does not, nor what gathers move of several sequences.
    less, more = 0.75 * (2 * 2 + 2 * 3), 2 * 2
    assert plain.forward.memory - cut.forward.memory == pytest.approx(16 * 32 * (less - more) * 4 / 1e10)
    two = price(tiny_llama(), Layout(tp=4, sequence_parallel=True, micro_batch=2))["block"]
    assert two.forward.memory - 2 * cut.forward.memory == pytest.approx(2 * 16 * 32 * 2 * 2 * 4 / 1e10)


def test_a_sharded_block_costs_its_overhead_once_a_pass() -> None:
    without = price(tiny_llama(), Layout(tp=2), shard_overhead_seconds=0.0)
    with_it = price(tiny_llama(), Layout(tp=2), shard_overhead_seconds=0.25)
    assert with_it["block"].forward.total - without["block"].forward.total == pytest.approx(0.25)
    assert with_it["block"].backward.total - without["block"].backward.total == pytest.approx(0.25)
    assert with_it["head"] == without["head"]
    assert price(tiny_llama(), Layout(), shard_overhead_seconds=0.25) == price(tiny_llama(), Layout())
    # Under sequence parallelism it has its own figure.
    cut = Layout(tp=2, sequence_parallel=True)
    none, some = (
        price(tiny_llama(), cut, shard_overhead_seconds=9.0, sequence_shard_overhead_seconds=overhead)["block"]
        for overhead in (0.0, 0.5)
    )
    assert some.forward.total - none.forward.total == pytest.approx(0.5)
    assert some.backward.total - none.backward.total == pytest.approx(0.5)


def test_a_sharded_block_of_more_tokens_costs_more() -> None:
    model = tiny_llama()
    shards = tuple(ShardPoint(bytes=size, seconds=size) for size in (1, 2**30))  # as many seconds as bytes

    def overhead(layout: Layout) -> float:
        priced = (price(model, layout, shard_overheads=points)["block"].forward.total for points in (shards, ()))
        return next(priced) - next(priced)

    linears = [local_linear_shape(model, name, 2) for name in model.linear_shapes]
    touched = [16 * (outputs + inputs) + outputs * inputs for outputs, inputs in linears]
    assert overhead(Layout(tp=2)) == pytest.approx(4 * sum(touched) / len(touched))
    more = [3 * 16 * (outputs + inputs) + outputs * inputs for outputs, inputs in linears]
    assert overhead(Layout(tp=2, micro_batch=3)) == pytest.approx(4 * sum(more) / len(more))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2(), tiny_llama(kv_heads=1)], ids=["gqa", "mha", "mqa"])
def test_local_shapes_cover_each_linear(model: ModelSpec, tp: int) -> None:
    for name, (outputs, inputs) in model.linear_shapes.items():
        local = local_linear_shape(model, name, tp)
        whole = name in ("wk", "wv") and model.kv_heads < tp
        expected = (outputs, inputs // tp) if name in ("wo", "w2") else (outputs if whole else outputs // tp, inputs)
        assert local == expected
        assert local[0] * local[1] * tp >= outputs * inputs
    assert local_kv_width(model, tp) == max(1, model.kv_heads // tp) * model.head_dim


def test_state_is_priced_in_fp32_by_bytes() -> None:
    compute = compute_model(tiny_llama(), HARDWARE, "bf16")
    assert compute.accumulate_seconds(1e6) == pytest.approx(3 * 4e6 / 1e10)
    assert compute.copy_seconds(1e6) == pytest.approx(2 * 4e6 / 1e10)
    assert compute.optimizer_seconds(1e6, 9) == pytest.approx((3 + 7) * 4e6 / 1e10)
    slow = compute_model(tiny_llama(), replace(HARDWARE, parameter_overhead_seconds=1e-4), "bf16")
    assert slow.optimizer_seconds(1e6, 9) == pytest.approx((3 + 7) * 4e6 / 1e10 + 9e-4)


def test_state_takes_the_measured_dtype_where_fp32_was_not_measured() -> None:
    point = MemoryPoint(dtype="bf16", operation="accumulate", direction="forward", elements=1000, seconds=1.0)
    compute = compute_model(tiny_llama(), small_hardware(memory=(point,)), "bf16")
    assert compute.accumulate_seconds(3000) == pytest.approx(3.0)


def test_a_microbatch_costs_its_overhead_each_way() -> None:
    cost = compute_model(tiny_llama(), small_hardware(microbatch_overhead_seconds=0.5), "fp32").microbatch()
    assert (cost.forward.total, cost.backward.total) == (0.5, 0.5)


def test_a_part_repeated_costs_as_much_as_added_up() -> None:
    seconds = ComputeSeconds(gemm=1.0, attention=2.0, memory=4.0, overhead=8.0, operations=16.0)
    part = ComputeCost(seconds, seconds * 2.0, seconds * 4.0, seconds * 8.0)
    assert part.repeated(3) == part + part + part
