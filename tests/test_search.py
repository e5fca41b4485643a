"""The whole search: golden answers, certificate, runners-up, time limits, and why there is no plan."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.assignment import stages_of
from planner.errors import InfeasibleError, NoPlanError, UnsupportedError
from planner.layout import Layout
from planner.question import Question
from planner.search import check_supported, search, solve_layout
from planner.space import enumerate_layouts
from planner.stage_ilp import RELATIVE_TOLERANCE
from planner.step_cost import CostModel
from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.experts_spec import Experts
from profiles.hardware import load_hardware
from tests.oracles.brute_force import Candidate, candidates, fastest
from tests.oracles.small_world import counts, small_cluster, small_hardware, small_question
from tests.plans import tiny_bert, tiny_gpt2, tiny_llama

ROOT = Path(__file__).parent.parent


Tried = dict[Layout, list[Candidate]]


@pytest.fixture(scope="module")
def on_four() -> Tried:
    """Everything that there is to try of `small_question(devices=4)`, which is the same whatever its memory limit."""
    return candidates(small_question(devices=4))


def least_need(tried: Tried) -> float:
    return min(c.peak_bytes for of_layout in tried.values() for c in of_layout)


# ---- golden ----------------------------------------------------------------------------------------------


def test_gpt3_on_a_thousand_a100_is_proven_in_seconds_and_without_torch() -> None:
    code = """
