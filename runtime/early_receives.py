"""Receives of a pipeline's step posted at its start, on gloo.

[Note: Early receives]
gloo sends a message once its receiver is there. A receive that is posted while the partner computes has the thread
that serves the connection wake up on a core that is busy, and the rank that posts it, holding the connection's lock,
can lose its own core to a thread that waits for that lock: a slice of the scheduler's, several milliseconds. torch
keeps a buffer for every microbatch, so all receives of a step can be posted before its first action, in the order in
which the partner sends. On NCCL a receive holds up what is queued behind it, so there torch posts each where its
schedule says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _Action,
    _ComputationType,
)

FORWARD, BACKWARD = "F", "B"
_RECEIVES = {_ComputationType.RECV_F: FORWARD, _ComputationType.RECV_B: BACKWARD}


class Receiver(Protocol):
    """A stage that says what it receives: torch's operations for the input, or the gradient, of a microbatch."""

    stage_index: int

    def receives(self, kind: str, microbatch: int) -> list[dist.P2POp]: ...


class EarlyReceives:
    """The receives of one rank's stages. `begin` each step; stages post at their first request, and then wait."""

    def __init__(self, schedule: PipelineScheduleSingle | PipelineScheduleMulti, stages: Sequence[Receiver]) -> None:
        self._stages = {stage.stage_index: stage for stage in stages}
        self._order = list(receives_in_order(schedule, [stage.stage_index for stage in stages]))
        self._works: dict[tuple[int, str, int], list[Any]] | None = None

    def begin(self) -> None:
        """Before a step: nothing is posted yet. torch makes the buffers when the first step has begun."""
        assert not self._works, f"nobody waited for {list(self._works or ())}"
        self._works = None

    def post(self) -> None:
        """Post all receives of this step, if that is still to do."""
        if self._works is not None:
            return
        self._works = {}
        for place, kind, microbatch in self._order:
            if operations := self._stages[place].receives(kind, microbatch):
                self._works[place, kind, microbatch] = dist.batch_isend_irecv(operations)

    def wait(self, place: int, kind: str, microbatch: int) -> None:
        """Until the stage at `place` has its input or gradient, if that comes from another rank."""
        for work in (self._works or {}).pop((place, kind, microbatch), ()):
            work.wait()


def receives_in_order(
    schedule: PipelineScheduleSingle | PipelineScheduleMulti, places: Sequence[int]
) -> Iterator[tuple[int, str, int]]:
    """(stage, kind, microbatch) as the partners send them."""
    if isinstance(schedule, PipelineScheduleSingle):
        for kind in (FORWARD, BACKWARD):
            yield from ((places[0], kind, i) for i in range(schedule._n_microbatches))
        return
    actions: Sequence[_Action] = schedule.pipeline_order_with_comms[schedule.rank]  # type: ignore[attr-defined]
    for action in actions:
        if (kind := _RECEIVES.get(action.computation_type)) is not None:
            assert action.microbatch_index is not None
            yield action.stage_index, kind, action.microbatch_index
