"""`--model package.module:factory`: what tracing finds, what it refuses, what it costs, and a stage's part of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Stage, load, save
from planner.reduced_plan import reduce_plan
from planner.rules import RuleContext, recompute_modes, violations
from planner.step_cost import CostModel
from profiles.input_error import InputError
from profiles.traced_model import TracedModel
from runtime.data.data_options import DataOptions
from runtime.foreign.example_source import open_examples
from runtime.foreign.foreign_chunk import ForeignChunk
from runtime.foreign.foreign_loop import computes_in_double, run_module_plain
from runtime.foreign.foreign_values import load_first_values
from runtime.foreign.trace_module import trace
from tests.oracles.small_world import small_hardware
from tests.plans import make_plan, tiny_llama

HERE = "tests.module_factories"
LLAMA, VIT, ROWS = (f"{HERE}:{name}" for name in ("tiny_hf_llama", "tiny_vit", "rows"))
SEQUENCE = {LLAMA: 16, VIT: 17, ROWS: 6}
SEED = 7


@cache
def traced(factory: str) -> TracedModel:
    return trace(factory, SEQUENCE[factory])


def job(factory: str, precision: str = "fp32") -> TrainingJob:
    return TrainingJob(global_batch=8, sequence=SEQUENCE[factory], precision=precision)


# ---- what is found -----------------------------------------------------------------------------------------


def test_a_llama_of_transformers_is_the_llama_of_its_config() -> None:
    found, known = traced(LLAMA), tiny_llama()
    assert (found.block_list, found.layers, found.stream_shape) == ("model.layers", 4, (16, 32))
    assert found.parameters == known.parameters
    for part in ("block_parameters", "embedding_parameters", "head_parameters", "end_tensors", "block_tensors"):
        expected = getattr(known, part)
        assert (found.block.tensors if part == "block_tensors" else getattr(found, part)) == expected
    assert found.step_flops(8, 16) == known.step_flops(8, 16)
    (attention,) = found.block.attention
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.causal) == (4, 2, 8, True)
    assert found.reads_tokens
    assert dict(found.tp_plan)["self_attn.q_proj"] == "colwise"
    assert dict(found.tp_plan)["mlp.down_proj"] == "rowwise"
    assert len(found.tp_plan) == 7


def test_its_products_and_attention_cost_what_the_llamas_do() -> None:
    cluster = make_plan(tiny_llama(), Layout(), job(LLAMA)).cluster
    layout = Layout(micro_batch=2)
    ours, theirs = (
        CostModel(model, cluster, small_hardware(), job(LLAMA))._compute.block(layout)
        for model in (traced(LLAMA), tiny_llama())
    )
    assert ours.forward.gemm == theirs.forward.gemm
    assert ours.backward.gemm == pytest.approx(theirs.backward.gemm, rel=1e-12)
    assert ours.forward.attention == theirs.forward.attention
    assert ours.forward.memory > 0


def test_a_vision_transformer_is_embedding_blocks_and_classes() -> None:
    found = traced(VIT)
    width, tokens = 32, 17
    assert (found.layers, found.input_shape, found.stream_shape) == (4, (3, 16, 16), (tokens, width))
    assert found.block.parameters == 12 * width**2 + 13 * width
    assert found.before.parameters == 48 * width + width + width + tokens * width
    assert found.after.parameters == 2 * width + 10 * width + 10
    products = 2 * tokens * 12 * width**2
    assert found.block.flops == products + 4 * tokens**2 * width
    assert found.before.flops == 2 * (tokens - 1) * 48 * width
    assert [kernel.operation for kernel in found.block.kernels] == ["layernorm", "layernorm", "gelu"]
    assert found.block.kept_bytes.fp32 == pytest.approx(2 * found.block.kept_bytes.bf16, rel=0.05)
    assert not found.block.attention[0].causal


def test_pairs_of_linears_are_found_where_nobody_says_how_tp_cuts() -> None:
    assert traced(VIT).tp_plan == (("down", "rowwise"), ("up", "colwise"))
    assert not traced(VIT).tp_heads
    assert traced(LLAMA).tp_heads
    planless = trace(f"{HERE}:planless_hf_llama", 16)
    within = {name: style for name, style in traced(LLAMA).tp_plan if name.startswith("mlp.")}
    assert dict(planless.tp_plan) == within
    assert len(within) == 3
    assert trace(f"{HERE}:halved", 6).tp_plan == ()  # the two halves of a linear's outputs are multiplied
    assert trace(f"{HERE}:scaled", 6).tp_plan == ()  # a parameter goes in between


def test_a_plan_of_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = make_plan(traced(VIT), Layout(pp=2, dp=2, micro_batch=2), job(VIT))
    save(plan, tmp_path / "plan.yaml")
    assert load(tmp_path / "plan.yaml") == plan


def test_no_torch_is_imported_by_what_plans_are_made_of() -> None:
    words = "import sys, planner.planning, profiles.traced_model; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stdout == "False\n"


# ---- what is refused ---------------------------------------------------------------------------------------

REFUSED = {
    "no_such.module:factory": "No module named 'no_such'",
    f"{HERE}:nowhere": "it offers",
    f"{HERE}:broken": "OSError: no weights here, module_factories.py",
    f"{HERE}:a_number": "int",
    f"{HERE}:NoLoss": "a module without example_batch and loss",
    f"{HERE}:Unlike": "layers (Linear)",
    f"{HERE}:Skipping": "what block 0 computes goes into what is after the blocks past the stream",
    f"{HERE}:Twice": "blocks ran in the order 0, 1, 2, 0",
    f"{HERE}:Between": "block 1 does not take what block 0 gives as it is",
    f"{HERE}:Conditioned": "block 0 takes 0, which is made with shift",
    f"{HERE}:DroppingRows": "Dropout with p=0.1",
    f"{HERE}:NoisyRows": "rand",
    f"{HERE}:Raising": "RuntimeError: shape",
    f"{HERE}:BadSamples": "a tensor [3, 6]",
    f"{HERE}:OddPlan": "'diagonal'",
}


@pytest.mark.parametrize("factory", REFUSED)
def test_what_is_no_chain_or_cannot_be_trained_is_refused(factory: str) -> None:
    with pytest.raises(InputError) as caught:
        trace(factory, 6)
    assert REFUSED[factory] in str(caught.value), str(caught.value)
    assert "--model" in caught.value.where


def test_another_length_is_refused_with_the_right_one() -> None:
    with pytest.raises(InputError, match="17: every sample is that long"):
        trace(VIT, 16)


def test_another_module_than_was_planned_is_refused() -> None:
    model = traced(ROWS)
    other = replace(model, before=replace(model.before, parameters=model.before.parameters + 1))
    with pytest.raises(InputError, match="another module than the plan is for"):
        ForeignChunk(other, Stage.whole(other))


def test_layouts_that_its_code_cannot_run_are_not_legal() -> None:
    llama = traced(LLAMA)

    def why(layout: Layout, model: TracedModel = llama, **changes: int) -> str:
        asked = replace(job(LLAMA), **changes)
        return "; ".join(violations(layout, RuleContext(model, asked, layout.world_size)))

    assert why(Layout(tp=2, pp=2, micro_batch=2)) == ""
    assert "tp=4 does not divide the 2 key-value heads" in why(Layout(tp=4))
    assert "no pair of linears" in why(Layout(tp=2), replace(traced(LLAMA), tp_plan=()))
    assert "nothing is cut over tp" in why(Layout(tp=2, sequence_parallel=True))
    assert "has no keys of other ranks" in why(Layout(cp=2, cp_style="ring"))
    assert "is run as a whole" in why(Layout(pp=2, schedule="zb1p"))
    assert "samples of 16 tokens" in why(Layout(), sequence=32)
    assert recompute_modes(Layout(), RuleContext(llama, job(LLAMA), 1)) == ("none", "full")
    tied = trace(f"{HERE}:tied_hf_llama", 16)
    assert tied.parameters == tiny_llama(tied_embeddings=True).parameters
    assert why(Layout(pp=2), tied) == ""
    after = replace(tied.after, parameter_names=tied.before.parameter_names * 2)
    both = replace(tied, before=replace(tied.before, parameter_names=tied.before.parameter_names * 2), after=after)
    assert "are used before its blocks and after them" in why(Layout(pp=2), both)


def test_data_named_for_a_module_that_makes_its_own_are_refused() -> None:
    plan = make_plan(traced(VIT), Layout(dp=2), job(VIT))
    with pytest.raises(InputError, match="makes its own samples"):
        open_examples(plan, DataOptions(paths=("text.txt",)), seed=0)
    inputs, target = open_examples(plan, DataOptions(), seed=0).batch(3, 8)
    assert (tuple(inputs.shape), tuple(target.shape)) == ((8, 3, 16, 16), (8,))


# ---- a stage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), (2,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("factory", [VIT, ROWS, LLAMA])
def test_stages_one_after_the_other_are_the_module(factory: str, cuts: tuple[int, ...]) -> None:
    model = traced(factory)
    ends = [0, *cuts, model.layers]
    chunks = []
    for first, end in pairwise(ends):
        stage = replace(Stage.whole(model), first=first, end=end, recompute_none=end - first)
        stage = replace(stage, embedding=not chunks, head=len(chunks) == len(cuts))
        chunk = ForeignChunk(model, stage).to(torch.float64)
        chunk.activation_dtype = torch.float64
        chunk.to_empty(device="cpu")
        chunk.tie()
        chunks.append(chunk)
    load_first_values(chunks, model, SEED)
    assert sum(p.numel() for chunk in chunks for p in chunk.parameters()) == model.parameters
    if model.reads_tokens:
        ids = torch.randint(0, model.vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
        inputs, target = ids[:, :-1], ids[:, 1:]
    else:
        inputs, target = chunks[0].contract.draw(4, 0, 1)
    stream = inputs
    for chunk in chunks:
        stream = chunk(stream, targets=target, source=inputs)
    stream.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for chunk in chunks for p in chunk.parameters() if p.grad is not None])
    plain = run_module_plain(
        model, [(inputs, target)], dtype=torch.float64, learning_rate=1e-3, weight_decay=0.1, seed=SEED
    )
    assert stream.item() == pytest.approx(plain.losses[0], rel=1e-12)
    assert norm.item() == pytest.approx(plain.norms[0], rel=1e-12)


def test_a_module_that_casts_in_its_norms_does_not_compute_in_double() -> None:
    assert not computes_in_double(traced(LLAMA))
    assert computes_in_double(traced(VIT))


def test_reduced_it_is_the_same_module_on_fewer_ranks() -> None:
    plan = make_plan(traced(LLAMA), Layout(pp=4, dp=4, micro_batch=1), replace(job(LLAMA), global_batch=16))
    small = reduce_plan(plan).plan
    assert small.layout.world_size <= 8
    assert small.model == plan.model
    assert [(stage.first, stage.end) for stage in small.stages][-1][1] == 4
    assert small.layout.pp > 1
    assert small.layout.dp > 1
