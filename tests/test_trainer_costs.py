"""What trainers do costs what it moves: each fact of theirs by hand, and figures that papers print."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.megatron_headline import ASKED_ALL, ASKED_EFFICIENCY, PAPER_ALL, PAPER_EFFICIENCY, PAPER_ONE, headline
from planner.axis_cost import AxisModel, Passes
from planner.comm_cost import CommModel, Group
from planner.compute_cost import ComputeModel
from planner.compute_seconds import ComputeCost
from planner.data_parallel_cost import DataParallelModel
from planner.job import TrainingJob
from planner.layout import Layout
from planner.local_shapes import cut_shares
from planner.run_case import case_of, load_run_facts
from planner.step_cost import CostModel
from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.hardware import load_hardware
from profiles.model import ModelSpec
from profiles.points import EAGER_PASSES, SCALAR_SLOWDOWN
from profiles.published_model import model_of
from profiles.published_runs import load_published_runs
from profiles.software import Software, load_software
from tests.oracles.small_world import small_hardware
from tests.plans import tiny_gpt2, tiny_llama
from tests.published import write_runs

HARDWARE = small_hardware(units=1, launch_seconds=0.0)
TOKENS = 32
LAYOUT = Layout(micro_batch=2)


def software(name: str = "megatron-2021", **facts: Any) -> Software:
    return replace(load_software(name).software, **facts)


def compute(model: ModelSpec, trainer: Software, precision: str = "fp32") -> ComputeModel:
    return ComputeModel(model, HARDWARE, TrainingJob(global_batch=8, sequence=16, precision=precision), trainer)


def seconds_of(passes: float, elements: float) -> float:
    return passes * elements * 4 / HARDWARE.memory_bandwidth_bytes_per_second


def more(model: ModelSpec, name: str, fact: str, less: Any, most: Any, part: str = "block") -> tuple[float, float]:
    """What a fact adds to forward and backward."""
    one, other = (
        ComputeCost() + getattr(compute(model, software(name, **{fact: value})), part)(LAYOUT) for value in (less, most)
    )
    return other.forward.total - one.forward.total, other.backward.total - one.backward.total


def test_a_bias_of_its_own_kernel_is_read_and_written() -> None:
    gpt2 = tiny_gpt2()
    outputs = {name: shape[0] for name, shape in gpt2.linear_shapes.items()}
    joined = outputs["wq"] + outputs["wk"] + outputs["wv"]
    forward, backward = more(gpt2, "megatron-2021", "linear_bias", "epilogue", "following")
    assert forward == pytest.approx(seconds_of(2, TOKENS * joined))
    assert backward == pytest.approx(0.0)
    forward, _ = more(gpt2, "megatron-2021", "linear_bias", "epilogue", "separate")
    assert forward == pytest.approx(seconds_of(2, TOKENS * sum(outputs.values())))
    assert more(tiny_llama(), "megatron-2021", "linear_bias", "epilogue", "separate") == (0.0, 0.0)  # has no bias


def test_repeated_heads_are_copied_to_as_many_as_queries() -> None:
    llama = tiny_llama()
    added = more(llama, "torchtitan-2024", "grouped_heads", "native", "repeated")
    assert added == pytest.approx([seconds_of(2, 2 * TOKENS * llama.query_width)] * 2)
    alike = replace(llama, kv_heads=llama.heads)
    assert more(alike, "torchtitan-2024", "grouped_heads", "native", "repeated") == (0.0, 0.0)


def test_metrics_take_the_loss_twice_more_and_never_back() -> None:
    gpt2 = tiny_gpt2()
    forward, backward = more(gpt2, "fsdp1-2023", "loss_metrics", False, True, "head")
    assert forward == pytest.approx(2 * seconds_of(EAGER_PASSES["loss_metric"][0], TOKENS * gpt2.vocab_size))
    assert backward == pytest.approx(0.0)


def test_a_chain_of_operations_over_the_vocabulary_passes_often() -> None:
    gpt2 = tiny_gpt2()
    forward, backward = more(gpt2, "megatron-2021", "cross_entropy", "fused", "chain", "head")
    assert forward == pytest.approx(seconds_of(19 - 2, TOKENS * gpt2.vocab_size))
    assert backward == pytest.approx(seconds_of(7 - 2, TOKENS * gpt2.vocab_size))


def test_every_second_product_runs_again_and_the_last_never() -> None:
    """wk, wo and w3 of wq, wk, wv, wo, w1, w3, w2; in fp8, whose products the policy does not know, all but w2."""
    llama, kept = tiny_llama(), software("torchtitan-2024", selective="keep_matmuls")
    half = software("torchtitan-2024")
    none, some = (compute(llama, trainer).block(LAYOUT).selective for trainer in (kept, half))
    again = [HARDWARE.gemm_seconds("forward", "fp32", TOKENS, n, k) for n, k in ((16, 32), (32, 32), (64, 32))]
    assert none.gemm == 0.0
    assert some.gemm == pytest.approx(sum(again))
    assert some.attention == none.attention == 0.0
    assert compute(llama, half, "fp8")._again == ("wq", "wk", "wv", "wo", "w1", "w3")
    assert compute(tiny_gpt2(), half)._again == ("wk", "wo")  # of wq, wk, wv, wo, w1, w2
    assert compute(llama, kept)._again == ()


def test_weights_that_are_one_matrix_are_one_product() -> None:
    llama = tiny_llama()
    apart, joined = (
        compute(llama, software(name)).block(LAYOUT).forward.gemm for name in ("torchtitan-2024", "nanotron-2024")
    )
    shapes = [(64, 32), (32, 32), (128, 32), (32, 64)]
    assert joined == pytest.approx(sum(HARDWARE.gemm_seconds("forward", "fp32", TOKENS, n, k) for n, k in shapes))
    assert joined <= apart


def test_elements_moved_one_at_a_time_take_longer_in_16_bits_alone() -> None:
    h100 = load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job = TrainingJob(global_batch=8, sequence=1024, precision="bf16")
    slow, fast = (
        ComputeModel(tiny_gpt2(), h100, job, software("megatron-2019", elementwise=way))
        for way in ("scalar", "vectorized")
    )
    elements = 1e9
    assert slow._memory("residual", elements).forward.total == pytest.approx(
        SCALAR_SLOWDOWN * fast._memory("residual", elements).forward.total
    )
    assert SCALAR_SLOWDOWN == 2 * 0.8  # as long as 80 % of the bytes in fp32 (pytorch/pytorch#22612)
    assert slow._memory("layernorm", elements) == fast._memory("layernorm", elements)
    assert more(tiny_gpt2(), "megatron-2019", "elementwise", "vectorized", "scalar") == (0.0, 0.0)  # fp32


def test_an_optimizer_beside_16_bit_weights_casts_them() -> None:
    h100 = load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job = TrainingJob(global_batch=8, sequence=1024, precision="bf16")
    parameters = 1e9

    def passes(trainer: Software) -> float:
        seconds = ComputeModel(tiny_gpt2(), h100, job, trainer).optimizer_seconds(parameters, 0)
        return seconds * h100.memory_bandwidth_bytes_per_second / 4 / parameters

    assert passes(software(gradients="fp32", optimizer="fused")) == pytest.approx(3 + 7 + 1.5)
    assert passes(software(gradients="compute", optimizer="fused")) == pytest.approx(3 + 7 + 3)
    assert passes(software(gradients="fp32", optimizer="eager")) == pytest.approx(3 + 22 + 1.5)
    assert passes(software("meshwright")) == pytest.approx(3 + 7)


def test_shards_of_tensors_are_copied_for_each_rank_and_reduced_in_buckets() -> None:
    """1e8 parameters in 6 tensors, of 1e9 that the rank has: 6.1 buckets of 25 MiB and half a tensor, fp32 sums."""
    cluster, h100 = resolve_cluster("dgx-h100:16"), load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job = TrainingJob(global_batch=128, sequence=1024, precision="bf16")
    layout, comm, group = Layout(dp=128, dp_shard=128, zero=1), CommModel(cluster, h100), Group(128, 1)
    prices = {}
    for shards in ("of_tensors", "of_buckets"):
        trainer = software("nanotron-2024", shards=shards, gradient_reduce="after_backward")
        model = DataParallelModel(h100, comm, ComputeModel(tiny_gpt2(), h100, job, trainer), "bf16", trainer)
        prices[shards] = model.price(layout, 1e8, 0.0, 0.0, 0.0, tensors=6, whole=1e9 * (shards == "of_tensors"))
    buckets = 2e8 / (25 * 2**20 + 2e8 / 12)
    launch = h100.launch_seconds  # all that a copy of so little takes
    assert prices["of_tensors"].gather.dp == pytest.approx(
        comm.collective_seconds("all_gather", group, 2e9) / 10 + 128 * 6 * launch
    )
    assert prices["of_tensors"].reduce.dp == pytest.approx(
        buckets * (comm.collective_seconds("reduce_scatter", group, 4e8 / buckets) + 2 * 128 * launch)
    )
    assert prices["of_buckets"].gather.dp == pytest.approx(comm.collective_seconds("all_gather", group, 2e8))
    assert prices["of_buckets"].reduce.dp == pytest.approx(comm.collective_seconds("reduce_scatter", group, 4e8))


def test_a_gather_beside_the_own_share_hides_less_than_pieces_do() -> None:
    cluster, h100 = resolve_cluster("dgx-h100:1"), load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job = TrainingJob(global_batch=8, sequence=4096, precision="bf16")
    model, layout = tiny_22b(), Layout(tp=8, micro_batch=4, sequence_parallel=True)
    exposed = {}
    for way in ("none", "own_shard", "pieces"):
        trainer = software("nanotron-2024", tp_overlap=way)
        block = ComputeModel(model, h100, job, trainer).block(layout)
        exposed[way] = AxisModel(model, h100, CommModel(cluster, h100), job, trainer).block_tp(layout, block, "dense")
    assert exposed["pieces"].forward < exposed["own_shard"].forward < exposed["none"].forward
    assert exposed["own_shard"].forward > exposed["none"].forward / 2  # the sums of the forward stand alone
    # Under tp 8 an eighth of the products is too short for the gathers: all but what it hides is added. Of twelve h
    # times h in the weights seven are cut by columns, which the inputs are gathered for.
    comm, size = CommModel(cluster, h100), 2.0 * 4 * 4096 * model.hidden_size
    gather, scatter = (2 * comm.collective_seconds(o, Group(8, 1), size) for o in ("all_gather", "reduce_scatter"))
    block = ComputeModel(model, h100, job, software("nanotron-2024")).block(layout)
    own = h100.exposed_seconds(gather, 7 / 12 * block.forward.gemm / 8)
    assert exposed["own_shard"].forward == pytest.approx(own + scatter)
    first, second = block.backward_input.gemm, block.backward_weight.gemm
    beside = ((gather, 5 / 12 * first / 8), (gather, 7 / 12 * first), (scatter, 7 / 12 * second))
    assert exposed["own_shard"].backward == pytest.approx(sum(h100.exposed_seconds(*each) for each in beside))


def test_what_runs_again_and_what_hides_of_the_sums_of_tp() -> None:
    """Of two all-reduces a pass, recomputation as needed leaves out the last; products of the weights hide others."""
    cluster, a100 = resolve_cluster("dgx-a100:1"), load_hardware(resolve_hardware_path("a100-sxm-80gb"))
    job = TrainingJob(global_batch=4, sequence=2048, precision="fp16", target="megatron")
    comm, layout = CommModel(cluster, a100), Layout(tp=4, micro_batch=4)
    reduce = comm.collective_seconds("all_reduce", Group(4, 1), 2.0 * 4 * 2048 * tiny_22b().hidden_size)

    def passes(**facts: Any) -> Passes:
        trainer = software(**facts)
        block = ComputeModel(tiny_22b(), a100, job, trainer).block(layout)
        return AxisModel(tiny_22b(), a100, comm, job, trainer).block_tp(layout, block, "dense")

    assert passes(recomputed="whole").full == pytest.approx(2 * reduce)
    assert passes(recomputed="as_needed").full == pytest.approx(reduce)
    alone, hidden = passes(tp_overlap="none"), passes(tp_overlap="input_gradient")
    assert alone.backward == pytest.approx(2 * reduce)
    assert (hidden.forward, hidden.full) == (alone.forward, alone.full)
    block = ComputeModel(tiny_22b(), a100, job, software()).block(layout)
    weights = 7 / 12 * block.backward_weight.gemm  # of those cut by columns: 7 of 12 h times h
    assert hidden.backward == pytest.approx(a100.exposed_seconds(2 * reduce, weights))
    assert hidden.backward < alone.backward / 2
    layout = Layout(tp=4, micro_batch=4, sequence_parallel=True)
    hidden, size = passes(tp_overlap="input_gradient"), 2.0 * 4 * 2048 * tiny_22b().hidden_size
    gather, scatter = (2 * comm.collective_seconds(o, Group(4, 1), size) for o in ("all_gather", "reduce_scatter"))
    block = ComputeModel(tiny_22b(), a100, job, software()).block(layout)
    beside = ((gather, block.backward_input.gemm), (scatter, block.backward_weight.gemm))
    behind = sum(a100.exposed_seconds(sent, 7 / 12 * products) for sent, products in beside)
    assert hidden.backward == pytest.approx(gather + behind)


def tiny_22b() -> ModelSpec:
    """The 22 B model of arXiv 2205.05198, table 3."""
    changes = {"hidden_size": 6144, "ffn_hidden_size": 24576, "heads": 64, "kv_heads": 64, "head_dim": 96}
    return replace(tiny_gpt2(), name="22b", layers=48, vocab_size=51200, max_positions=4096, **changes)


def test_a_layer_of_22b_as_it_was_measured() -> None:
    """arXiv 2205.05198, table 4, one layer on A100, tp 8, micro batch 4: milliseconds."""
    cluster, a100 = resolve_cluster("dgx-a100:1"), load_hardware(resolve_hardware_path("a100-sxm-80gb"))
    job = TrainingJob(global_batch=4, sequence=2048, precision="fp16", target="megatron")
    trainer, model = software("megatron-2021"), tiny_22b()
    for sp, measured in ((False, 7.7), (True, 7.2)):
        layout = Layout(tp=8, micro_batch=4, sequence_parallel=sp)
        block = ComputeModel(model, a100, job, trainer).block(layout)
        tp = AxisModel(model, a100, CommModel(cluster, a100), job, trainer).block_tp(layout, block, "dense")
        assert 1e3 * (block.forward.total + tp.forward) == pytest.approx(measured, rel=0.03)
        assert 1e3 * block.selective.total == pytest.approx(1.3, rel=0.05)
        # The backward, which hides some of its all-reduces there and none here.
        assert 1e3 * (block.backward.total + tp.backward) == pytest.approx(11.9, rel=0.07)


def test_the_first_headline_of_megatron() -> None:
    """arXiv 1909.08053 (benchmarks/megatron_headline.py)."""
    found = headline()
    assert found.all == pytest.approx(PAPER_ALL, rel=ASKED_ALL)
    assert found.one == pytest.approx(PAPER_ONE, rel=0.05)
    assert found.efficiency == pytest.approx(PAPER_EFFICIENCY, abs=ASKED_EFFICIENCY)


def test_zero_bubbles_models_have_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    gpt = {"model_name": "GPT-14.6B", "layers": "46", "hidden": "5120", "ffn": "20480", "heads": "40"}
    gpt |= {"kv_heads": "40", "vocab": "", "params_B": "14.6"}
    names = ("zero-bubble-megatron-2023", "megatron-2021")
    runs = load_published_runs(write_runs(tmp_path / "runs.csv", *(gpt | {"software": name} for name in names)))
    (model, assumed), (other, _) = (model_of(run, ()) for run in runs)
    assert (model.vocab_size, "vocab 32000" in assumed) == (32000, True)
    assert model.parameters / 1e9 == pytest.approx(14.6, abs=0.05)
    assert other.vocab_size == 50257


def test_the_last_of_contiguous_pieces_attends_to_most() -> None:
    """Of cp pieces, cp - 1 before it in full and half of itself: (2 cp - 1) / cp times its even share."""
    layout = Layout(cp=4, cp_style="ring", micro_batch=2)
    even, last = (
        compute(tiny_llama(), software("torchtitan-2024", cp_shards=way)).block(layout)
        for way in ("balanced", "contiguous")
    )
    assert last.forward.attention == pytest.approx((4 - 0.5) / (4 / 2) * even.forward.attention)
    assert last.backward.attention == pytest.approx((4 - 0.5) / (4 / 2) * even.backward.attention)
    assert last.forward.gemm == even.forward.gemm


def test_the_last_product_stays_in_16_bits_where_the_others_are_fp8() -> None:
    h100 = load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    heads = {}
    for precision in ("bf16", "fp8"):
        job = TrainingJob(global_batch=8, sequence=1024, precision=precision)
        heads[precision] = ComputeModel(tiny_22b(), h100, job, software("megatron-core-2024")).head(Layout())
    assert heads["fp8"] == heads["bf16"]


def test_dynamic_scaling_reads_a_tensor_once_more() -> None:
    """Largest element and cast of inputs; of output gradients the transpose besides."""
    h100 = load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job = TrainingJob(global_batch=8, sequence=1024, precision="fp8")
    rows, outputs, inputs = 1 << 20, 4096, 1024
    delayed, dynamic = (
        ComputeModel(tiny_22b(), h100, job, software("torchtitan-2024", fp8_scaling=way))._linear(rows, outputs, inputs)
        for way in ("delayed", "dynamic")
    )
    byte = rows * 2 / h100.memory_bandwidth_bytes_per_second
    assert dynamic.forward.memory - delayed.forward.memory == pytest.approx(0.5 * inputs * byte)
    assert dynamic.backward.memory - delayed.backward.memory == pytest.approx(1.5 * outputs * byte)


def test_torchs_pipelines_cut_a_batch_in_as_many_as_ranks_and_keep_weights_gathered(tmp_path: Path) -> None:
    cells = {"pp": "8", "vpp": "1", "tp": "1", "dp": "8", "num_gpus": "64", "global_batch": "256", "micro_batch": ""}
    cells |= {"zero_stage": "3", "layers": "24"}
    rows = [cells | {"software": name} for name in ("torchtitan-2024", "megatron-2021")]
    runs, facts = load_published_runs(write_runs(tmp_path / "runs.csv", *rows)), load_run_facts()
    ours, other = (case_of(run, facts).layout for run in runs)
    assert (ours.micro_batch, ours.zero) == (4, 2)
    assert (other.micro_batch, other.zero) == (1, 3)


def test_heads_of_a_chain_are_copied_and_their_gradients_joined() -> None:
    """Queries, keys and values for the products of 2019; the gradients of all three into one matrix since then."""
    gpt2 = tiny_gpt2()
    query = TOKENS * gpt2.query_width
    costs = {
        way: compute(gpt2, software(attention=way))._heads(LAYOUT) for way in ("unfused", "fused_softmax", "flash2")
    }
    passes = {way: (cost.forward.memory, cost.backward.memory) for way, cost in costs.items()}
    assert passes["flash2"] == pytest.approx((seconds_of(2, query), seconds_of(2, query)))
    assert passes["fused_softmax"] == pytest.approx((seconds_of(2, query), seconds_of(2 + 6, query)))
    assert passes["unfused"] == pytest.approx((seconds_of(8, query), seconds_of(8 + 6, query)))


def test_a_buffer_in_fp32_takes_the_first_gradient_too() -> None:
    nanotron, ours, deepspeed = (software(n) for n in ("nanotron-2024", "meshwright", "megatron-deepspeed-2023"))
    assert (nanotron.adds_first_gradient, ours.adds_first_gradient) == (True, False)
    assert not deepspeed.adds_first_gradient  # 16-bit gradients, the first of which is left as it is
    # Of nine tensors of a layer (seven weights, two norms) joined weights leave six.
    assert (nanotron.joined_tensors(9, 3, root=False), ours.joined_tensors(9, 3, root=False)) == (6, 9)
    assert nanotron.joined_tensors(2, 3, root=True) == 2
    cluster, h100 = resolve_cluster("dgx-h100:1"), load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job = TrainingJob(global_batch=1, sequence=1024, precision="bf16")
    layer = {
        name: CostModel(tiny_22b(), cluster.with_devices(1), h100, job, software(name)).price(Layout()).segments[0]
        for name in ("nanotron-2024", "megatron-2021")
    }
    added = 3 * 4 * tiny_22b().block_parameters / h100.memory_bandwidth_bytes_per_second
    parts = [layer[name].seconds.backward_weight.compute for name in ("nanotron-2024", "megatron-2021")]
    assert parts[0] - parts[1] == pytest.approx(added, rel=0.1)


def test_the_gradients_of_a_tied_matrix_are_summed_whole_but_of_shards_under_fsdp() -> None:
    cluster, h100 = resolve_cluster("dgx-h100:2"), load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job, layout = TrainingJob(global_batch=8, sequence=1024, precision="bf16"), Layout(pp=2, dp=8, dp_shard=8, zero=1)
    summed = {}
    for name in ("nanotron-2024", "nemo-megatron-2022", "torchtitan-2024"):
        compute = ComputeModel(tiny_gpt2(), h100, job, software(name))
        model = DataParallelModel(h100, CommModel(cluster, h100), compute, "bf16", software(name))
        summed[name] = model.summed_bytes(layout, 1000.0)
    assert summed == {"nanotron-2024": 4000.0, "nemo-megatron-2022": 4000.0, "torchtitan-2024": 500.0}


def test_described_messages_wait_for_the_host_and_for_two_messages_a_tensor() -> None:
    """Two tensors forward and one back, 47 operations of the host for each: half of the three a message."""
    cluster, h100 = resolve_cluster("dgx-h100:1"), load_hardware(resolve_hardware_path("h100-sxm-80gb"))
    job, layout = TrainingJob(global_batch=8, sequence=1024, precision="bf16", target="megatron"), Layout(pp=2)
    blocking, described = (
        CostModel(tiny_gpt2(), cluster, h100, job, software("nanotron-2024", p2p=way)).price_seconds(layout)
        for way in ("blocking", "described")
    )
    tiny, _ = CommModel(cluster, h100).hop_seconds(Group(2, 1), 56.0)
    waited = 1.5 * (47 * h100.host_operation_seconds + 2 * tiny)
    assert described.hop_seconds[0] - blocking.hop_seconds[0] == pytest.approx(waited)


def test_shares_of_products_by_columns_and_rows() -> None:
    """All of a dense layer is cut; of a layer with experts only the attention."""
    llama = tiny_llama()
    columns, rows = cut_shares(llama, "dense")
    sizes = {name: a * b for name, (a, b) in llama.linear_shapes.items()}
    assert rows == pytest.approx((sizes["wo"] + sizes["w2"]) / sum(sizes.values()))
    assert columns == pytest.approx(1.0 - rows)
    mixtral = resolve_model("mixtral-8x7b")
    columns, rows = cut_shares(mixtral, "experts")
    attention, routed = (4096 * (4096 + 2 * 1024), 4096 * 4096), 2 * 3 * 4096 * 14336
    assert (columns, rows) == pytest.approx(tuple(part / (sum(attention) + routed) for part in attention))


def test_what_comes_sequence_first_is_copied_until_attention_takes_it() -> None:
    """Of as many keys as queries h elements a token are copied 8 times there and 10 back, each read and written; else
    once each way."""
    llama = replace(tiny_llama(), kv_heads=tiny_llama().heads)
    layouts = ("sequence_first", "one_copy")
    first, once = (compute(llama, software("nanotron-2024", heads_layout=way)).block(LAYOUT) for way in layouts)
    elements = TOKENS * llama.query_width
    assert first.forward.memory - once.forward.memory == pytest.approx(seconds_of(2 * 8 - 2, elements))
    assert first.backward.memory - once.backward.memory == pytest.approx(seconds_of(2 * 10 - 2, elements))


def test_gradients_of_gate_and_input_are_joined_where_their_weights_are() -> None:
    """torch's kernels take 5 and 9 passes where a fused one takes 3 and 5, and joining two gradients takes 4."""
    llama = tiny_llama()
    eager, fused = (
        compute(llama, software("nanotron-2024", activation=way)).block(LAYOUT) for way in ("eager", "fused")
    )
    elements = TOKENS * llama.ffn_hidden_size
    assert eager.forward.memory - fused.forward.memory == pytest.approx(seconds_of(5 - 3, elements))
    assert eager.backward.memory - fused.backward.memory == pytest.approx(seconds_of(9 + 4 - 5, elements))


def test_buffers_that_the_first_gradient_is_added_to_are_filled_with_zeros() -> None:
    for name, zeros in (("nanotron-2024", 1), ("meshwright", 0), ("megatron-2021", 0)):
        state = compute(tiny_gpt2(), software(name))
        added = state.optimizer_seconds(1e6, 9, 4e6) - state.optimizer_seconds(1e6, 9)
        assert added == pytest.approx(seconds_of(zeros, 4e6))
