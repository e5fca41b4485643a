"""What each zero level gathers and reduces, when, and what of it hides behind compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.comm_cost import CommModel, Group
from planner.layout import Layout
from tests.oracles.small_world import block_of, price, small_cluster, small_hardware, small_question

PHASES = ("forward", "backward", "recompute_full", "gather", "reduce", "optimizer")
# While both run each takes this many times as long: twice is one after the other.
NOTHING_HIDDEN = {"overlap_compute_slowdown": 2.0, "overlap_communication_slowdown": 2.0}
EVERYTHING_HIDDEN = {"overlap_compute_slowdown": 1.0, "overlap_communication_slowdown": 1.0}
SHARDED = {zero: Layout(dp=2, zero=zero, dp_shard=2) for zero in (1, 2, 3)}


def dp_seconds(
    zero: int, pp: int = 1, part: str = "block", reshard: bool | None = None, **hardware: Any
) -> dict[str, float]:
    layout = Layout(dp=2, pp=pp, zero=zero, dp_shard=2 if zero else 1)
    priced = price(layout, **(NOTHING_HIDDEN | hardware))
    costs = priced.segments_if(reshard)[0].seconds if part == "block" else getattr(priced, part)
    return {phase: getattr(costs, phase).dp for phase in PHASES if getattr(costs, phase).dp}


@pytest.mark.parametrize("pp", [1, 2])
def test_what_each_zero_level_gathers_and_reduces_and_when(pp: int) -> None:
    """fp32: a gather of the weights, a reduction of the gradients, each with a copy in and out of a flat buffer."""
    question = small_question(devices=2 * pp)
    comm, model = CommModel(question.cluster, question.hardware), question.model
    parts = {"block": model.block_parameters, "embedding": model.embedding_parameters, "head": model.head_parameters}
    whole = (model.layers * model.block_parameters + model.embedding_parameters + model.head_parameters) / pp
    for part, parameters in parts.items():
        group, copy = Group(2, 1), 2 * 4 * parameters / 1e10
        gather = pytest.approx(comm.collective_seconds("all_gather", group, 4.0 * parameters) + copy)
        scatter = pytest.approx(comm.collective_seconds("reduce_scatter", group, 4.0 * parameters) + copy)
        # All gradients are one message.
        reduce = pytest.approx(comm.collective_seconds("all_reduce", group, 4.0 * whole) * parameters / whole + copy)
        assert dp_seconds(0, pp, part) == {"reduce": reduce}
        assert dp_seconds(1, pp, part) == {"gather": gather, "reduce": scatter}
        if pp == 2:
            # M + 1 gathers of a block, 2M, or 1, and one of the root, as tests/distributed/test_collectives.py counts.
            once, again = {"gather": gather, "reduce": scatter}, {"backward": gather} if part == "block" else {}
            assert dp_seconds(3, pp, part) == once | again
            assert dp_seconds(3, pp, part, reshard=False) == once
            each = {"forward": gather, "backward": gather, "reduce": scatter} if part == "block" else once
            assert dp_seconds(3, pp, part, reshard=True) == each
            continue
        assert dp_seconds(2, part=part) == {"gather": gather, "backward": scatter}
        # The root group, embedding and head, stays gathered from forward to backward.
        again = gather.expected if part == "block" else 0.0
        assert dp_seconds(3, part=part) == {"forward": gather, "backward": pytest.approx(again + scatter.expected)}


def test_what_shows_of_communication_is_what_compute_beside_it_leaves_over() -> None:
    brief = {"flops": 1e14, "launch_seconds": 0.0, "memory_bandwidth_bytes_per_second": 1e12}
    slowed = {"overlap_compute_slowdown": 1.25, "overlap_communication_slowdown": 1.5}
    alone = block_of(price(SHARDED[1], small_question(devices=2, hardware=small_hardware(**NOTHING_HIDDEN, **brief))))
    reduced, backward = alone.reduce.dp, alone.backward.total
    assert reduced > 2 * backward > 0  # the reduction outlasts the kernels
    # Both at full pace: the kernels' seconds are gone. At 1.25 and 1.5 they last 1.25 of them, in which the
    # reduction gets 1.25 / 1.5 as far; the rest of it comes after.
    shown = dp_seconds(1, **EVERYTHING_HIDDEN, **brief)["reduce"]
    assert shown == pytest.approx(reduced - backward, rel=1e-12)
    shown = dp_seconds(1, **slowed, **brief)["reduce"]
    assert shown == pytest.approx((1.25 - 1) * backward + reduced - 1.25 / 1.5 * backward, rel=1e-12)
    # A gather hides behind a forward; in zero 3's backward another gather and the reduction behind the backward.
    whole, shown_of_zero3 = (
        block_of(price(SHARDED[3], small_question(devices=2, hardware=small_hardware(**overlap, **brief))))
        for overlap in (NOTHING_HIDDEN, EVERYTHING_HIDDEN)
    )
    assert whole.forward.dp - shown_of_zero3.forward.dp == pytest.approx(whole.forward.compute, rel=1e-9)
    assert whole.backward.dp - shown_of_zero3.backward.dp == pytest.approx(2 * whole.backward.compute, rel=1e-9)
    # Behind kernels that take long enough nothing shows at full pace; at a slower one, what they lose meanwhile.
    endless = {"flops": 1e7}
    assert dp_seconds(1, **EVERYTHING_HIDDEN, **endless).get("reduce", 0.0) == 0.0
    whole_reduce = dp_seconds(1, **NOTHING_HIDDEN, **endless)["reduce"]
    assert dp_seconds(1, **slowed, **endless)["reduce"] == pytest.approx(whole_reduce * 1.5 * (1 - 1 / 1.25), rel=1e-12)


def test_what_nothing_runs_beside_shows_whole() -> None:
    """Embedding and head are gathered first and reduced last. Nor does anything follow a pipeline's last action."""
    for part in ("embedding", "head"):
        for zero in (0, 1, 2, 3):
            shown = dp_seconds(zero, part=part, **EVERYTHING_HIDDEN)
            assert shown == dp_seconds(zero, part=part, **NOTHING_HIDDEN) != {}
    pipelined = dp_seconds(0, 2, **EVERYTHING_HIDDEN)["reduce"]
    assert pipelined == pytest.approx(dp_seconds(0, 2, **NOTHING_HIDDEN)["reduce"], rel=1e-12)


