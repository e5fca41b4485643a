"""What `plan` and `estimate` say beyond the plan: default, stage seconds, cost, differences, assumptions; golden."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from planner.answer import answer, assumptions, differing, differing_text, nominal_figures
from planner.assignment import counts_of, stages_of
from planner.default_layout import default_layout
from planner.layout import Layout
from planner.plan_report import default_text, estimate_report, plan_report
from planner.question import Question
from planner.rules import violations
from planner.search import predict, search, solve_layout
from planner.stage_table import stage_table
from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.experts_spec import Experts
from profiles.hardware import load_hardware
from tests.oracles.small_world import price, small_cluster, small_hardware, small_question
from tests.plans import tiny_llama

TWO_NODES = small_question(cluster=small_cluster(4, 2), memory_limit_bytes=5.2e5)


def text(report: RenderableType, width: int = 120) -> str:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def answered(question: Question, layout: Layout, dollars: float | None = None):
    solved, _ = solve_layout(question, layout, None)
    return answer(question, layout, stages_of(layout, solved.counts), predict(question, solved), dollars)


# ---- the default ------------------------------------------------------------------------------------------


def test_the_default_is_as_wide_as_the_node_and_as_short_as_fits() -> None:
    default = default_layout(TWO_NODES)
    assert default is not None
    assert default.layout == Layout(tp=2, dp=2, dp_shard=2, zero=1)
    assert default.fits
    assert default.step_seconds == price(default.layout, TWO_NODES).step(default.counts)
    tight = replace(TWO_NODES, job=replace(TWO_NODES.job, memory_limit_bytes=3.4e5))
    default = default_layout(tight)
    assert default is not None
    assert default.layout == Layout(tp=2, pp=2)
    assert default.fits
    assert default.peak_memory_bytes <= 3.4e5


def test_the_default_recomputes_only_what_it_must() -> None:
    for limit, recomputes in ((1e9, False), (4e5, True)):
        default = default_layout(replace(TWO_NODES, job=replace(TWO_NODES.job, memory_limit_bytes=limit)))
        assert default is not None
        assert default.layout == Layout(tp=2, dp=2, dp_shard=2, zero=1)
        assert any(blocks.full for stage in default.counts for blocks in stage) == recomputes


def test_a_default_that_does_not_fit_says_by_how_much() -> None:
    question = replace(TWO_NODES, job=replace(TWO_NODES.job, memory_limit_bytes=5e4))
    default = default_layout(question)
    assert default is not None
    assert not default.fits
    assert default.missing_bytes == pytest.approx(default.peak_memory_bytes - 5e4)
    found = answered(question, Layout(pp=4))
    assert "does not fit: " + default.layout.short() + " misses" in default_text(found).plain


def test_the_default_knows_no_pins_and_takes_the_next_tp_that_is_legal() -> None:
    pinned = replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"tp": 1, "recompute": "full"}, bans=("zero",)))
    assert default_layout(pinned) == default_layout(TWO_NODES)
    odd = small_question(tiny_llama(heads=3, kv_heads=3, hidden_size=24, ffn_hidden_size=66), devices=4)
    default = default_layout(odd)
    assert default is not None
    assert default.layout.tp == 1  # neither 4 nor 2 divides 3 heads


def test_the_default_of_experts_keeps_them_in_the_node() -> None:
    experts = Experts(number=8, top_k=2, ffn_hidden_size=64)
    question = small_question(tiny_llama(experts=experts), cluster=small_cluster(8, 2), target="megatron")
    default = default_layout(question)
    assert default is not None
    assert (default.layout.tp, default.layout.ep, default.layout.sequence_parallel) == (4, 4, True)
    assert violations(default.layout, question.rules) == ()


# ---- what follows from a plan -------------------------------------------------------------------------------


def test_what_a_stage_works_is_all_but_the_bubble_and_the_sends() -> None:
    question = small_question(devices=4)
    for layout in (Layout(dp=4), Layout(pp=2, dp=2), Layout(pp=4)):
        found = answered(question, layout)
        parts = found.prediction.breakdown_seconds
        assert max(found.stage_seconds) < found.prediction.step_seconds
        idle = parts["bubble"] + parts["pp"]
        rest = price(layout, question).step_seconds
        assert max(found.stage_seconds) == pytest.approx(found.prediction.step_seconds - idle - rest, rel=0.05)
        assert found.bubble_share == parts["bubble"] / found.prediction.step_seconds


def test_counts_come_back_from_the_stages() -> None:
    experts = Experts(number=4, top_k=2, ffn_hidden_size=64, dense_layers=2)
    question = small_question(tiny_llama(layers=5, experts=experts), target="megatron", devices=2)
    solved, _ = solve_layout(question, Layout(pp=2), "full")
    assert counts_of(question.model, stages_of(Layout(pp=2), solved.counts)) == solved.counts


def test_gpu_hours_and_what_they_cost() -> None:
    found = answered(TWO_NODES, Layout(tp=2, dp=2), 2.5)
    seconds = found.prediction.step_seconds
    assert found.gpu_hours_per_step == pytest.approx(4 * seconds / 3600)
    assert found.gpu_hours_per_billion_tokens == pytest.approx(1e9 / 128 * 4 * seconds / 3600)
    assert found.cost_per_billion_tokens == pytest.approx(2.5 * found.gpu_hours_per_billion_tokens)
    assert answered(TWO_NODES, Layout(tp=2, dp=2)).cost_per_billion_tokens is None
    assert f"${found.cost_per_billion_tokens:,.2f} per billion tokens" in text(estimate_report(found, True))


def test_what_differs() -> None:
    plan, other = Layout(dp=4, dp_shard=4, zero=1), Layout(tp=2, dp=2, sequence_parallel=True)
    assert differing(plan, other) == {"tp": 2, "dp": 2, "sequence_parallel": True, "zero": 0}
    assert differing_text(plan, other) == "tp=2 dp=2 sequence_parallel=true zero=0"
    assert differing_text(plan, replace(plan, dp_shard=2)) == "dp_shard=2"
    assert differing_text(plan, plan) == ""


# ---- assumptions --------------------------------------------------------------------------------------------


def test_nominal_figures_are_named() -> None:
    cluster = resolve_cluster("dgx-h100:2")
    hardware = load_hardware(resolve_hardware_path(cluster.hardware))
    question = small_question(resolve_model("llama3-8b"), cluster=cluster, hardware=hardware, precision="bf16")
    figures = nominal_figures(question)
    for named in ("memory bandwidth", "stragglers", "attention in bf16", "latency of network"):
        assert named in figures
    for sourced in ("GEMM in bf16", "peak FLOP/s", "compute under communication", "bandwidth of node"):
        assert sourced not in figures
    assert "slowest rank × 1.04" in assumptions(question)[0]


def test_the_imbalance_of_experts_is_stated() -> None:
    model = tiny_llama(experts=Experts(number=4, top_k=2, ffn_hidden_size=64))
    even = small_question(model, target="megatron")
    assert "the fullest expert rank gets × 1 its even share" in assumptions(even)[0]
    uneven = small_question(model, target="megatron", expert_imbalance=1.3)
    assert "the fullest expert rank gets × 1.3 its" in assumptions(uneven)[0]
    assert "a capacity of × 1.25" in assumptions(small_question(model, target="megatron", expert_capacity=1.25))[0]
    assert "expert" not in assumptions(TWO_NODES)[0]


def test_what_the_profiler_had_no_time_for_is_stated() -> None:
    hardware = TWO_NODES.hardware
    known = replace(hardware, provenance={"cases": {"left_out": {"overheads": ["messages", "chain"], "links": ["x"]}}})
    (line,) = [line for line in assumptions(replace(TWO_NODES, hardware=known)) if "no time" in line]
    assert "costs too little here: messages, chain; `cli.py profile --resume`" in line
    assert not any("no time" in line for line in assumptions(TWO_NODES))


# ---- golden -------------------------------------------------------------------------------------------------

GOLDEN_PLAN = """
tiny-llama on 4 × small, batch 8 × 16 tokens, fp32
pp2 dp2 zero1 mb4 interleaved-1f1b, 1 microbatch
2.98× faster than the default a person would write: tp2 dp2 zero1 mb1, step 21.3 ms, peak 0.4 MiB

