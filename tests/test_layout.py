"""Every rule's words, and that enumeration yields each legal layout once."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.job import TrainingJob
from planner.layout import CAPABILITIES, RULES, SCHEDULES, Layout, RuleContext, divisors, enumerate_layouts, violations
from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.store import Reader
from tests.plans import tiny_gpt2, tiny_llama


def context(world: int = 8, model: ModelSpec | None = None, **job: Any) -> RuleContext:
    """8 heads, 2 key-value heads, 4 layers, ffn 64, vocabulary 61; 8 sequences of 16 tokens."""
    fields: dict[str, Any] = {"global_batch": 8, "sequence": 16}
    model = model or tiny_llama(heads=8, head_dim=4)
    return RuleContext(model, TrainingJob(**(fields | job)), world)


# ---- rules -----------------------------------------------------------------------------------------------

RULED_OUT: list[tuple[Layout, RuleContext, str]] = [
    (
        Layout(tp=2, pp=2),
        context(),
        "tp·cp·pp·dp = 2·1·2·1 = 4 and 8 devices: a layout uses every device once",
    ),
    (Layout(cp=2, dp=4), context(), "cp=2: the meshwright runtime does not train with cp > 1 today"),
    (Layout(dp=8, ep=4), context(), "ep=4: the meshwright runtime does not train with ep > 1 today"),
    (Layout(dp=8, etp=2), context(), "etp=2: the meshwright runtime does not train with etp > 1 today"),
    (
        Layout(dp=8, virtual_stages=2),
        context(),
        "virtual_stages=2: the meshwright runtime runs one chunk per pipeline rank today",
    ),
    (
        Layout(tp=3),
        context(3, tiny_llama(heads=4, kv_heads=1, head_dim=8, ffn_hidden_size=66)),
        "tp=3 does not divide 4 attention heads",
    ),
    (
        Layout(tp=6),
        context(6, tiny_llama(heads=12, kv_heads=4, head_dim=8, ffn_hidden_size=66)),
        "tp=6 and 4 key-value heads: neither divides the other",
    ),
    (Layout(tp=4), context(4, tiny_llama(ffn_hidden_size=66)), "tp=4 does not divide ffn_hidden_size = 66"),
    (
        Layout(tp=8),
        context(8, tiny_llama(heads=8, head_dim=4, vocab_size=9)),
        "tp=8 leaves the last rank no row of a vocabulary of 9",
    ),
    (Layout(dp=8, sequence_parallel=True), context(), "sequence_parallel splits the sequence over tp, and tp=1"),
    (
        Layout(tp=8, sequence_parallel=True),
        context(sequence=20),
        "sequence_parallel: tp=8 does not divide the sequence of 20 tokens",
    ),
    (Layout(dp=8), context(model=tiny_gpt2(), sequence=65), "sequence of 65 tokens and 64 learned positions"),
    (
        Layout(pp=8),
        context(model=tiny_llama(layers=5)),
        "pp=8 and 5 layers: every stage between the embedding's and the head's needs a layer, so pp is at most 7",
    ),
    (
        Layout(dp=4, tp=2, micro_batch=4),
        context(),
        "global batch 8 is not a multiple of micro_batch·dp = 4·4 = 16",
    ),
    (
        Layout(pp=2, dp=4, schedule="zbv"),
        context(),
        "schedule=zbv: the meshwright runtime runs gpipe, 1f1b today",
    ),
    (
        Layout(dp=8, schedule="gpipe"),
        context(),
        "schedule=gpipe and pp=1: without a pipeline there is only 1f1b (accumulation)",
    ),
    (
        Layout(pp=4, dp=2, micro_batch=2),
        context(),
        "1f1b with 2 microbatches and pp=4: torch runs it only with at least as many microbatches as stages",
    ),
    (Layout(dp=8, dp_shard=8, zero=4), context(), "zero=4: the levels are 0, 1, 2 and 3"),
    (Layout(tp=8, zero=1), context(), "zero=1 shards state over dp, and dp=1"),
    (
        Layout(pp=2, dp=4, dp_shard=4, zero=2),
        context(),
        "zero=2 with pp > 1: torch's pipeline keeps gradients unsharded until the last microbatch, "
        "so zero 2 is zero 1 there; ask for zero=1",
    ),
    (
        Layout(dp=8, dp_shard=4, zero=3),
        context(),
        "dp_shard=4 with zero=3 and dp=8: the meshwright runtime shards over all of dp or not at all today, "
        "so dp_shard=8",
    ),
    (
        Layout(dp=8, dp_shard=8),
        context(),
        "dp_shard=8 with zero=0 and dp=8: the meshwright runtime shards over all of dp or not at all today, "
        "so dp_shard=1",
    ),
]


@pytest.mark.parametrize(("layout", "where", "reason"), RULED_OUT, ids=[reason[:40] for _, _, reason in RULED_OUT])
def test_what_forbids_a_layout_in_words(layout: Layout, where: RuleContext, reason: str) -> None:
    if layout.micro_batch == 4:  # no microbatch at all breaks the schedule's rule too
        assert violations(layout, where)[0] == reason
    else:
        assert violations(layout, where) == (reason,)


def test_a_batch_smaller_than_a_microbatch_breaks_one_rule() -> None:
    assert len(violations(Layout(dp=4, tp=2, micro_batch=4), context())) == 1


def test_every_rule_has_a_case() -> None:
    broken = {rule.__name__ for rule in RULES for layout, where, _ in RULED_OUT if rule(layout, where) is not None}
    assert broken == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=8),
        Layout(tp=8),
        Layout(tp=8, sequence_parallel=True),
        Layout(pp=2, tp=2, dp=2, dp_shard=2, zero=3, micro_batch=2),
        Layout(pp=8, schedule="gpipe", micro_batch=8),
        Layout(dp=8, dp_shard=8, zero=2),
    ],
)
def test_what_no_rule_forbids(layout: Layout) -> None:
    model = tiny_llama(layers=6, heads=8, head_dim=4)
    assert violations(layout, context(model=model)) == ()


def test_several_reasons_come_in_the_order_of_the_rules() -> None:
    layout = Layout(tp=3, dp=2, zero=1)
    assert [reason.split(":")[0] for reason in violations(layout, context())] == [
        "tp·cp·pp·dp = 3·1·1·2 = 6 and 8 devices",
        "tp=3 does not divide 8 attention heads",
        "tp=3 and 2 key-value heads",
        "tp=3 does not divide ffn_hidden_size = 64",
        "dp_shard=1 with zero=1 and dp=2",
    ]


# ---- enumeration -----------------------------------------------------------------------------------------


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


def test_the_capabilities_are_words_of_the_plan_file() -> None:
    for capabilities in CAPABILITIES.values():
        assert set(capabilities.schedules) <= set(SCHEDULES)


# ---- Layout ----------------------------------------------------------------------------------------------


def test_world_and_microbatches() -> None:
    layout = Layout(tp=2, pp=3, dp=4, micro_batch=2)
    assert layout.world_size == 24
    assert layout.microbatches(48) == 6


@pytest.mark.parametrize(
    ("layout", "short"),
    [
        (Layout(), "mb1"),
        (Layout(tp=2, sequence_parallel=True, pp=4, dp=8, zero=1, micro_batch=2), "tp2·sp pp4 dp8 zero1 mb2 1f1b"),
        (Layout(tp=8, pp=2, schedule="gpipe"), "tp8 pp2 mb1 gpipe"),
    ],
)
def test_a_layout_on_one_line(layout: Layout, short: str) -> None:
    assert layout.short() == short


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((axis, 0) for axis in ("tp", "cp", "pp", "dp", "dp_shard", "ep", "etp", "micro_batch", "virtual_stages")),
        ("tp", 2.0),
        ("zero", -1),
        ("zero", True),
        ("sequence_parallel", 1),
        ("schedule", "1f2b"),
        ("cp_style", "rings"),
    ],
)
def test_a_layout_that_is_none_names_the_key(key: str, value: object) -> None:
    document = Layout().to_dict()
    assert Layout.from_dict(Reader(document, source="p.yaml")) == Layout()
    with pytest.raises(InputError) as caught:
        Layout.from_dict(Reader(document | {key: value}, source="p.yaml", path="layout"))
    assert (caught.value.where, caught.value.got) == (f"p.yaml: layout.{key}", repr(value))


@pytest.mark.parametrize("key", list(Layout().to_dict()))
def test_every_key_of_a_layout_is_needed(key: str) -> None:
    document = Layout().to_dict()
    del document[key]
    with pytest.raises(InputError, match=f"the key layout.{key} is missing"):
        Layout.from_dict(Reader(document, source="p.yaml", path="layout"))


def test_the_dp_shard_rule_follows_zero() -> None:
    plain = Layout(dp=8, dp_shard=8, zero=3)
    assert violations(plain, context()) == ()
    assert violations(replace(plain, zero=0), context()) != ()
