"""What the axes inside a layer send: tp around its products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.axis_cost import AxisModel, Passes
from planner.comm_cost import CommModel, Group
from planner.compute_seconds import ComputeCost, ComputeSeconds
from planner.layout import Layout
from planner.part_seconds import PHASES
from profiles.experts_spec import Experts
from profiles.points import WaitPoint
from profiles.software import load_software
from tests.oracles.small_world import block_of, price, small_hardware, small_question
from tests.plans import tiny_llama


def test_what_tp_sends() -> None:
    layout = Layout(tp=4, micro_batch=2)
    question = small_question(devices=4)
    comm = CommModel(question.cluster, question.hardware)
    hidden = 4.0 * 2 * 16 * 32
    reduced = comm.collective_seconds("all_reduce", Group(4, 1), hidden)
    loss = comm.collective_seconds("all_gather", Group(4, 1), 4.0 * 4 * 2 * 16)
    plain = price(layout)
    assert block_of(plain).forward.tp == block_of(plain).backward.tp == pytest.approx(2 * reduced)
    # The recomputation ends before the sum that ends the MLP.
    assert block_of(plain).recompute_full.tp == pytest.approx(reduced)
    assert (plain.embedding.forward.tp, plain.embedding.backward.tp) == (pytest.approx(reduced), 0.0)
    assert (plain.head.forward.tp, plain.head.backward.tp) == (pytest.approx(loss), pytest.approx(reduced))
    cut = price(replace(layout, sequence_parallel=True))
    gather = comm.collective_seconds("all_gather", Group(4, 1), hidden)
    scatter = comm.collective_seconds("reduce_scatter", Group(4, 1), hidden)
    assert block_of(cut).forward.tp == block_of(cut).backward.tp == pytest.approx(2 * (gather + scatter))
    assert block_of(cut).recompute_full.tp == pytest.approx(2 * gather + scatter)
    assert (cut.embedding.forward.tp, cut.embedding.backward.tp) == (pytest.approx(scatter), pytest.approx(gather))
    assert (cut.head.forward.tp, cut.head.backward.tp) == (pytest.approx(gather + loss), pytest.approx(scatter))


def test_the_loss_is_agreed_on_piece_by_piece_or_in_three_sums() -> None:
    """2 x 1040 tokens: two pieces of 1024 and one of 32, each with 4 bytes a token and rank."""
    layout, model = Layout(tp=4, micro_batch=2), tiny_llama()
    question = small_question(model, devices=4, sequence=1040)
    comm = CommModel(question.cluster, question.hardware)
    ours, titan = (
        AxisModel(model, question.hardware, comm, question.job, load_software(name).software).head_tp(layout)
        for name in ("meshwright", "torchtitan-2024")
    )
    gathers = [comm.collective_seconds("all_gather", Group(4, 1), 4.0 * 4 * rows) for rows in (1024, 1024, 32)]
    assert ours.forward == pytest.approx(sum(gathers))
    assert titan.forward == pytest.approx(3 * comm.collective_seconds("all_reduce", Group(4, 1), 4.0 * 2 * 1040))
    assert ours.backward == titan.backward > 0


def test_ranks_wait_for_the_slowest_wherever_they_meet() -> None:
    """A hundredth of the compute since they met last; all-to-all and experts meet twice a pass, a ring once."""
    waits = tuple(WaitPoint(compute_seconds=c, wait_seconds=c / 100) for c in (1e-9, 1.0))
    experts = tiny_llama(experts=Experts(number=4, top_k=2, ffn_hidden_size=64))
    compute = ComputeCost(ComputeSeconds(gemm=0.2), ComputeSeconds(gemm=0.3), ComputeSeconds(gemm=0.3))

    def passes(layout: Layout, **changes: Any) -> Passes:
        question = small_question(experts, hardware=small_hardware(**changes))
        comm, software = CommModel(question.cluster, question.hardware), load_software("meshwright").software
        axes = AxisModel(experts, question.hardware, comm, question.job, software)
        if layout.ep > 1:
            return axes.block_ep(layout, compute)
        return axes.block_tp(layout, compute, "dense") if layout.tp > 1 else axes.block_cp(layout, compute)

    cp = [Layout(cp=2, cp_style=style) for style in ("all-to-all", "ring")]
    for layout in (Layout(tp=2), *cp, Layout(dp=2, ep=2)):
        waiting, alone = passes(layout, waits=waits), passes(layout)
        assert waiting.forward - alone.forward == pytest.approx(0.002, rel=1e-6)
        assert waiting.backward - alone.backward == pytest.approx(0.006, rel=1e-6)


def test_without_tp_and_dp_nothing_is_sent() -> None:
    costs = price(Layout())
    for part in (block_of(costs), costs.embedding, costs.head):
        assert all(getattr(part, phase).tp == getattr(part, phase).dp == 0.0 for phase in PHASES)
    assert costs.hop_seconds == ()
    assert costs.step_seconds == 0.0
