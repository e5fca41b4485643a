"""How long how many stages work, and what ranks that share cores gain by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.contention import Pace, least_pace, ranks_at_work, shares_with_stages, stages_at_work, with_ranks_at_work
from planner.layout import Layout
from planner.schedule import Pipeline
from planner.simulation import StageSeconds
from planner.step_cost import CostModel
from profiles.points import ContentionPoint, GemmPoint, MemoryPoint
from tests.oracles.small_world import small_hardware, small_question

EACH = StageSeconds(1.0, 1.0, 1.0)
TWO_CORES = tuple(ContentionPoint(active=n, slowdown=max(1.0, n / 2)) for n in (1, 2, 4))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (3, 5), (4, 4), (4, 9)])
def test_whole_backwards_of_one_chunk_work_as_in_the_figure(schedule: str, ranks: int, microbatches: int) -> None:
    """Of M + p - 1 slots, slot t has min(t + 1, p, M, M + p - 1 - t) stages at work (arXiv 2104.04473, figure 3)."""
    slots = microbatches + ranks - 1
    each = [min(t + 1, ranks, microbatches, slots - t) for t in range(slots)]
    expected = [each.count(stages) / slots for stages in range(ranks + 1)]
    pipeline = Pipeline(schedule, ranks, 1, microbatches)
    assert stages_at_work(pipeline, [EACH] * ranks) == pytest.approx(expected)


def test_chunks_and_split_backwards_leave_less_idle() -> None:
    """Two ranks, two microbatches: 2/3 of a step of one chunk has an idle rank, 2/5 of one of two chunks."""
    idle = [
        stages_at_work(Pipeline(schedule, 2, chunks, 2), [EACH] * 2 * chunks)[1]
        for schedule, chunks in (("gpipe", 1), ("interleaved-1f1b", 2), ("zb1p", 2))
    ]
    assert idle == pytest.approx([2 / 3, 2 / 5, 2 / 13])


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline("1f1b", 4, 1, 80),
        Pipeline("interleaved-1f1b", 2, 3, 48),
        Pipeline("zb1p", 4, 2, 64),
        Pipeline("zbv", 4, 2, 50),
        Pipeline("dualpipev", 2, 2, 40),
    ],
    ids=str,
)
def test_many_microbatches_are_not_played_one_by_one(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [EACH] * pipeline.stages
    few = stages_at_work(pipeline, durations)
    monkeypatch.setattr("planner.contention._ROUNDS", 1000)
    assert few == pytest.approx(stages_at_work(pipeline, durations), abs=1e-12)
    assert sum(few) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("layout", "microbatches", "expected"),
    [
        (Layout(pp=4, schedule="gpipe"), 1, {1: 1.0}),  # one rank at a time
        (Layout(pp=2, tp=2, schedule="gpipe"), 1, {2: 1.0}),
        (Layout(pp=2, dp=2), 2, {2: 2 / 3, 4: 1 / 3}),
        (Layout(pp=8, schedule="gpipe"), 1, {0.5: 1.0}),  # two nodes of four
    ],
    ids=["chain", "chain-tp2", "two-stages", "two-nodes"],
)
def test_a_stage_in_its_bubble_leaves_its_cores(
    layout: Layout, microbatches: int, expected: dict[float, float]
) -> None:
    hardware = small_hardware(contention_points=TWO_CORES)
    assert shares_with_stages(hardware, layout)
    found = ranks_at_work(hardware, layout, layout.pipeline(microbatches), [EACH] * layout.stages)
    assert dict(found) == pytest.approx(expected)


def test_who_shares_with_other_stages() -> None:
    assert not shares_with_stages(small_hardware(contention_points=TWO_CORES), Layout(dp=4))
    assert not shares_with_stages(small_hardware(), Layout(pp=4))
    # What is shared is shared by fewer than a stage has ranks.
    assert not shares_with_stages(small_hardware(contention_points=TWO_CORES[:2]), Layout(pp=2, dp=2))


def test_each_kind_of_kernel_gains_what_it_was_measured_to() -> None:
    """Of four ranks on two cores two take half of the seconds, and a sixth of those with 16 MB each."""
    memory = [ContentionPoint(active=n, memory_bytes=2**24, slowdown=s) for n, s in ((1, 1.0), (2, 1.5), (4, 9.0))]
    small = [replace(point, memory_bytes=2**16) for point in TWO_CORES]
    sums = [
        MemoryPoint(dtype="fp32", operation="residual", direction="forward", elements=n, seconds=n * 1e-9)
        for n in (2**14, 2**22)
    ]
    gemm = [
        GemmPoint(dtype="fp32", operation="forward", m=64, n=64, k=64, seconds=1e-5),
        GemmPoint(dtype="fp32", operation="forward", m=64, n=64, k=128, seconds=2e-5),
    ]
    whole = small_hardware(
        contention_points=(*TWO_CORES, *small, *memory), memory=tuple(sums), gemm=tuple(gemm), launch_seconds=1e-6
    )
    halved = with_ranks_at_work(whole, 2, of=4)
    assert halved.gemm_seconds("forward", "fp32", 64, 64, 64) == pytest.approx(0.5e-5)
    assert halved.memory_seconds("residual", "fp32", 2**14) == pytest.approx(2**14 * 1e-9 / 2)
    assert halved.memory_seconds("residual", "fp32", 2**22) == pytest.approx(2**22 * 1e-9 / 6)
    assert halved.launch_seconds == pytest.approx(0.5e-6)
    modelled = with_ranks_at_work(small_hardware(contention_points=TWO_CORES), 1, of=4)
    models = zip(modelled.gemm_models, small_hardware().gemm_models, strict=True)
    assert [now.achievable_flops_per_second for now, _ in models] == pytest.approx(
        [2 * model.achievable_flops_per_second for model in small_hardware().gemm_models]
    )
    assert with_ranks_at_work(whole, 4, of=4) == whole


def test_what_a_stage_sends_gains_nothing_from_idle_cores() -> None:
    """Its compute does."""
    question = small_question(devices=4, hardware=small_hardware(contention_points=TWO_CORES))
    prices = CostModel(question.model, question.cluster, question.hardware, question.job)
    layout = Layout(tp=2, pp=2, schedule="gpipe", micro_batch=4)
    (paced,) = prices.price_seconds(layout).segments
    (measured,) = prices.price_seconds(layout, pace=Pace()).segments
    assert paced.seconds.forward.compute < 0.9 * measured.seconds.forward.compute
    assert paced.seconds.forward.tp == measured.seconds.forward.tp > 0.0


def test_the_least_pace_is_below_each() -> None:
    """Of both as much as possible of the work is done with few ranks."""
    paces = [Pace(1.1, ((1.0, 0.5), (4.0, 0.5))), Pace(1.0, ((2.0, 0.75), (4.0, 0.25)))]
    least = least_pace(paces)
    assert least.slowest == 1.0
    assert dict(least.working) == pytest.approx({1.0: 0.5, 2.0: 0.25, 4.0: 0.25})
    assert least_pace(paces[:1]) == paces[0]
