"""Why this plan: what binds, runners-up against brute force, what helps against searches of its own, --against."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from planner.comm_cost import Group
from planner.errors import InfeasibleError
from planner.explain import Explanation, compare, explain, tightest_link
from planner.explain_report import against_report, explain_report, parts_text
from planner.layout import Layout
from planner.plan import Plan
from planner.quantity_text import seconds_text
from planner.question import Question
from planner.search import search
from planner.sensitivity import faster_compute, relaxed_questions, wider_link, wider_points
from profiles.input_error import InputError
from profiles.points import CollectivePoint
from tests.oracles.brute_force import candidates, fastest
from tests.oracles.small_world import small_cluster, small_hardware, small_question
from tests.test_answers import TWO_NODES, text


@cache
def the_plan() -> Plan:
    return search(TWO_NODES)


@cache
def the_explanation() -> Explanation:
    return explain(TWO_NODES, the_plan())


# ---- what binds -------------------------------------------------------------------------------------------


def test_the_fullest_rank_and_its_bytes() -> None:
    totals = [sum(items.values()) for items in the_plan().prediction.memory_bytes]
    assert the_explanation().binding.memory_bytes == max(totals) == totals[the_explanation().binding.memory_rank]
    assert the_explanation().binding.limit_bytes == 5.2e5


@pytest.mark.parametrize(
    ("layout", "link", "parts"),
    [
        (Layout(tp=2, dp=2), "node", {"tp", "dp_exposed"}),  # a ring over nodes leaves each by its own link
        (Layout(dp=4, dp_shard=4, zero=3), "network", {"dp_exposed"}),
        (Layout(tp=4), "network", {"tp"}),
        (Layout(pp=4), "network", {"pp"}),
    ],
)
def test_the_link_with_the_most_exposed_seconds(layout: Layout, link: str, parts: set[str]) -> None:
    pins = {key: value for key, value in vars(layout).items() if key not in ("micro_batch", "schedule")}
    across = (1e12, 0.0) if link == "node" else (1e5, 1e-3)
    cluster = small_cluster(4, 2, inside=(1e5, 1e-3) if link == "node" else (1e12, 0.0), across=across)
    question = small_question(cluster=cluster, pins=pins)
    binding = explain(question, search(question)).binding
    assert binding.link == link
    assert set(binding.link_parts) == parts
    assert binding.link_seconds == sum(binding.link_parts.values()) > 0


def test_a_link_is_blamed_only_where_it_is_the_tightest() -> None:
    """Over 2 nodes of 2, each node's two devices lend their share of the network: twice its bandwidth."""
    group = Group(4, 1)
    for across, tier in ((0.4e9, "network"), (0.6e9, "node")):
        cluster = small_cluster(4, 2, inside=(1e9, 0.0), across=(across, 0.0))
        assert tightest_link(cluster, "all_reduce", group).tier == tier
        assert tightest_link(cluster, "all_reduce", Group(2, 2)).tier == "network"
        assert tightest_link(cluster, "send_recv", group).tier == "network"
        assert tightest_link(cluster, "all_reduce", Group(2, 1)).tier == "node"


# ---- runners-up -------------------------------------------------------------------------------------------


def test_each_runner_up_is_the_best_layout_that_differs_there() -> None:
    best = {layout: fastest(tried, 5.2e5) for layout, tried in candidates(TWO_NODES).items()}
    checked = 0
    for rival in the_explanation().rivals:
        axis, differs, _ = rival.condition.partition(" ≠ ")
        if not differs:
            continue
        others = [c for layout, c in best.items() if c and vars(layout)[axis] != vars(the_plan().layout)[axis]]
        assert rival.step_seconds == pytest.approx(min(c.step_seconds for c in others), rel=1e-6)
        checked += 1
    assert checked == 7  # tp, cp, pp, dp, zero, schedule, micro_batch


def test_the_runner_up_in_recomputation() -> None:
    assert any(stage.recompute_selective for stage in the_plan().stages)
    (rival,) = [rival for rival in the_explanation().rivals if "no recompute" in rival.condition]
    without = search(replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"recompute": "none"})))
    assert rival.step_seconds == pytest.approx(without.prediction.step_seconds, rel=1e-9)


