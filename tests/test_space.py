"""The space: enumeration yields each legal layout once, pins and bans held."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.layout import SCHEDULES, Layout
from planner.rules import RuleContext, violations
from planner.space import divisors, enumerate_layouts
from profiles.model import ModelSpec
from tests.oracles.small_world import rule_context as context
from tests.plans import tiny_gpt2, tiny_llama


def naive(where: RuleContext) -> set[Layout]:
    """Every value of every knob, filtered by the rules alone."""
    world, batch = where.world_size, where.job.global_batch
    numbers = range(1, world + 1)
    found = set()
    for tp, cp, pp, dp in product(numbers, (1, 2), numbers, numbers):
        if tp * cp * pp * dp != world:
            continue
        for dp_shard, zero, micro_batch, schedule in product(numbers, range(5), range(1, batch + 2), SCHEDULES):
            for sequence_parallel, virtual_stages in product((False, True), (1, 2)):
                layout = Layout(
                    tp=tp,
                    cp=cp,
                    pp=pp,
                    dp=dp,
                    dp_shard=dp_shard,
                    sequence_parallel=sequence_parallel,
                    zero=zero,
                    micro_batch=micro_batch,
                    schedule=schedule,
                    virtual_stages=virtual_stages,
                )
                if not violations(layout, where):
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
    # Recomputation is no key of a layout: the search holds it.
    assert list(enumerate_layouts(context(pins={"recompute": "full"}, bans=("recompute",)))) == everything


@pytest.mark.parametrize("number", range(1, 61))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
