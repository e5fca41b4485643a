"""Receives posted at a step's start stand in the order in which their partners send."""

from __future__ import annotations

from hypothesis import given, settings

from planner.schedule import Pipeline
from runtime.early_receives import BACKWARD, FORWARD, receives_in_order
from tests.oracles.torch_lists import LISTED, torch_schedule
from tests.test_schedule import pipelines

_SENDS = {"SEND_F": (FORWARD, 1), "SEND_B": (BACKWARD, -1)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pipelines(most_microbatches=13).filter(lambda pipeline: pipeline.schedule in LISTED))
def test_receives_stand_in_the_order_of_the_partners_sends(pipeline: Pipeline) -> None:
    schedule = torch_schedule(pipeline)
    for receiver in range(pipeline.ranks):
        schedule.rank = receiver
        received = list(receives_in_order(schedule, pipeline.stages_of(receiver)))
        for sender in set(range(pipeline.ranks)) - {receiver}:
            sent = []
            for action in schedule.pipeline_order_with_comms[sender]:
                if (found := _SENDS.get(action.computation_type.value)) is not None:
                    kind, step = found
                    if pipeline.rank_of(action.stage_index + step) == receiver:
                        sent.append((action.stage_index + step, kind, action.microbatch_index))
            of_sender = [
                (stage, kind, microbatch)
                for stage, kind, microbatch in received
                if pipeline.rank_of(stage - (1 if kind == FORWARD else -1)) == sender
            ]
            assert of_sender == sent
