"""Action lists against torch's own, what torch refuses, and in-flight vectors against the lists."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.in_flight import InFlight, held_by_torch, in_flight, input_halves, least_in_flight, least_of_any
from planner.layout import SCHEDULES
from planner.schedule import SPLIT_BACKWARD, Pipeline, action_lists, why_illegal
from tests.oracles.torch_lists import LISTED, torch_lists, torch_schedule

CHUNKS = {"gpipe": (1,), "1f1b": (1,), "zbv": (2,), "dualpipev": (2,)}
SMALL = [
    Pipeline(schedule, ranks, chunks, microbatches)
    for schedule in SCHEDULES
    for ranks in (1, 2, 3, 4)
    for chunks in CHUNKS.get(schedule, (1, 2, 3, 4))
    for microbatches in (1, 2, 3, 4, 6, 8, 9, 12)
]
LEGAL = [pipeline for pipeline in SMALL if why_illegal(pipeline) is None]


def text(pipeline: Pipeline) -> list[str]:
    return [" ".join(map(str, actions)) for actions in action_lists(pipeline)]


@st.composite
def pipelines(draw: st.DrawFn, most_microbatches: int = 24) -> Pipeline:
    schedule = draw(st.sampled_from(SCHEDULES))
    chunks = draw(st.sampled_from(CHUNKS.get(schedule, (1, 2, 3, 4))))
    ranks = draw(st.integers(1, 6))
    legal = [
        pipeline
        for microbatches in range(1, most_microbatches + 1)
        if why_illegal(pipeline := Pipeline(schedule, ranks, chunks, microbatches)) is None
    ]
    return draw(st.sampled_from(legal))


# ---- lists -----------------------------------------------------------------------------------------------


def test_the_lists_as_text() -> None:
    assert text(Pipeline("gpipe", 2, 1, 3)) == ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]
    assert text(Pipeline("1f1b", 3, 1, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    assert text(Pipeline("1f1b", 1, 1, 3)) == ["0F0 0B0 0F1 0B1 0F2 0B2"]
    assert text(Pipeline("zb1p", 2, 1, 3)) == [
        "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]
    assert text(Pipeline("dualpipev", 1, 2, 2)) == ["0F0 1F0 0F1 1B0 (1F1;0B0)OVERLAP_F_B 1B1 0I1 0W1"]


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "1f1b"])
def test_the_lists_are_torchs_and_so_is_what_is_refused(schedule: str) -> None:
    for pipeline in SMALL:
        if pipeline.schedule != schedule:
            continue
        if why_illegal(pipeline) is None:
            assert [actions.split() for actions in text(pipeline)] == torch_lists(pipeline), pipeline
        else:
            with pytest.raises(ValueError, match="requires"):
                torch_schedule(pipeline)


@pytest.mark.parametrize(("schedule", "chunks"), [("interleaved-1f1b", 4), ("zb1p", 2), ("zbv", 2), ("dualpipev", 2)])
def test_the_lists_of_eight_ranks_are_what_get_schedule_ops_gives(schedule: str, chunks: int) -> None:
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    from tests.oracles.torch_lists import TORCH_NAMES

    ops = get_schedule_ops(TORCH_NAMES[schedule], 8, 32, num_stages_per_rank=chunks)
    theirs = [" ".join(str(action) for action in actions if action is not None) for actions in ops]
    assert text(Pipeline(schedule, 8, chunks, 32)) == theirs


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (3, 4), (4, 9), (8, 16)])
def test_torchs_1f1b_is_ours_but_for_its_last_stage(ranks: int, microbatches: int) -> None:
    """torch 2.13 numbers the last stage's forwards from 1, which its own validator refuses.

    When this fails because the lists have become equal, torch has mended it: compare 1f1b as the others are.
    """
    ours, theirs = [actions.split() for actions in text(Pipeline("1f1b", ranks, 1, microbatches))], None
    theirs = torch_lists(Pipeline("1f1b", ranks, 1, microbatches))
    assert ours[:-1] == theirs[:-1]
    last = ranks - 1
    assert ours[-1] != theirs[-1]
    mended = [f"{last}F{int(word.split('F')[1]) - 1}" if "F" in word else word for word in theirs[-1]]
    assert mended == ours[-1]


def test_every_action_is_there_once_and_in_an_order_that_can_run() -> None:
    for pipeline in LEGAL:
        split = pipeline.schedule in SPLIT_BACKWARD
        for rank, actions in enumerate(action_lists(pipeline)):
            parts = [part for action in actions for part in action.parts or (action,)]
            place = {(part.stage, part.kind, part.microbatch): n for n, part in enumerate(parts)}
            assert len(place) == len(parts)
            assert {part.stage for part in parts} == set(pipeline.stages_of(rank))
            for stage in pipeline.stages_of(rank):
                for i in range(pipeline.microbatches):
                    whole, first, second = (place.get((stage, kind, i)) for kind in "BIW")
                    begin = whole if whole is not None else first
                    assert begin is not None
                    assert place[stage, "F", i] < begin
                    assert (first is None) == (second is None) == (whole is not None)
                    assert first is None or (split and second is not None and first < second)


def test_where_stages_lie() -> None:
    loop, v = Pipeline("interleaved-1f1b", 3, 2, 6), Pipeline("zbv", 3, 2, 6)
    assert [loop.rank_of(stage) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [v.rank_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert (loop.stages_of(1), v.stages_of(1)) == ((1, 4), (1, 4))
    assert (loop.stages_of(0), v.stages_of(0)) == ((0, 3), (0, 5))


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        (Pipeline("gpipe", 4, 2, 8), "gpipe runs one chunk a pipeline rank, and virtual_stages=2"),
        (Pipeline("zbv", 4, 3, 8), "zbv runs exactly 2 chunks a pipeline rank, and virtual_stages=3"),
        (Pipeline("1f1b", 4, 1, 3), "1f1b with 3 microbatches and pp=4: torch runs it only with at least as many"),
        (Pipeline("dualpipev", 4, 2, 7), "dualpipev with 7 microbatches and pp=4: it needs at least as many"),
        (Pipeline("zb1p", 4, 1, 9), "zb1p with 9 microbatches and pp=4 runs in 2 rounds, and 2 does not divide 9"),
    ],
)
def test_a_refusal_says_the_numbers(pipeline: Pipeline, words: str) -> None:
    assert (why_illegal(pipeline) or "").startswith(words)


# ---- in flight -------------------------------------------------------------------------------------------


def test_in_flight_closed_forms() -> None:
    """GPipe holds all, 1F1B min(M, p-r); interleaved its (v-1)·p + 2(p-1-r) warm-up forwards and one.

    ZB1P on one chunk: p-r forwards held whole, r more for their weights alone; p in all on each rank.
    """
    assert in_flight(Pipeline("gpipe", 3, 1, 7)) == ((InFlight((7,), (0,)),),) * 3
    assert in_flight(Pipeline("looped-bfs", 3, 2, 7)) == ((InFlight((7, 7), (0, 0)),),) * 3
    for ranks, count in [(1, 1), (4, 4), (5, 20), (64, 512)]:
        held = [moments[0].full[0] for moments in in_flight(Pipeline("1f1b", ranks, 1, count))]
        assert held == [min(count, ranks - rank) for rank in range(ranks)]
    for ranks, chunks in [(4, 2), (8, 3), (64, 4)]:
        vectors = in_flight(Pipeline("interleaved-1f1b", ranks, chunks, 4 * ranks))
        for rank, moments in enumerate(vectors):
            most = (chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1
            assert max(sum(moment.full) for moment in moments) == most
    for rank, moments in enumerate(in_flight(Pipeline("zb1p", 8, 1, 64), part_of_full=True)):
        assert moments == (InFlight((8 - rank,), (rank,)),)


def moments_of(pipeline: Pipeline, rank: int) -> set[InFlight]:
    """What is in flight before and after each action, counted from the list and nothing else."""
    chunk = {stage: n for n, stage in enumerate(pipeline.stages_of(rank))}
    full, weight_only = [0] * pipeline.chunks, [0] * pipeline.chunks
    seen = set()
    for action in action_lists(pipeline)[rank]:
        for part in action.parts or (action,):
            full[chunk[part.stage]] += part.kind == "F"
            seen.add(InFlight(tuple(full), tuple(weight_only)))
            full[chunk[part.stage]] -= part.kind in "BI"
            weight_only[chunk[part.stage]] += (part.kind == "I") - (part.kind == "W")
            seen.add(InFlight(tuple(full), tuple(weight_only)))
    assert not any(full + weight_only)
    return seen


def weight(moment: InFlight, weights: Sequence[int]) -> int:
    return sum(map(int.__mul__, moment.full + moment.weight_only, weights))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pipelines(most_microbatches=40), st.booleans(), st.randoms(use_true_random=False))
def test_no_moment_of_a_list_weighs_more_than_the_vectors(
    pipeline: Pipeline, part_of_full: bool, random: Random
) -> None:
    for rank, vectors in enumerate(in_flight(pipeline, part_of_full)):
        seen = moments_of(pipeline, rank)
        assert set(vectors) <= seen
        for _ in range(5):
            held = [random.randint(0, 20) for _ in range(pipeline.chunks)]
            kept = [random.randint(0, most) if part_of_full else random.randint(0, 20) for most in held]
            weights = held + kept
            assert max(weight(v, weights) for v in vectors) == max(weight(moment, weights) for moment in seen)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pipelines(most_microbatches=40))
def test_input_halves_begun_by_the_first_after_the_last_forward(pipeline: Pipeline) -> None:
    """As counted in the whole list; the halves of a first stage are counted too."""
    assume(pipeline.schedule in SPLIT_BACKWARD)
    for rank in range(pipeline.ranks):
        counts = input_halves(pipeline, rank)
        whole = "".join(part.kind for action in action_lists(pipeline)[rank] for part in action.parts or (action,))
        end = whole.find("I", whole.rindex("F")) + 1 or whole.rindex("F")
        assert sum(counts) == whole[:end].count("I")
        stages = [part.stage for action in action_lists(pipeline)[rank] for part in action.parts or (action,)]
        for stage, number in zip(pipeline.stages_of(rank), counts, strict=True):
            assert number == sum(s == stage and kind == "I" for s, kind in zip(stages[:end], whole, strict=False))


def test_on_torchs_first_stage_all_stays_until_the_weights_half() -> None:
    pipeline = Pipeline("zbv", 4, 2, 16)
    first, *others = held_by_torch(pipeline)
    assert others == list(in_flight(pipeline)[1:])
    assert all(moment.weight_only[0] == 0 for moment in first)
    for moment in in_flight(pipeline)[0]:
        both = moment.full[0] + moment.weight_only[0]
        assert any(other.full[0] >= both and other.full[1:] >= moment.full[1:] for other in first)
    assert held_by_torch(Pipeline("zb1p", 2, 1, 8))[0] == (InFlight((2,), (0,)),)
    for schedule in ("1f1b", "gpipe"):
        assert held_by_torch(Pipeline(schedule, 4, 1, 8)) == in_flight(Pipeline(schedule, 4, 1, 8))


def test_a_vector_where_a_forward_changes_its_chunk_can_be_the_largest() -> None:
    pipeline, weights = Pipeline("zb1p", 3, 3, 8), (5, 7, 1, 16, 1, 10)
    most = max(weight(moment, weights) for moment in moments_of(pipeline, 0))
    assert max(weight(moment, weights) for moment in in_flight(pipeline)[0]) == most


def test_the_vectors_are_few() -> None:
    """Every one is a row of the program for each rank."""
    for pipeline, most in [
        (Pipeline("zbv", 64, 2, 512), 2),
        (Pipeline("dualpipev", 64, 2, 512), 1),
        (Pipeline("interleaved-1f1b", 64, 8, 512), 16),
        (Pipeline("zb1p", 64, 8, 512), 24),
    ]:
        assert max(map(len, in_flight(pipeline, part_of_full=True))) == most


def test_the_table_of_split_schedules_is_what_the_lists_say() -> None:
    for schedule in SCHEDULES:
        chunks = CHUNKS.get(schedule, (2,))[-1]
        kinds = {action.kind for actions in action_lists(Pipeline(schedule, 2, chunks, 4)) for action in actions}
        assert ("W" in kinds) == (schedule in SPLIT_BACKWARD)
    assert set(LISTED) >= set(SPLIT_BACKWARD)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_any_layer_has_in_flight_at_least_is_that_of_the_moments_that_matter(schedule: str) -> None:
    for pipeline in (p for p in LEGAL if p.schedule == schedule):
        of_vectors = tuple(max(min(vector.full) for vector in vectors) for vectors in in_flight(pipeline))
        assert least_in_flight(pipeline) == of_vectors, pipeline


def test_with_any_of_several_chunks_the_least_in_flight_is_the_least_of_each_rank() -> None:
    each = [least_in_flight(Pipeline("interleaved-1f1b", 4, chunks, 8)) for chunks in (1, 2)]
    assert each == [(7, 5, 3, 1), (4, 4, 3, 1)]
    for chunks in ((1, 2), (2, 1)):
        assert least_of_any(tuple(("interleaved-1f1b", number) for number in chunks), 4, 8) == (4, 4, 3, 1)
    assert least_of_any((("gpipe", 1), ("1f1b", 1)), 4, 8) == (4, 3, 2, 1)