def test_the_runner_up_of_a_plan_that_recomputes_nothing() -> None:
    question = replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"tp": 2, "dp": 2}))
    plan = search(question)
    assert all(stage.recompute_none == stage.end - stage.first for stage in plan.stages)
    (rival,) = [rival for rival in explain(question, plan).rivals if "recompute everywhere" in rival.condition]
    pinned = [replace(question.job, pins=question.job.pins | {"recompute": mode}) for mode in ("selective", "full")]
    everywhere = [search(replace(question, job=job)).prediction.step_seconds for job in pinned]
    assert min(everywhere) <= rival.step_seconds * (1 + 1e-9) <= max(everywhere) * (1 + 2e-9)


def test_the_parts_sum_to_what_a_runner_up_loses() -> None:
    for rival in the_explanation().rivals:
        assert rival.step_seconds is not None
        lost = rival.step_seconds - the_explanation().prediction.step_seconds
        assert sum(rival.more_seconds.values()) == pytest.approx(lost, abs=1e-9)
        assert lost >= -1e-9


def test_what_costs_is_told_before_what_it_saves_and_trifles_are_not() -> None:
    parts = {"bubble": 0.2, "dp_exposed": -0.5, "tp": 0.3, "pp": 1e-5, "cp": 0.0}
    assert parts_text(parts, 1.0) == "+300 ms tp, +200 ms bubble, −500 ms dp exposed"
    assert parts_text({"tp": 1e-6}, 1.0) == "next to nothing"


def test_an_axis_that_is_pinned_has_no_runner_up_and_one_that_cannot_be_says_why() -> None:
    question = small_question(devices=4, pins={"tp": 1, "zero": (0, 1)})
    conditions = [rival.condition for rival in explain(question, search(question)).rivals]
    assert not any(condition.startswith("tp") for condition in conditions)
    free = small_question(devices=4)
    recomputing = replace(free, job=replace(free.job, pins={"recompute": "full"}))  # which needs the least
    need = min(c.peak_bytes for tried in candidates(recomputing).values() for c in tried)
    tight = replace(free, job=replace(free.job, memory_limit_bytes=1.001 * need))
    plan = search(tight)
    (rival,) = [rival for rival in explain(tight, plan).rivals if rival.condition == "no recompute"]
    assert rival.layout is None
    assert "without recomputation, stage" in rival.reasons[0]


# ---- what would help -----------------------------------------------------------------------------------------


def test_each_help_is_a_search_of_the_changed_question() -> None:
    changed = dict(relaxed_questions(TWO_NODES))
    assert {each.change for each in the_explanation().helps} == set(changed)
    assert len(changed) == 5
    for each in the_explanation().helps:
        seconds = search(changed[each.change]).prediction.step_seconds
        assert each.step_seconds == pytest.approx(seconds, rel=1e-6)
        tokens = changed[each.change].job.tokens
        assert each.gain == pytest.approx(the_explanation().prediction.step_seconds / 128 * tokens / seconds - 1)
        assert each.gain >= -1e-9
    gains = {each.change: each.gain for each in the_explanation().helps}
    assert gains["device memory +10%"] > 0.004  # it recomputes to fit
    assert gains["compute +10%"] > 0.01


def test_what_is_relaxed() -> None:
    hardware = small_hardware(corrections={"gemm": 1.5})
    faster = faster_compute(hardware)
    assert faster.corrections == pytest.approx({"gemm": 1.5 / 1.1, "attention": 1 / 1.1})
    cluster = small_cluster(4, 2)
    wider = wider_link(cluster, 1)
    assert wider.links[0] == cluster.links[0]
    assert wider.links[1].bandwidth_bytes_per_second == pytest.approx(1.1e8)
    assert wider.links[1].latency_seconds == cluster.links[1].latency_seconds
    job = replace(the_plan().job, memory_limit_bytes=None)
    changed = dict(relaxed_questions(Question(the_plan().model, cluster, hardware, job)))
    assert changed["device memory +10%"].limit_bytes == pytest.approx(1.1e9)
    assert changed["global batch 16"].job.global_batch == 16