def test_in_bf16_weights_travel_in_bf16_and_gradients_in_fp32() -> None:
    fields = {"devices": 2, "hardware": small_hardware(**NOTHING_HIDDEN), "global_batch": 8}
    fast = small_cluster(2, inside=(1e9, 0.0))
    one, two = (
        block_of(price(Layout(dp=2, zero=1, dp_shard=2), small_question(cluster=fast, precision=precision, **fields)))
        for precision in ("fp32", "bf16")
    )
    parameters = small_question().model.block_parameters
    assert one.gather.dp - two.gather.dp == pytest.approx(0.5 * 2 * parameters / 1e9)
    assert one.reduce.dp == pytest.approx(two.reduce.dp)


def test_the_optimizer_works_on_its_shard_and_accumulation_on_all() -> None:
    plain, shard = price(Layout(dp=4)), price(Layout(dp=4, zero=1, dp_shard=4))
    parameters = small_question().model.block_parameters
    assert block_of(plain).optimizer.total == pytest.approx(10 * 4 * parameters / 1e10)
    assert block_of(shard).optimizer.total == pytest.approx(block_of(plain).optimizer.total / 4)
    # One microbatch needs no sum; of M, M - 1 do.
    alone, four = price(Layout(dp=4, micro_batch=2)), price(Layout(dp=4, micro_batch=1))
    assert (alone.microbatches, four.microbatches) == (1, 2)
    question = small_question(devices=1, global_batch=8)
    backward = [
        price(Layout(micro_batch=1), replace(question, job=replace(question.job, global_batch=batch)))
        for batch in (1, 8)
    ]
    assert block_of(backward[1]).backward.total - block_of(backward[0]).backward.total == pytest.approx(
        7 / 8 * 3 * 4 * parameters / 1e10
    )


def test_a_reduction_hides_behind_what_tp_sends_in_the_same_pass() -> None:
    fast = EVERYTHING_HIDDEN | {"flops": 1e14, "launch_seconds": 0.0, "memory_bandwidth_bytes_per_second": 1e12}

    def shown(tp_factor: float) -> float:
        question = small_question(
            devices=4, hardware=small_hardware(**fast, corrections={"tp": tp_factor, "dp": 100.0})
        )
        return block_of(price(Layout(tp=2, dp=2, zero=1, dp_shard=2), question)).reduce.dp

    sent = block_of(price(Layout(tp=2, dp=2), small_question(devices=4, hardware=small_hardware(**fast)))).backward.tp
    assert shown(1.0) - shown(1.1) == pytest.approx(0.1 * sent)
    assert shown(1e6) == 0.0
