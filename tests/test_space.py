"""The space: enumeration yields each legal layout once, pins and bans held."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.capabilities import CAPABILITIES
from planner.layout import CP_STYLES, SCHEDULES, Layout
from planner.rules import RuleContext, violations
from planner.space import divisors, enumerate_layouts, layout_groups
from profiles.experts_spec import Experts
from profiles.model import ModelSpec
from tests.oracles.brute_force import all_layouts
from tests.oracles.small_world import rule_context as context
from tests.oracles.small_world import small_cluster, small_question
from tests.plans import tiny_gpt2, tiny_llama


def naive(where: RuleContext) -> set[Layout]:
    """Every value of every knob, filtered by the rules alone; without tiers of links no HSDP is tried."""
    world, batch = where.world_size, where.job.global_batch
    numbers = range(1, world + 1)
    found = set()
    for tp, cp, pp, dp in product(numbers, repeat=4):
        if tp * cp * pp * dp != world:
            continue
        for dp_shard, zero, micro_batch, schedule in product({1, dp}, range(5), range(1, batch + 2), SCHEDULES):
            if zero and dp_shard < dp and cp > 1:
                continue  # HSDP over cp alone
            for style, sequence_parallel, virtual_stages in product(CP_STYLES, (False, True), range(1, 5)):
                layout = Layout(
                    tp=tp,
                    cp=cp,
                    cp_style=style,
                    pp=pp,
                    dp=dp,
                    dp_shard=dp_shard,
                    sequence_parallel=sequence_parallel,
                    zero=zero,
                    micro_batch=micro_batch,
                    schedule=schedule,
                    virtual_stages=virtual_stages,
                )
                if gcd(cp, micro_batch) == 1 and not violations(layout, where):
                    found.add(layout)
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "model", [tiny_llama(heads=6, head_dim=4, ffn_hidden_size=72), tiny_gpt2(layers=1)], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_enumeration_misses_nothing_and_repeats_nothing(world: int, model: ModelSpec, batch: int) -> None:
    where = context(world, model, global_batch=batch)
    layouts = list(enumerate_layouts(where))
    assert len(layouts) == len(set(layouts))
    assert set(layouts) == naive(where)


@settings(deadline=None, derandomize=True)
@given(
    world=st.sampled_from([1, 2, 5, 8, 12, 64, 96]),
    batch=st.integers(1, 64),
    sequence=st.sampled_from([1, 6, 16, 64]),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    layers=st.integers(1, 12),
)
def test_what_is_enumerated_is_legal(world: int, batch: int, sequence: int, kv_heads: int, layers: int) -> None:
    model = tiny_llama(heads=8, head_dim=4, kv_heads=kv_heads, layers=layers)
    where = context(world, model, global_batch=batch, sequence=sequence)
    layouts = list(enumerate_layouts(where))
    assert len(layouts) == len(set(layouts))
    for layout in layouts:
        assert violations(layout, where) == ()


def test_in_fp8_the_space_is_what_the_rules_leave_of_every_number() -> None:
    """fp8 depends on the micro batch (a multiple of 16 tokens) and on the schedule (whole backwards)."""
    model = replace(tiny_llama(layers=4), hidden_size=64, ffn_hidden_size=128, vocab_size=64)
    where = context(4, model, global_batch=8, sequence=8, precision="fp8")
    found = list(enumerate_layouts(where))
    assert set(found) == naive(where)
    assert len(set(found)) == len(found)
    assert {layout.micro_batch % 2 for layout in found} == {0}
    assert {"1f1b", "interleaved-1f1b"} < {layout.schedule for layout in found}


def test_pins_and_bans_hold_in_the_enumeration() -> None:
    everything = list(enumerate_layouts(context()))
    for pins in ({"tp": 2}, {"pp": 2, "schedule": "gpipe"}, {"sequence_parallel": True}, {"zero": 3, "micro_batch": 1}):
        wanted = [layout for layout in everything if all(getattr(layout, k) == v for k, v in pins.items())]
        assert 0 < len(wanted) < len(everything)
        assert list(enumerate_layouts(context(pins=pins))) == wanted
    for ban, off in (("tp", 1), ("pp", 1), ("dp", 1), ("zero", 0), ("sequence_parallel", False), ("micro_batch", 1)):
        wanted = [layout for layout in everything if getattr(layout, ban) == off]
        assert 0 < len(wanted) < len(everything)
        assert list(enumerate_layouts(context(bans=(ban,)))) == wanted
    # Recomputation is no key of a layout: the search holds it, but for schedules that cannot recompute.
    whole = [layout for layout in everything if not layout.splits_backward]
    assert list(enumerate_layouts(context(pins={"recompute": "full"}))) == whole
    assert list(enumerate_layouts(context(bans=("recompute",)))) == everything


@pytest.mark.parametrize("number", range(1, 61))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


# ---- the other targets -----------------------------------------------------------------------------------


EXPERTS = Experts(number=4, top_k=2, ffn_hidden_size=24, shared=1, dense_layers=1)


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    ("target", "experts"),
    [("meshwright", None), ("meshwright", EXPERTS), ("megatron", None), ("megatron", EXPERTS), ("torchtitan", None)],
)
def test_the_space_of_every_target_is_what_trying_every_number_leaves(
    devices: int, nodes: int, target: str, experts: Experts | None
) -> None:
    if devices % nodes:
        return
    model = tiny_llama(layers=5, ffn_hidden_size=72, heads=6, kv_heads=6, head_dim=4, experts=experts)
    cluster = small_cluster(devices, nodes)
    question = small_question(model, cluster=cluster, target=target, global_batch=8, sequence=24)
    layouts = list(enumerate_layouts(question.rules))
    assert len(layouts) == len(set(layouts)) == sum(len(group) for group in layout_groups(question.rules))
    assert set(layouts) == set(all_layouts(question))
    if devices == 8:
        used = {layout.virtual_stages for layout in layouts}, {layout.schedule for layout in layouts}
        assert used[1] == set(CAPABILITIES[target].schedules)
        assert max(used[0]) == 3
        axes = {key: {vars(layout)[key] for layout in layouts} for key in ("cp", "ep", "etp")}
        assert max(axes["cp"]) > 1
        assert {layout.cp_style for layout in layouts} == {"none", *CAPABILITIES[target].cp_styles}
        assert (max(axes["ep"]), max(axes["etp"])) == ((4, 2) if experts else (1, 1))
        hsdp = {(layout.dp, layout.dp_shard) for layout in layouts if layout.zero and layout.dp_shard < layout.dp}
        assert (hsdp == set()) == (nodes == 1)


def test_pins_of_any_key_hold() -> None:
    question = small_question(target="megatron", devices=4)
    everything = list(enumerate_layouts(question.rules))
    for pins in ({"cp": 2}, {"cp_style": "ring"}, {"virtual_stages": 2}, {"dp_shard": 4}, {"cp": 2, "tp": 2}):
        wanted = [layout for layout in everything if all(getattr(layout, k) == v for k, v in pins.items())]
        assert 0 < len(wanted) < len(everything)
        pinned = small_question(target="megatron", devices=4, pins=pins)
        assert list(enumerate_layouts(pinned.rules)) == wanted