import sys
from planner.job import TrainingJob
from planner.search import Question, search
from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.hardware import load_hardware
cluster = resolve_cluster("dgx-a100:128")
hardware = load_hardware(resolve_hardware_path(cluster.hardware))
job = TrainingJob(global_batch=1536, sequence=2048, precision="bf16")
plan = search(Question(resolve_model("gpt3-175b"), cluster, hardware, job))
c = plan.certificate
assert c.layouts_pruned_memory + c.layouts_pruned_bound < c.layouts_legal
assert c.bound_seconds == c.objective_seconds == plan.prediction.step_seconds
print(c.gap, c.layouts_legal, plan.layout.world_size, plan.prediction.peak_memory_bytes <= cluster.memory_bytes)
print(c.solve_seconds < 60, 0.3 < plan.prediction.mfu < 0.86)
print(sorted(name for name in ("torch", "networkx", "numpy.testing", "runtime") if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("0.0 238738 1024 True\nTrue True\n[]\n", "")


def catalogue_question(model: str, cluster: str, **job: Any) -> Question:
    found = resolve_cluster(cluster)
    hardware = load_hardware(resolve_hardware_path(found.hardware))
    question = small_question(resolve_model(model), cluster=found, hardware=hardware)
    return replace(question, job=replace(question.job, **({"precision": "bf16", "sequence": 2048} | job)))


def test_a_small_model_on_one_node_is_data_parallel() -> None:
    """GPT-2 of 124 M on 8 A100: a copy each and no pipeline is what anybody would do."""
    plan = search(catalogue_question("gpt2", "dgx-a100", global_batch=64, sequence=1024))
    assert (plan.layout.dp, plan.layout.tp, plan.layout.pp) == (8, 1, 1)
    assert plan.certificate.gap == 0.0


def test_across_a_slow_network_go_only_the_boundaries_of_a_pipeline() -> None:
    """Two nodes of 4, links between them 100,000 times slower: neither tp nor dp may span both."""
    question = small_question(
        tiny_llama(layers=8, hidden_size=256, ffn_hidden_size=512, heads=8, head_dim=32),
        cluster=small_cluster(8, 2, inside=(1e11, 1e-7), across=(1e6, 1e-7)),
        hardware=small_hardware(flops=1e11, overlap_compute_slowdown=2.0, overlap_communication_slowdown=2.0),
        global_batch=32,
    )
    layout = search(question).layout
    assert layout.pp > 1
    assert layout.tp * layout.dp <= 4
    # With one kind of link a pipeline is not worth its bubble.
    fast = replace(question, cluster=small_cluster(8, 1, inside=(1e11, 1e-7)))
    assert search(fast).layout.pp == 1


def test_less_memory_means_recomputation_or_sharding_and_more_seconds() -> None:
    free = search(small_question(devices=4))
    tight = search(small_question(devices=4, memory_limit_bytes=0.6 * free.prediction.peak_memory_bytes))
    assert tight.prediction.step_seconds > free.prediction.step_seconds
    assert tight.prediction.peak_memory_bytes <= 0.6 * free.prediction.peak_memory_bytes


def test_the_same_question_has_the_same_answer() -> None:
    question = small_question(tiny_gpt2(), devices=4, memory_limit_bytes=3e5)
    one, two = search(question), search(question)
    assert replace(one.certificate, solve_seconds=0.0) == replace(two.certificate, solve_seconds=0.0)
    assert replace(one, certificate=two.certificate) == two


# ---- what the plan says ----------------------------------------------------------------------------------


def test_figures_of_the_prediction() -> None:
    question = small_question(devices=4, global_batch=8, sequence=16)
    prediction = search(question).prediction
    seconds = prediction.step_seconds
    assert prediction.tokens_per_second_per_device == pytest.approx(8 * 16 / seconds / 4)
    flops = question.model.step_flops(8, 16) / seconds / 4
    assert prediction.model_tflops_per_device == pytest.approx(flops / 1e12)
    assert prediction.mfu == pytest.approx(flops / 1e11)
    assert prediction.peak_memory_bytes == pytest.approx(max(sum(m.values()) for m in prediction.memory_bytes))


def test_counts_become_ranges_of_blocks() -> None:
    stages = stages_of(Layout(pp=3), counts((0, 0), (2, 1), (1, 0)))
    assert [(s.rank, s.first, s.end, s.embedding, s.head, s.recompute_none, s.recompute_full) for s in stages] == [
        (0, 0, 0, True, False, 0, 0),
        (1, 0, 3, False, False, 2, 1),
        (2, 3, 4, False, True, 1, 0),
    ]
    assert [stages[1].recompute_mode(block) for block in range(3)] == ["full", "none", "none"]


@pytest.mark.parametrize("share", [None, 1.05])
def test_runners_up_are_the_next_best_layouts(share: float | None, on_four: Tried) -> None:
    question = small_question(devices=4)
    if share is not None:
        question = replace(question, job=replace(question.job, memory_limit_bytes=share * least_need(on_four)))
    best = [fastest(of_layout, question.limit_bytes) for of_layout in on_four.values()]
    ranked = sorted((c for c in best if c is not None), key=lambda c: c.step_seconds)
    top = min(6, len(ranked))
    plan = search(question, top=6)
    steps = [plan.prediction.step_seconds, *(other.step_seconds for other in plan.alternatives)]
    assert steps == pytest.approx([c.step_seconds for c in ranked[:top]], rel=1e-6)
    assert plan.certificate.gap == 0.0
    layouts = [plan.layout, *(other.layout for other in plan.alternatives)]
    assert len(set(layouts)) == top
    for other in plan.alternatives:
        assert other.peak_memory_bytes <= question.limit_bytes * (1 + 1e-9)


def test_of_a_masked_language_model_too_the_plan_is_the_best_there_is() -> None:
    question = small_question(tiny_bert(layers=2), devices=4)
    tried = [candidate for of_layout in candidates(question).values() for candidate in of_layout]
    peaks, found = sorted({candidate.peak_bytes for candidate in tried}), set[Layout]()
    for share in (0.0, 0.1, 0.3, 1.0):
        limit = peaks[int(share * (len(peaks) - 1))]
        plan, best = (
            search(replace(question, job=replace(question.job, memory_limit_bytes=limit))),
            fastest(tried, limit),
        )
        assert best is not None
        assert plan.certificate.objective_seconds == pytest.approx(best.step_seconds, rel=1e-6)
        found.add(plan.layout)
    assert len(found) == 4


def test_one_layout_can_be_priced_whether_it_fits_or_not(on_four: Tried) -> None:
    question = small_question(devices=4, memory_limit_bytes=1.2e6)
    for layout in (Layout(dp=4), Layout(pp=4), Layout(tp=2, pp=2)):
        solved, fitted = solve_layout(question, layout, None)
        best = fastest(on_four[layout], question.limit_bytes)
        assert fitted == (best is not None)
        wanted = best or fastest(on_four[layout], float("inf"))
        assert wanted is not None
        assert solved.step_seconds == pytest.approx(wanted.step_seconds, rel=1e-6)
        assert solved.peak_memory_bytes == max(m.total for m in solved.costs.memory(solved.counts))
    assert not solve_layout(replace(question, job=replace(question.job, memory_limit_bytes=10.0)), Layout(dp=4), None)[
        1
    ]


# ---- time limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1])
def test_a_time_limit_leaves_a_valid_plan_and_an_honest_gap(seconds: float) -> None:
    question = small_question(tiny_llama(layers=6), devices=8, memory_limit_bytes=6e5, global_batch=16)
    best = search(question).prediction.step_seconds
    plan = search(question, time_limit_seconds=seconds)
    certificate = plan.certificate
    assert certificate.objective_seconds == plan.prediction.step_seconds >= best * (1 - RELATIVE_TOLERANCE)
    assert certificate.bound_seconds <= best * (1 + RELATIVE_TOLERANCE)
    assert certificate.gap == pytest.approx(certificate.objective_seconds / certificate.bound_seconds - 1)
    assert plan.prediction.peak_memory_bytes <= 6e5 * (1 + 1e-9)


def test_out_of_time_is_not_out_of_memory(on_four: Tried) -> None:
    question = small_question(devices=4)
    question = replace(question, job=replace(question.job, memory_limit_bytes=1.01 * least_need(on_four)))
    assert search(question).certificate.gap == 0.0
    try:
        search(question, time_limit_seconds=0.0)  # a plan, or an error that says that the time is up
    except InfeasibleError as error:
        pytest.fail(f"it fits, and yet: {error}")
    except NoPlanError:
        pass


# ---- why there is no plan --------------------------------------------------------------------------------


def refused(question: Question) -> tuple[str, tuple[str, ...]]:
    with pytest.raises((InfeasibleError, UnsupportedError)) as caught:
        search(question)
    return caught.value.what, caught.value.lines


def test_what_the_target_cannot_train_is_named() -> None:
    assert refused(small_question(precision="fp16", target="torchtitan")) == (
        "the torchtitan runtime does not train in fp16 today",
        ("it trains in fp32 and bf16 and fp8: --precision fp8",),
    )
    only_fp32 = small_hardware(gemm_models=small_hardware().gemm_models[:1])
    assert refused(small_question(precision="bf16", hardware=only_fp32)) == (
        "the hardware profile small has no figures for bf16",
        ("it has figures for fp32: --precision fp32 (among Megatron's flags: no --bf16)",),
    )
    check_supported(small_question(precision="bf16"))


def test_no_legal_layout_names_the_rules() -> None:
    what, lines = refused(small_question(tiny_llama(layers=1), devices=7, global_batch=3))
    assert what == "no legal layout of tiny-llama on 7 devices"
    assert lines[0] == "dp7 zero0 mb1: global batch 3 is not a multiple of micro_batch·dp = 1·7 = 7"
    assert "tp7 mb1: tp=7 does not divide 4 attention heads" in lines


def test_a_pin_that_forbids_everything_is_named() -> None:
    what, lines = refused(small_question(devices=4, pins={"tp": 3}))
    assert what == "no legal layout of tiny-llama on 4 devices"
    assert lines[-1] == "pinned: tp=3"


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_when_nothing_fits_the_closest_layout_and_what_it_misses_are_named(share: float) -> None:
    """Large enough for GiB to show; zero 0 alone, where every block recomputed is the least."""
    model = tiny_llama(hidden_size=4096, ffn_hidden_size=16384, heads=32, head_dim=128, kv_heads=32, vocab_size=32000)
    question = small_question(model, devices=2, sequence=1024, pins={"pp": 1})
    need = least_need(candidates(question))
    question = replace(question, job=replace(question.job, memory_limit_bytes=share * need))
    what, lines = refused(question)
    assert what == "nothing fits: tiny-llama on 2 devices"
    legal = len(list(enumerate_layouts(question.rules)))
    assert lines[0].startswith(f"the closest of {legal} layouts is ")
    missing = (1 - share) * need
    shown = f"{missing / 2**30:.2f} GiB" if missing >= 2**30 else f"{missing / 2**20:.3f} MiB"
    assert f"misses {shown} of {share * need / 2**30:.2f} GiB per device" in lines[0]


def test_no_remedy_is_offered_that_does_not_work() -> None:
    question = small_question(devices=4, pins={"tp": 1, "zero": 0, "pp": 1})
    question = replace(question, job=replace(question.job, memory_limit_bytes=0.95 * least_need(candidates(question))))
    _, lines = refused(question)
    offered = [line for line in lines if line.startswith("  without --pin ")]
    assert offered
    for line in offered:
        key = line.removeprefix("  without --pin ").split("=")[0]
        kept = {k: v for k, v in question.job.pins.items() if k != key}
        assert search(replace(question, job=replace(question.job, pins=kept))).certificate.gap == 0.0


# ---- found wrong once ----------------------------------------------------------------------------------------


def test_a_profile_without_the_peak_of_the_precision() -> None:
    hardware = small_hardware(peak_flops_per_second={"bf16": 2e11})
    with pytest.raises(UnsupportedError):
        search(small_question(hardware=hardware))


def test_a_recompute_mode_that_the_runtime_does_not_run_is_refused() -> None:
    experts = Experts(number=4, top_k=2, ffn_hidden_size=16)
    with pytest.raises((UnsupportedError, InfeasibleError)):
        search(small_question(tiny_llama(experts=experts), pins={"recompute": "selective"}))


def test_a_layout_is_priced_as_in_the_search() -> None:
    question = small_question(devices=4)
    plan = search(question)
    costs = CostModel(question.model, question.cluster, question.hardware, question.job).price(plan.layout)
    held = counts(*((stage.recompute_none, stage.recompute_full) for stage in plan.stages))
    assert costs.step(held) == plan.prediction.step_seconds


def test_a_pinned_recomputation_that_the_pinned_schedule_cannot_run_is_no_lack_of_memory() -> None:
    pins = {"recompute": "selective", "schedule": "zbv", "pp": 4}
    what, lines = refused(small_question(devices=4, target="torchtitan", pins=pins))
    assert what == "no legal layout of tiny-llama on 4 devices"
    assert any("recompute=selective with zbv: torch" in line for line in lines)
    assert lines[-1] == "pinned: recompute=selective, schedule=zbv, pp=4"
