"""The parts of a step, from made-up spans, and what is booked where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import record_function

from runtime.measure import PARTS, OperationTimer, StepMeter, busiest


class SpokenClock:
    """Gives the spans that a test puts in."""

    spans: dict[str, float]

    def read(self) -> dict[str, float]:
        return self.spans


def meter(pp: int, steps: int) -> tuple[StepMeter, SpokenClock]:
    clock: Any = SpokenClock()
    mesh: Any = None
    return StepMeter(mesh, clock, pp, steps), clock


def test_a_pipelined_step() -> None:
    measured, clock = meter(pp=2, steps=10)
    for step in range(1, 11):
        clock.spans = {"forward": 1.0, "backward": 2.0, "reduce": 0.5, "schedule": 5.0}
        if measured.watched(step):
            clock.spans |= {"communication_tp": 0.4, "communication_dp": 0.6}
        measured.end_step(step, step_seconds=6.0 + step / 100, optimizer=0.3, synchronise=0.2)
    # Counted are 3, 7, 8, 9 and 10: the first two warm up, 4 to 6 are watched.
    assert measured.median_step() == 8
    table = measured.table(8)
    assert list(table) == list(PARTS)
    assert table == pytest.approx(
        {
            "compute": 2.5,
            "tp": 0.4,
            "cp": 0.0,
            "ep": 0.0,
            "pp_bubble": 1.7,
            "dp_exposed": 0.6,
            "optimizer": 0.3,
            "other": 0.58,
        }
    )
    assert sum(table.values()) == pytest.approx(measured.seconds(8)) == pytest.approx(6.08)


def test_without_a_pipeline_there_is_no_bubble() -> None:
    measured, clock = meter(pp=1, steps=4)
    for step in range(1, 5):
        clock.spans = {"forward": 1.0, "backward": 2.0, "schedule": 3.1, "communication_dp": 9.0}
        measured.end_step(step, step_seconds=4.0, optimizer=0.3, synchronise=0.2)
    # A short run watches its last step. What is booked never exceeds what was there to take it from.
    assert [step for step in range(1, 5) if measured.watched(step)] == [4]
    assert measured.table(measured.median_step()) == pytest.approx(
        {
            "compute": 0.0,
            "tp": 0.0,
            "cp": 0.0,
            "ep": 0.0,
            "pp_bubble": 0.0,
            "dp_exposed": 3.1,
            "optimizer": 0.5,
            "other": 0.4,
        }
    )


def test_the_busiest_rank() -> None:
    assert busiest([{"compute": 1.0}, {"compute": 2.0}, {"compute": 2.0}]) == 1


class NamedSpans:
    """Notes what is booked, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.points = 0

    def point(self) -> int:
        self.points += 1
        return self.points

    def add(self, name: str, start: int) -> None:
        self.names.append(f"{name} from {start}")


class NoMesh:
    """Every axis has a group, with its own name."""

    group_name = "a group"
    expert_mesh = None
    context_group = None

    def groups(self, _axis: str) -> list[NoMesh]:
        return [self]


def test_all_that_fsdp_does_is_booked_once_and_as_dp() -> None:
    clock: Any = NamedSpans()
    mesh: Any = NoMesh()
    x = torch.ones(4, 4)
    with OperationTimer(mesh, clock):
        torch.add(x, x)
        with record_function("FSDP::pre_forward (0)"):
            torch.add(x, x)
            with record_function("FSDP::all_gather (0)"):
                torch.mm(x, x)
            with record_function("what it calls"):
                torch.add(x, x)
        with record_function("a person's own"):
            torch.mm(x, x)
    assert clock.names == ["kernel_memory from 1", "communication_dp from 2", "kernel_gemm from 6"]
