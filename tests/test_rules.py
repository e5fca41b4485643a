"""Every rule's words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.layout import Layout
from planner.rules import (
    RULES,
    RuleContext,
    recompute_modes,
    require_legal,
    violations,
    why_no_recompute,
    why_not_proposed,
)
from planner.space import enumerate_layouts
from profiles.attention_spec import SlidingWindow
from profiles.experts_spec import Experts
from profiles.input_error import InputError
from tests.oracles.small_world import rule_context as context
from tests.plans import tiny_bert, tiny_experts, tiny_gpt2, tiny_gpt_oss, tiny_latent, tiny_llama, tiny_traced

# ---- rules -----------------------------------------------------------------------------------------------


def experts(**changes: Any) -> RuleContext:
    """8 experts of width 64 in every layer, 2 of them for a token, trained by Megatron-LM."""
    fields: dict[str, Any] = {"number": 8, "top_k": 2, "ffn_hidden_size": 64}
    model = tiny_llama(heads=8, head_dim=4, kv_heads=8, experts=Experts(**(fields | changes)))
    return context(model=model, target="megatron")


def fp8(**changes: Any) -> RuleContext:
    return context(**({"precision": "fp8"} | changes))


RULED_OUT: list[tuple[Layout, RuleContext, str]] = [
    (
        Layout(tp=2, pp=2),
        context(),
        "tp·cp·pp·dp = 2·1·2·1 = 4 and 8 devices: a layout uses every device once",
    ),
    (Layout(cp=2, dp=4), context(), "cp=2 with cp_style=none: the meshwright runtime runs ring or all-to-all"),
    (Layout(dp=8, ep=4), context(), "ep=4: tiny-llama has no experts"),
    (Layout(dp=8, etp=2), context(), "etp=2: tiny-llama has no experts"),
    (
        Layout(dp=8, virtual_stages=2),
        context(),
        "virtual_stages=2 and pp=1: chunks are of a pipeline",
    ),
    (
        Layout(pp=2, dp=4, virtual_stages=2),
        context(),
        "1f1b runs one chunk a pipeline rank, and virtual_stages=2",
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
        Layout(pp=4, dp=2, virtual_stages=2, schedule="interleaved-1f1b"),
        context(model=tiny_llama(layers=5), target="megatron"),
        "pp=4 with 2 chunks and 5 layers: every stage between the embedding's and the head's needs a layer, "
        "so pp is at most 3",
    ),
    (
        Layout(dp=4, tp=2, micro_batch=4),
        context(),
        "global batch 8 is not a multiple of micro_batch·dp = 4·4 = 16",
    ),
    (
        Layout(pp=2, dp=4, schedule="zbv"),
        context(target="megatron"),
        "schedule=zbv: Megatron-LM runs 1f1b, interleaved-1f1b today",
    ),
    (
        Layout(pp=2, dp=4, dp_shard=4, zero=3, schedule="zb1p"),
        context(),
        "zero=3 with zb1p: torch 2.11 to 2.13 loses gradients where weights are freed between the halves of a "
        "backward; ask for zero=1",
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
        Layout(dp=8, dp_shard=1, zero=3),
        context(),
        "dp_shard=1 with zero=3: a group of one rank shards nothing; ask for dp_shard=8 or zero=0",
    ),
    (
        Layout(dp=8, dp_shard=8),
        context(),
        "dp_shard=8 with zero=0: nothing is sharded, so dp_shard=1",
    ),
    # ---- what other targets run, and with which numbers
    (
        Layout(cp=2, dp=4),
        context(target="megatron"),
        "cp=2 with cp_style=none: Megatron-LM runs ring or all-to-all",
    ),
    (
        Layout(cp=2, cp_style="all-to-all", dp=4),
        context(target="torchtitan"),
        "cp=2 with cp_style=all-to-all: torchtitan runs ring",
    ),
    (Layout(dp=8, cp_style="ring"), context(target="megatron"), "cp_style=ring and cp=1"),
    (
        Layout(cp=4, cp_style="ring", dp=2),
        context(target="megatron", sequence=12),
        "cp=4: 2·cp = 8 does not divide the sequence of 12 tokens",
    ),
    (
        Layout(cp=4, cp_style="all-to-all", dp=2),
        context(target="megatron"),
        "cp=4 all-to-all does not divide the 2 key-value heads of a tp rank",
    ),
    (
        Layout(tp=4, cp=2, cp_style="ring", sequence_parallel=True),
        context(model=tiny_llama(heads=8, head_dim=4, kv_heads=4), target="megatron", sequence=12),
        "sequence_parallel: tp·cp=8 does not divide the sequence of 12 tokens",
    ),
    (
        Layout(dp=8, dp_shard=8, zero=2),
        context(target="megatron"),
        "zero=2: Megatron-LM's distributed optimizer is zero 1; ask for zero=0 or zero=1",
    ),
    (
        Layout(dp=8, dp_shard=8, zero=1),
        context(target="torchtitan"),
        "zero=1: torchtitan reshards after forward (zero 3) or not (zero 2, under torch's pipeline zero 1)",
    ),
    (
        Layout(dp=8, dp_shard=3, zero=1),
        context(target="megatron"),
        "dp_shard=3 does not divide dp=8",
    ),
    (
        Layout(pp=2, dp=4, schedule="zbv"),
        context(target="torchtitan"),
        "zbv runs exactly 2 chunks a pipeline rank, and virtual_stages=1",
    ),
    (
        Layout(pp=2, dp=4, schedule="dualpipev", virtual_stages=2),
        context(target="torchtitan"),
        "dualpipev with 2 microbatches and pp=2: it needs at least as many microbatches as its 4 stages",
    ),
    (
        Layout(pp=2, dp=4, schedule="interleaved-1f1b", virtual_stages=2),
        context(target="megatron", global_batch=20),
        "interleaved-1f1b with 5 microbatches and pp=2 runs in 2 rounds, and 2 does not divide 5",
    ),
    (Layout(dp=8, ep=2), context(target="megatron"), "ep=2: tiny-llama has no experts"),
    (Layout(dp=8, ep=3), experts(), "ep=3 does not divide 8 experts"),
    (
        Layout(tp=4, dp=2, etp=2, sequence_parallel=True),
        experts(),
        "etp=2: experts are cut over tp=4 or not at all",
    ),
    (
        Layout(tp=4, dp=2, etp=4, sequence_parallel=True),
        experts(ffn_hidden_size=6),
        "etp=4 does not divide the experts' width of 6",
    ),
    (
        Layout(tp=4, dp=2, sequence_parallel=True),
        experts(shared=1, shared_ffn_hidden_size=6),
        "tp=4 does not divide the shared experts' width of 6",
    ),
    (
        Layout(pp=4, dp=2, ep=4),
        experts(),
        "ep·etp = 4·1 does not divide tp·cp·dp = 2 ranks of a pipeline stage",
    ),
    (
        Layout(dp=8, dp_shard=2, zero=1, ep=4),
        experts(),
        "edp=2 does not divide into the 4 replicas of dp_shard",
    ),
    (Layout(tp=2, dp=4), experts(), "experts with tp=2: Megatron-LM asks for sequence_parallel"),
    (
        Layout(tp=2, dp=4),
        fp8(),
        "fp8 with tp=2: the meshwright runtime runs fp8 products of whole linears alone today",
    ),
    (
        Layout(pp=2, dp=4, schedule="zb1p"),
        fp8(model=tiny_llama(head_dim=16), sequence=16),
        "fp8 with zb1p: a product in fp8 would run its whole backward in both halves",
    ),
    (
        Layout(dp=8),
        fp8(sequence=24),
        "fp8: torch's product takes multiples of 16 tokens and widths, not 24",
    ),
    (
        Layout(cp=2, cp_style="ring", dp=4),
        context(model=tiny_gpt_oss(), sequence=16),
        "cp=2 ring with sliding-window attention and attention sinks: the meshwright runtime needs whole sequences; "
        "ask for cp_style=all-to-all",
    ),
    (
        Layout(dp=8),
        context(model=tiny_bert(sliding_window=SlidingWindow(length=4)), sequence=16),
        "sliding-window attention with bidirectional attention: the meshwright runtime has them in causal attention "
        "to keys of each head alone",
    ),
    (
        Layout(dp=8),
        context(model=tiny_latent(attention_sinks=True), sequence=16),
        "attention sinks with latent attention: the meshwright runtime has them in causal attention to keys of each "
        "head alone",
    ),
    (
        Layout(dp=8),
        fp8(model=tiny_experts()),
        "fp8: the meshwright runtime has fp8 products in dense blocks alone today; ask for --precision bf16",
    ),
    (
        Layout(tp=4, dp=2),
        context(model=tiny_traced(), sequence=16),
        "tp=4 does not divide the 66 outputs of up",
    ),
    (
        Layout(tp=2, dp=4),
        context(model=tiny_traced(tp_plan=()), sequence=16),
        "tp=2: tiny:build has no tp_plan, and its blocks no pair of linears that one can see",
    ),
    (
        Layout(dp=8),
        context(model=tiny_traced(), sequence=16, precision="fp16"),
        "fp16: the loss and the products of tiny:build are its own; ask for --precision bf16",
    ),
    (
        Layout(cp=2, cp_style="ring", dp=4),
        context(model=tiny_traced(), sequence=16),
        "cp=2: the attention of tiny:build is its own, and has no keys of other ranks",
    ),
    (
        Layout(pp=2, dp=4, schedule="zb1p"),
        context(model=tiny_traced(), sequence=16),
        "schedule=zb1p: the backward of tiny:build is run as a whole",
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
        "dp_shard=1 with zero=1",
    ]


def test_the_dp_shard_rule_follows_zero() -> None:
    plain = Layout(dp=8, dp_shard=8, zero=3)
    assert violations(plain, context()) == ()
    assert violations(replace(plain, zero=0), context()) != ()


def test_a_tier_of_links_is_no_rule_for_a_layout_that_a_person_writes() -> None:
    """The space tries shards inside a tier alone; a plan file may have any divisor of dp."""
    assert violations(Layout(dp=8, dp_shard=2, zero=1), context(target="megatron")) == ()
    assert violations(Layout(dp=8, dp_shard=4, zero=1), context(target="megatron")) == ()


def test_recomputation_of_a_split_backward_is_refused_in_words() -> None:
    split, whole = Layout(pp=2, dp=4, schedule="zb1p"), Layout(pp=2, dp=4)
    where = context(target="torchtitan")
    assert recompute_modes(whole, where) == ("none", "selective", "full")
    assert recompute_modes(split, where) == ("none",)
    reason = why_no_recompute("full", split, where)
    assert reason is not None
    assert reason.startswith("recompute=full with zb1p: torch 2.11 to 2.13 runs the recomputation of a split backward")
    assert recompute_modes(whole, context(target="torchtitan", pins={"recompute": "full"})) == ("full",)
    assert recompute_modes(whole, context(target="torchtitan", bans=("recompute",))) == ("none",)
    with pytest.raises(InputError) as caught:
        require_legal(split, "selective", where)
    assert "recompute=selective with zb1p" in caught.value.got


def test_what_is_legal_but_not_proposed() -> None:
    crowded = Layout(cp=4, cp_style="ring", dp=2, micro_batch=2)
    where = context(sequence=16)
    assert violations(crowded, where) == ()
    assert why_not_proposed(crowded) == (
        "cp=4 with micro_batch=2: cp=2 with micro_batch=1 and dp=4 gives every rank as many tokens and less to send, "
        "so only estimate and train take it"
    )
    assert why_not_proposed(replace(crowded, micro_batch=1)) is None
    assert why_not_proposed(Layout(dp=2, micro_batch=2)) is None
    assert crowded not in enumerate_layouts(where)