step 7.17 ms, 4,465 tokens/s per device, 0.00115 model TFLOP/s per device, mfu 1.1%, bubble 40.9%
peak memory 0.5 MiB of 0.5 MiB per device, 4.11e-05 B parameters
7.96e-06 GPU-hours a step, 62.22 per billion tokens, $124.43 per billion tokens at $2 a GPU-hour

stages (E embedding, H head), memory in MiB of 0.5, works in a step
stage  layers    recompute  weights  optim  gather  activ  passing  context  slack  other  total    works
0         2 E  1 selective     0.04   0.08    0.08   0.20     0.03     0.01   0.02   0.01   0.47  3.06 ms
1         2 H  1 selective     0.04   0.08    0.08   0.20     0.05     0.01   0.02   0.02   0.49  3.27 ms

where the step goes
part           time  share
compute     3.09 ms  43.1%
recompute   17.4 µs   0.2%
pp           364 µs   5.1%
bubble      2.93 ms  40.9%
dp exposed   125 µs   1.7%
optimizer    641 µs   8.9%

no legal layout is faster: of 345 legal layouts 27 cannot fit, 309 have a bound above this plan, 9 were solved (8 ILPs,
HiGHS through pulp, 250 ms)

next best
layout                           step  slower by  peak memory  differs in
pp2 dp2 zero1 mb4 looped-bfs  7.17 ms      0.00%      0.5 MiB  schedule=looped-bfs
pp2 dp2 zero1 mb4 gpipe       7.18 ms      0.24%      0.5 MiB  schedule=gpipe

