"""A plan at reduced size: legal, small, and of the same kinds of everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from planner.job import TrainingJob
from planner.layout import SCHEDULES, Layout
from planner.plan import Plan, Stage
from planner.reduced_plan import MOST_RANKS, ReducedPlan, reduce_plan
from planner.rules import RuleContext, violations, why_no_recompute
from profiles.catalogue import resolve_model
from profiles.model import ModelSpec
from profiles.store import Reader
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.thinned import examples

JOB = TrainingJob(global_batch=1536, sequence=2048)
GPT3 = resolve_model("gpt3-175b")
LLAMA = resolve_model("llama3-8b")


def reduced(
    model: ModelSpec, job: TrainingJob = JOB, counts: dict[str, Any] | None = None, **layout: Any
) -> ReducedPlan:
    return reduce_plan(make_plan(model, Layout(**layout), job, **(counts or {})))


def blocks(plan: Plan) -> list[tuple[int, int, int]]:
    return [(s.recompute_none, s.recompute_selective, s.recompute_full) for s in plan.stages]


@examples(100, 3)
@given(st.data())
def test_whatever_is_legal_becomes_small_and_stays_legal(data: st.DataObject) -> None:
    draw = data.draw
    pp = draw(st.sampled_from([1, 2, 3, 5, 8, 16]))
    schedule = draw(st.sampled_from(SCHEDULES)) if pp > 1 else "1f1b"
    chunks = {"gpipe": 1, "1f1b": 1, "zbv": 2, "dualpipev": 2}.get(schedule) or draw(st.integers(1, 3))
    dp = draw(st.sampled_from([1, 2, 3, 6, 16, 64]))
    zero = draw(st.integers(0, 3))
    tp = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12]))
    micro_batch = draw(st.integers(1, 4))
    cp = draw(st.sampled_from([1, 1, 2, 3, 4, 12]))
    layout = Layout(
        tp=tp,
        cp=cp,
        cp_style=draw(st.sampled_from(["ring", "all-to-all"])) if cp > 1 else "none",
        pp=pp,
        dp=dp,
        dp_shard=draw(st.sampled_from([n for n in range(1, dp + 1) if dp % n == 0])) if zero else 1,
        sequence_parallel=draw(st.booleans()),
        zero=zero,
        micro_batch=micro_batch,
        schedule=schedule,
        virtual_stages=chunks if pp > 1 else 1,
    )
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 12, 24]))
    model = draw(st.sampled_from([tiny_llama, tiny_gpt2]))(
        layers=draw(st.integers(1, 60)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 5])),
        kv_heads=kv_heads,
        hidden_size=120,
        head_dim=draw(st.sampled_from([2, 10])),
        ffn_hidden_size=240,
        vocab_size=draw(st.integers(100, 500)),
        max_positions=240,
    )
    batch = micro_batch * dp * draw(st.integers(1, 40))
    job = TrainingJob(global_batch=batch, sequence=draw(st.sampled_from([24, 120, 240])), precision="bf16")
    context = RuleContext(model, job, layout.world_size)
    assume(not violations(layout, context))
    modes = [mode for mode in ("selective", "full") if why_no_recompute(mode, layout, context) is None]
    cuts = sorted(draw(st.lists(st.integers(0, model.layers), min_size=layout.stages - 1, max_size=layout.stages - 1)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, model.layers], strict=True)]
    assume(all(sizes[1:-1]))
    full = [draw(st.integers(0, size if "full" in modes else 0)) for size in sizes]
    selective = [
        draw(st.integers(0, size - f if "selective" in modes else 0)) for size, f in zip(sizes, full, strict=True)
    ]
    plan = make_plan(model, layout, job, cuts or None, full, selective)

    small = reduce_plan(plan).plan

    # Reading a plan checks rules, stages and layers.
    document = {key: value for key, value in small.to_dict().items() if key != "schema"}
    document["prediction"]["memory_bytes"] = document["prediction"]["memory_bytes"][: small.layout.pp]
    assert Plan.from_dict(Reader(document, source="reduced")).stages == small.stages
    assert small.layout.world_size <= MOST_RANKS
    for axis in ("tp", "cp", "pp", "dp"):
        full_house = axis == "dp" and min(layout.tp, layout.cp, layout.pp) > 1
        assert (getattr(small.layout, axis) > 1) == (getattr(layout, axis) > 1 and not full_house)
        assert getattr(small.layout, axis) <= getattr(layout, axis)
    kept = ("schedule", "virtual_stages", "zero", "sequence_parallel", "cp_style", "ep", "etp")
    assert all(getattr(small.layout, key) == getattr(layout, key) for key in kept)
    assert [any(column) for column in zip(*blocks(small), strict=True)] == [
        any(column) for column in zip(*blocks(plan), strict=True)
    ]
    assert small.model.layers <= 3 * layout.stages + 3
    assert (small.microbatches > 1) == (plan.microbatches > 1)
    form = {f: getattr(model, f) for f in ("norm", "activation", "positions", "qkv_bias", "tied_embeddings")}
    assert form == {f: getattr(small.model, f) for f in form}
    assert (small.model.kv_heads < small.layout.tp) == (model.kv_heads < layout.tp)
    assert (small.model.kv_heads == small.model.heads) == (model.kv_heads == model.heads)
    assert (small.model.vocab_size % small.layout.tp == 0) == (model.vocab_size % layout.tp == 0)
    assert small.model.hidden_size <= 4 * MOST_RANKS * 8 + 8


def test_a_plan_for_a_thousand_gpus() -> None:
    found = reduced(GPT3, tp=8, pp=8, dp=16, dp_shard=16, zero=1, sequence_parallel=True)
    small = found.plan
    assert small.layout.short() == "tp2·sp pp2 dp2 zero1 mb1 1f1b"
    assert (small.microbatches, small.job.global_batch, small.job.sequence, small.job.precision) == (4, 8, 16, "fp32")
    assert blocks(small) == [(2, 0, 0)] * 2
    model = small.model
    assert (model.heads, model.kv_heads, model.hidden_size, model.ffn_hidden_size) == (4, 4, 32, 64)
    assert model.vocab_size == 64  # 8 divides 51,200 rows
    assert model.tied_embeddings
    assert found.loss_tokens == 6  # of 16: the plan's 2048 tokens come in pieces too
    rows = {change.what: (change.before, change.after, change.why) for change in found.changes}
    assert rows["ranks, pp·tp·dp"] == ("1024 = 8·8·16", "8 = 2·2·2", "at most 8 ranks here")
    assert "shards of HSDP" not in rows
    assert rows["blocks a stage"] == ("12", "2", "seconds instead of hours")
    assert rows["precision"] == ("bf16", "fp32, float64", "16 bits would hide what differs")


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"dp": 64}, "dp8 zero0 mb1"),
        ({"pp": 2, "dp": 64}, "pp2 dp4 zero0 mb1 1f1b"),
        ({"tp": 8, "dp": 2}, "tp4 dp2 zero0 mb1"),
        ({"tp": 8, "pp": 4}, "tp2 pp4 mb1 1f1b"),
        ({"tp": 4, "pp": 16, "dp": 2}, "tp2 pp2 dp2 zero0 mb1 1f1b"),
        ({"dp": 64, "dp_shard": 8, "zero": 3}, "dp4 zero3·hsdp2 mb1"),
        ({"pp": 4, "dp": 64, "dp_shard": 8, "zero": 1}, "pp2 dp4 zero1·hsdp2 mb1 1f1b"),
        ({"cp": 16, "cp_style": "ring", "dp": 4, "dp_shard": 4, "zero": 3}, "cp4·ring dp2 zero3 mb1"),
        ({"tp": 8, "cp": 4, "cp_style": "all-to-all", "pp": 4, "dp": 4}, "tp2 cp2·all-to-all pp2 mb1 1f1b"),
    ],
)
def test_dp_gives_way_first_then_cp_then_tp(degrees: dict[str, Any], expected: str) -> None:
    assert reduced(GPT3, **degrees).plan.layout.short() == expected


def test_what_is_said_of_cp() -> None:
    found = reduced(GPT3, tp=8, cp=4, cp_style="all-to-all", pp=4, dp=4)
    rows = {change.what: (change.before, change.after) for change in found.changes}
    assert rows["ranks, pp·tp·cp·dp"] == ("512 = 4·8·4·4", "8 = 2·2·2·1")
    model = found.plan.model
    assert (model.heads, model.kv_heads, found.plan.job.sequence) == (8, 8, 16)


def test_a_vocabulary_that_tp_does_not_divide_stays_so() -> None:
    assert reduced(replace(GPT3, vocab_size=50257), tp=8).plan.model.vocab_size == 61
    assert reduced(replace(GPT3, vocab_size=50257), dp=8).plan.model.vocab_size == 64


def test_hsdp_that_has_no_room_is_said_to_be_left_out() -> None:
    found = reduced(GPT3, tp=2, pp=2, dp=16, dp_shard=8, zero=1)
    assert found.plan.layout.short() == "tp2 pp2 dp2 zero1 mb1 1f1b"
    (row,) = [change for change in found.changes if change.what == "shards of HSDP"]
    assert (row.before, row.after, row.why) == ("8", "none", "HSDP needs 4 ranks of dp")


def test_stages_keep_their_shape() -> None:
    uneven = reduced(LLAMA, pp=2, counts={"cuts": [17]}).plan
    assert blocks(uneven) == [(3, 0, 0), (2, 0, 0)]
    alone = reduced(LLAMA, pp=4, counts={"cuts": [0, 16, 31], "recompute": [0, 16, 3, 0]}).plan
    assert blocks(alone) == [(0, 0, 0), (0, 0, 3), (2, 0, 1), (1, 0, 0)]


def test_a_mode_of_stages_that_are_left_out_is_kept() -> None:
    """Of eight stages only the third recomputes, and two stages remain."""
    full = [0, 0, 4, 0, 0, 0, 0, 0]
    small = reduced(LLAMA, tp=2, pp=8, dp=2, counts={"recompute": full}).plan
    assert blocks(small) == [(2, 0, 1), (2, 0, 0)]
    assert [stage.recompute_mode(stage.first) for stage in small.stages] == ["full", "none"]


def test_chunks_lie_where_the_schedule_has_them() -> None:
    small = reduced(LLAMA, pp=8, schedule="zbv", virtual_stages=2).plan
    assert [(stage.rank, stage.chunk) for stage in small.stages] == [
        *((rank, 0) for rank in range(8)),
        *((rank, 1) for rank in reversed(range(8))),
    ]


def test_heads_shared_by_ranks_stay_shared() -> None:
    assert _heads(reduced(LLAMA, tp=16)) == (16, 4)  # 8 key-value heads: two ranks to each
    assert _heads(reduced(LLAMA, tp=8)) == (16, 8)
    assert _heads(reduced(LLAMA, tp=2)) == (8, 4)
    assert _heads(reduced(GPT3, tp=4)) == (8, 8)
    assert _heads(reduced(replace(LLAMA, kv_heads=1))) == (2, 1)


def _heads(found: ReducedPlan) -> tuple[int, int]:
    return found.plan.model.heads, found.plan.model.kv_heads


EXPERTS = {
    "mixtral-8x7b": {"dp": 64, "ep": 8, "zero": 1},
    "mixtral-8x22b": {"tp": 8, "sequence_parallel": True, "etp": 8, "pp": 4, "dp": 8, "ep": 8, "zero": 1},
    "qwen3-235b-a22b": {"tp": 4, "sequence_parallel": True, "dp": 64, "dp_shard": 8, "ep": 32, "zero": 3},
    "deepseek-v2": {"pp": 4, "dp": 32, "ep": 32, "zero": 1, "schedule": "zb1p"},
    "deepseek-v3": {"pp": 16, "dp": 64, "ep": 64, "schedule": "dualpipev", "virtual_stages": 2},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_stay_on_several_ranks(name: str) -> None:
    model, layout = replace(resolve_model(name), rope_stretch=None), Layout(**EXPERTS[name])
    layout = replace(layout, dp_shard=layout.dp) if layout.zero and layout.dp_shard == 1 else layout
    small = reduce_plan(make_plan(model, layout, TrainingJob(global_batch=4096, sequence=4096))).plan
    document = {key: value for key, value in small.to_dict().items() if key != "schema"}
    document["prediction"]["memory_bytes"] = document["prediction"]["memory_bytes"][: small.layout.pp]
    assert Plan.from_dict(Reader(document, source="reduced")).model == small.model
    assert small.layout.world_size <= MOST_RANKS
    for axis in ("tp", "pp", "dp", "ep", "etp", "edp"):
        assert (getattr(small.layout, axis) > 1) == (getattr(layout, axis) > 1), axis
    before, after = model.experts, small.model.experts
    assert before is not None
    assert after is not None
    for fact in ("router_score", "router_bias", "expert_bias", "selection_bias", "normalize_top_k", "router_scale"):
        assert getattr(after, fact) == getattr(before, fact)
    assert after.dense_layers == min(before.dense_layers, 1)
    for count in ("top_k", "shared", "groups", "top_groups"):
        assert min(getattr(after, count), 2) == min(getattr(before, count), 2)
    assert (after.top_groups < after.groups) == (before.top_groups < before.groups)
    assert after.top_k < after.number
    assert (small.model.latent_attention is None) == (model.latent_attention is None)


def test_a_loss_in_one_piece_stays_so() -> None:
    assert reduced(LLAMA, TrainingJob(global_batch=8, sequence=1024), dp=2).loss_tokens == 16
    assert reduced(LLAMA, TrainingJob(global_batch=8, sequence=1024), dp=2, micro_batch=2).loss_tokens == 12


def test_what_does_not_change_is_not_listed() -> None:
    plan = make_plan(tiny_llama(), Layout(dp=2), TrainingJob(global_batch=8, sequence=16, precision="fp32"))
    whats = [change.what for change in reduce_plan(plan).changes]
    assert "precision" not in whats
    assert "sequence" not in whats
    assert "ranks, pp·tp·dp" not in whats
    assert isinstance(reduce_plan(plan).plan.stages[0], Stage)