def test_measured_collectives_of_a_wider_link_keep_their_latency() -> None:
    def points(ranks: int, stride: int) -> tuple[CollectivePoint, ...]:
        of = {"operation": "all_reduce", "ranks": ranks, "stride": stride}
        return (CollectivePoint(**of, bytes=1024, seconds=1e-3), CollectivePoint(**of, bytes=1 << 20, seconds=12e-3))

    hardware = small_hardware(collectives=(*points(2, 1), *points(2, 2)))
    found = wider_points(hardware, small_cluster(4, 2), 1).collectives
    assert found[:2] == points(2, 1)  # inside a node
    assert [point.seconds for point in found[2:]] == pytest.approx([1e-3, 11e-3])


# ---- beside another layout ----------------------------------------------------------------------------------------


def test_against_is_the_best_with_those_settings() -> None:
    prediction, rival = compare(TWO_NODES, the_plan(), "tp=2,pp=2")
    wanted = search(replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"tp": 2, "pp": 2})))
    assert rival.layout == wanted.layout
    assert rival.step_seconds == wanted.prediction.step_seconds
    assert prediction.step_seconds == the_plan().prediction.step_seconds


def test_against_what_a_rule_or_the_bytes_forbid() -> None:
    _, rival = compare(TWO_NODES, the_plan(), "zero=2,pp=2")
    assert rival.layout is None
    assert any("zero 2 is zero 1 there" in reason for reason in rival.reasons)
    _, rival = compare(TWO_NODES, the_plan(), "dp=4,zero=0,recompute=none")
    assert "without recomputation, stage 0 misses 0." in rival.reasons[0]
    assert rival.reasons[0].endswith(" MiB of 0.496 MiB per device")
    shown = text(against_report(the_plan(), the_plan().prediction, rival))
    assert shown.startswith("dp=4,zero=0,recompute=none cannot be\n")


@pytest.mark.parametrize("text", ["tp=999", "tp=3|6", "tp=2,dp=4", "pp=4"])
def test_against_settings_that_do_not_fill_the_devices(text: str) -> None:
    pinned = replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"cp": 2}, bans=("dp",)))
    with pytest.raises(InputError) as caught:
        compare(pinned, the_plan(), text)
    assert (caught.value.where, caught.value.got) == ("--against", text)
    assert caught.value.expected == "tp·cp·pp·dp of 4 devices"
    typed = ", ".join(text.split(","))
    bans = "" if "dp=" in text else ", dp banned"
    assert caught.value.hint == f"what holds, with the plan's own pins and bans: cp=2, {typed}{bans}"


def test_against_overrides_the_jobs_own_pins_and_refuses_words() -> None:
    pinned = replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"tp": 2}, bans=("pp",)))
    _, rival = compare(pinned, search(pinned), "tp=1,pp=2")
    assert rival.layout is not None
    assert (rival.layout.tp, rival.layout.pp) == (1, 2)
    for wrong in ("", "tpp=2", "tp"):
        with pytest.raises(InputError) as caught:
            compare(TWO_NODES, the_plan(), wrong)
        assert caught.value.where == "--against"


# ---- plans that are not the best ------------------------------------------------------------------------------


def test_a_plan_that_is_beaten_says_by_what() -> None:
    slower = search(replace(TWO_NODES, job=replace(TWO_NODES.job, pins={"pp": 4})))
    edited = replace(slower, job=TWO_NODES.job)
    found = explain(TWO_NODES, edited)
    assert found.faster is not None
    assert found.faster.layout == the_plan().layout
    assert "another layout is " in text(explain_report(found))
    assert the_explanation().faster is None


def test_a_profile_that_has_changed_is_said() -> None:
    stale = replace(
        the_plan(), prediction=replace(the_plan().prediction, step_seconds=2 * the_plan().prediction.step_seconds)
    )
    found = explain(TWO_NODES, stale)
    assert found.prediction.step_seconds == the_plan().prediction.step_seconds
    stated = seconds_text(2 * the_plan().prediction.step_seconds)
    assert f"the file says {stated}: profile or stages have changed" in text(explain_report(found))
    nowhere = replace(TWO_NODES, job=replace(TWO_NODES.job, memory_limit_bytes=1e4))
    with pytest.raises(InfeasibleError):
        explain(nowhere, the_plan())