assumed: kernels and overlap as meshwright's; compute under communication × 1.25, communication × 1.5; slowest rank × 1
assumed: mfu counts attention in full, of which causal kernels do half
assumed: small is made up
"""


def test_the_report_of_a_plan() -> None:
    plan = search(TWO_NODES, top=3)
    plan = replace(plan, certificate=replace(plan.certificate, solve_seconds=0.25))
    shown = text(plan_report(plan, answer(TWO_NODES, plan.layout, plan.stages, plan.prediction, 2.0)))
    assert len(shown.splitlines()) <= 45
    assert shown == GOLDEN_PLAN.strip("\n")


GOLDEN_CHUNKS = """
pp2·v2 dp2 zero1 mb1 interleaved-1f1b  does not fit: 0.1 MiB over 0.5 MiB per device
1.39× faster than the default a person would write: tp2 dp2 zero1 mb1, step 20.2 ms, peak 0.5 MiB

step 14.5 ms, 2,210 tokens/s per device, 0.00084 model TFLOP/s per device, mfu 0.8%, bubble 6.8%
peak memory 0.6 MiB of 0.5 MiB per device, 5.96e-05 B parameters
1.61e-05 GPU-hours a step, 125.7 per billion tokens

stages (E embedding, H head, 2 chunks a rank), memory in MiB of 0.5, works in a step
rank   layers  recompute  weights  grads  optim  activ  passing  pipe  slack  other  total    works
0     1 E + 2       none     0.11   0.11   0.11   0.18     0.01  0.01   0.03   0.01   0.58  11.4 ms
1     2 + 1 H       none     0.11   0.11   0.11   0.15     0.01  0.01   0.03   0.01   0.56  12.1 ms

where the step goes
part           time  share
compute     9.99 ms  69.0%
pp          2.77 ms  19.1%
bubble       988 µs   6.8%
dp exposed  59.8 µs   0.4%
optimizer    672 µs   4.6%

assumed: kernels and overlap as megatron-core-2025's; compute under communication × 1.25, communication × 1.5; slowest
rank × 1
assumed: mfu counts attention in full, of which causal kernels do half
assumed: small is made up
"""


def test_the_report_of_chunks_has_a_row_a_rank() -> None:
    question = small_question(
        tiny_llama(layers=6), cluster=small_cluster(4, 2), memory_limit_bytes=5.2e5, target="megatron"
    )
    layout = Layout(pp=2, dp=2, dp_shard=2, zero=1, schedule="interleaved-1f1b", virtual_stages=2)
    solved, fits = solve_layout(question, layout, "none")
    found = answer(question, layout, stages_of(layout, solved.counts), predict(question, solved))
    assert not fits
    assert text(estimate_report(found, fits)) == GOLDEN_CHUNKS.strip("\n")


def test_of_many_ranks_the_ends_and_the_fullest_are_shown() -> None:
    model = tiny_llama(layers=30, hidden_size=256, ffn_hidden_size=512, heads=8, kv_heads=8, head_dim=32)
    question = small_question(model, devices=16, global_batch=32, sequence=512)
    found = answered(question, Layout(pp=16))
    memory = list(found.prediction.memory_bytes)
    memory[7] = {**memory[7], "activations": 9e8}
    found = replace(found, prediction=replace(found.prediction, memory_bytes=tuple(memory)))
    shown = text(stage_table(found, 1e9), 140).splitlines()
    assert len(shown) <= 14
    assert any(line.startswith("7 ") for line in shown)
    assert sum("more" in line for line in shown) >= 1
    assert shown[-1].startswith("15 ")
    told = sum(int(line.split()[1]) for line in shown if line.startswith("…"))
    assert told + sum(line[0].isdigit() for line in shown) == 16  # no two of these ranks are alike


def test_seven_causes_have_a_column_and_the_rest_are_summed() -> None:
    found = answered(TWO_NODES, Layout(tp=2, dp=2, dp_shard=2, zero=2))
    header, row = (line.split() for line in text(stage_table(found, 5.2e5), 140).splitlines()[1:3])
    assert header[-3:] == ["other", "total", "works"]
    numbers = [float(word) for word in row[-11:-2]]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.05)
    assert small_hardware().context_bytes > 0
