"""torch's own action lists, with and without communication, and a clock that runs them entry by entry.

The clock knows nothing of ours but the durations: it reads the lists that torch writes for its runtime
(`_prepare_schedule_with_comms`) and does what `_PipelineScheduleRuntime._step_microbatches` does with each entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

from planner.schedule import Pipeline
from planner.simulation import StageSeconds

TORCH_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "looped-bfs": "LoopedBFS",
    "zb1p": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
LISTED = tuple(name for name in TORCH_NAMES if name not in ("gpipe", "1f1b"))


def torch_schedule(pipeline: Pipeline) -> Any:
    """torch's schedule object, on stages that compute nothing; it raises ValueError for what it does not run.

    `get_schedule_ops` makes it the same way, but asks for two chunks a rank where one is fine too.
    """
    from torch.distributed.pipelining.schedules import get_schedule_class
    from torch.distributed.pipelining.stage import PipelineStage

    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, pipeline.ranks, pipeline.stages, None
    stages = [stage] * pipeline.chunks if pipeline.schedule in LISTED else stage
    return get_schedule_class(TORCH_NAMES[pipeline.schedule])(stages, pipeline.microbatches)


def torch_lists(pipeline: Pipeline) -> list[list[str]]:
    """Each rank's actions as text, without the bubbles and reductions that torch writes among them."""
    order = torch_schedule(pipeline).pipeline_order
    return [
        [str(action) for action in order[rank] if action is not None and "REDUCE" not in str(action)]
        for rank in range(pipeline.ranks)
    ]


def torch_listed_seconds(pipeline: Pipeline, durations: Sequence[StageSeconds], hops: Sequence[float]) -> float:
    """Seconds until every rank is through its list: sends posted and left, receives waited for by their consumers.

    Sends from one rank to another go one after the other. A pipeline that receives early has posted all receives at
    the start.
    """
    lists = torch_schedule(pipeline).pipeline_order_with_comms
    at, clock = [0] * pipeline.ranks, [0.0] * pipeline.ranks
    posted: dict[tuple[str, int, int], float] = {}
    forwards_seen: set[int] = set()
    holder = {int(a.stage_index): rank for rank, actions in lists.items() for a in actions if a.stage_index >= 0}

    ahead: dict[tuple[str, int, int], tuple[str, int, int, int] | None] = {}  # in the queue from rank to rank
    queued: dict[tuple[int, int], tuple[str, int, int, int]] = {}
    for rank, actions in lists.items():
        for action in actions:
            direction, source, microbatch = (
                action.computation_type.value[-1],
                action.stage_index,
                action.microbatch_index,
            )
            if action.computation_type.value.startswith("SEND"):
                stage = source + (1 if direction == "F" else -1)
                ahead[direction, source, microbatch] = queued.get((rank, holder[stage]))
                queued[rank, holder[stage]] = (direction, source, stage, microbatch)

    def arrival(direction: str, source: int, stage: int, microbatch: int) -> float | None:
        """When the transfer is over; 0 where no transfer is needed, None where a side has not posted it yet."""
        if not 0 <= source < pipeline.stages or holder[source] == holder[stage]:
            return 0.0
        sent = posted.get((f"SEND_{direction}", source, microbatch))
        received = 0.0 if pipeline.receives_early else posted.get((f"RECV_{direction}", stage, microbatch))
        first = ahead[direction, source, microbatch]
        before = arrival(*first) if first else 0.0
        if sent is None or received is None or before is None:
            return None
        return max(sent, received, before) + hops[min(source, stage)]

    def compute(rank: int, action: Any) -> bool:
        stage, kind, microbatch = action.stage_index, action.computation_type.value, action.microbatch_index
        seconds = durations[stage]
        start: float | None = 0.0
        if kind == "F":
            start = arrival("F", stage - 1, stage, microbatch)
            cost = seconds.forward + (0.0 if stage in forwards_seen else seconds.gather)
        elif kind == "W":
            cost = seconds.backward_weight
        else:
            start = arrival("B", stage + 1, stage, microbatch)
            cost = seconds.backward_input + (seconds.backward_weight if kind == "B" else 0.0)
        if start is None:
            return False
        forwards_seen.add(stage) if kind == "F" else None
        clock[rank] = max(clock[rank], start) + cost
        return True

    half: dict[int, int] = {}  # parts of an overlap that have run
    moved = True
    while moved:
        moved = False
        for rank in range(pipeline.ranks):
            while at[rank] < len(lists[rank]):
                action = lists[rank][at[rank]]
                kind = action.computation_type.value
                if kind.startswith(("SEND", "RECV")):
                    posted[kind, action.stage_index, action.microbatch_index] = clock[rank]
                elif kind == "REDUCE_GRAD":
                    clock[rank] += durations[action.stage_index].reduce
                elif "SHARD" not in kind:
                    parts = action.sub_actions or (action,)
                    done = half.get(rank, 0)
                    while done < len(parts) and compute(rank, parts[done]):
                        done += 1
                    half[rank] = done % len(parts)
                    if done < len(parts):
                        break
                at[rank] += 1
                moved = True
    assert all(at[rank] == len(lists[rank]) for rank in range(pipeline.ranks)), "deadlock"
    return max(clock)