# ---- text -----------------------------------------------------------------------------------------------------

GOLDEN_EXPLAIN = """
pp2 dp2 zero1 mb4 interleaved-1f1b, step 7.17 ms, tiny-llama on 4 × small

what binds
memory  rank 1 holds 0.5 MiB, 99.7% of the limit (0.0 MiB free): activations 0.2 MiB, optimizer 0.1 MiB, gathered
weights 0.1 MiB
        and recomputing to fit takes 17.4 µs, 0.2% of the step
links   network carries the most exposed seconds: 364 µs, 5.1% of the step (pp 364 µs)
bubble  2.93 ms, 40.9% of the step

the best otherwise, and why it loses
if                              step  slower by  layout                                 because of
schedule ≠ interleaved-1f1b  7.17 ms      0.00%  pp2 dp2 zero1 mb4 looped-bfs           next to nothing
zero ≠ 1                     7.19 ms      0.30%  pp2 dp2 zero3 mb4 gpipe                +21.6 µs dp exposed
no recompute                 7.87 ms      9.82%  pp2·v2 dp2 zero3 mb4 looped-bfs        +728 µs pp, +21.6 µs dp exposed,
                                                                                        +20 µs compute, −47.8 µs bubble
tp ≠ 1, pp ≠ 2               7.88 ms     10.01%  tp2·sp dp2 zero3 mb4                   +2.44 ms compute, +1.07 ms dp
                                                                                        exposed, +518 µs tp, −2.93 ms
                                                                                        bubble
micro_batch ≠ 4              8.45 ms     17.96%  pp2·v2 dp2 zero1 mb2 interleaved-1f1b  +2.42 ms compute, +482 µs pp,
                                                                                        −1.62 ms bubble
dp ≠ 2                       8.67 ms     20.98%  tp2·sp pp2 mb8 gpipe                   +751 µs bubble, +496 µs compute,
                                                                                        +374 µs tp, −125 µs dp exposed
cp ≠ 1                       21.9 ms    205.69%  cp2·ring pp2·v2 zero1 mb1 zbv          +17.2 ms compute, +524 µs cp,
                                                                                        −2.93 ms bubble, −52.7 µs pp

what would help, solved anew
change                     step  more tokens/s  layout then
global batch 16         10.9 ms        +31.01%  tp2 dp2 zero2 mb8 (tp=2 pp=1 zero=2 micro_batch=8 schedule=1f1b)
compute +10%            6.65 ms         +7.83%  the same
device memory +10%      7.13 ms         +0.49%  the same
network bandwidth +10%  7.15 ms         +0.21%  the same
node bandwidth +10%     7.16 ms         +0.09%  the same
"""


def test_the_report_of_an_explanation() -> None:
    assert text(explain_report(the_explanation())) == GOLDEN_EXPLAIN.strip("\n")


GOLDEN_AGAINST = """
pp2 dp2 zero1 mb4 interleaved-1f1b beside the best with tp=2,pp=2: tp2·sp pp2 mb8 gpipe
differs in tp=2 dp=1 sequence_parallel=true zero=0 micro_batch=8 schedule=gpipe
part            plan  tp=2,pp=2  difference  of the step
compute      3.09 ms    3.59 ms     +496 µs        +6.9%
recompute    17.4 µs    23.9 µs    +6.55 µs        +0.1%
tp              0 ms     374 µs     +374 µs        +5.2%
pp            364 µs     364 µs        0 ms        +0.0%
bubble       2.93 ms    3.68 ms     +751 µs       +10.5%
dp exposed    125 µs       0 ms     −125 µs        -1.7%
optimizer     641 µs     642 µs   +0.384 µs        +0.0%
step         7.17 ms    8.67 ms     +1.5 ms       +21.0%
peak memory  0.5 MiB    0.5 MiB
"""


def test_the_report_of_a_comparison() -> None:
    assert text(against_report(the_plan(), *compare(TWO_NODES, the_plan(), "tp=2,pp=2"))) == GOLDEN_AGAINST.strip("\n")
