"""Event simulation of a pipeline: seconds, the critical path, and paths that every simulation contains.

How torch runs a schedule is in `event_graph.py`; here durations meet it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from . import event_graph as events
from .event_graph import EventGraph, GraphCache, work_steps
from .schedule import BLOCKING, Pipeline, action_lists
from .schedule_orders import BACKWARD, FORWARD, INPUT, WEIGHT

_GRAPHS = GraphCache(most_events=3_000_000)  # 48 MB


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Durations on one stage: of a microbatch, and once a step.

    A whole backward takes both backwards. `gather` adds to the first forward; `reduce` follows the rank's last
    action in gpipe and 1f1b, else the stage's own last backward.
    """

    forward: float
    backward_input: float
    backward_weight: float
    gather: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True)
class Path:
    """How often each duration lies on one path through a schedule: seconds = counts · durations.

    Linear in the durations, so any path is a lower bound on the makespan of every assignment.
    """

    forward: tuple[int, ...]
    backward_input: tuple[int, ...]
    backward_weight: tuple[int, ...]
    gather: tuple[int, ...]
    reduce: tuple[int, ...]
    sends: tuple[int, ...]  # messages of each hop

    def seconds(self, durations: Sequence[StageSeconds], hop_seconds: Sequence[float]) -> float:
        total = self.sent_seconds(hop_seconds)
        for i, stage in enumerate(durations):
            total += self.stage_seconds(i, stage)
        return total

    def stage_seconds(self, i: int, stage: StageSeconds) -> float:
        """Of these, those that stage i takes."""
        total = self.forward[i] * stage.forward
        total += self.backward_input[i] * stage.backward_input + self.backward_weight[i] * stage.backward_weight
        return total + self.gather[i] * stage.gather + self.reduce[i] * stage.reduce

    def sent_seconds(self, hop_seconds: Sequence[float]) -> float:
        """Of them those of messages."""
        return sum(map(operator.mul, self.sends, hop_seconds))


@dataclass(frozen=True)
class Simulation:
    """Seconds from the first action to the last reduction, and the path that took so long."""

    seconds: float
    critical_path: Path
    busy_seconds: tuple[float, ...]  # per rank: its own actions, gathers and reductions

    @property
    def bubble(self) -> tuple[float, ...]:
        """Per rank, the share of the seconds in which it does nothing."""
        return tuple(1.0 - busy / self.seconds if self.seconds > 0 else 0.0 for busy in self.busy_seconds)


def simulate(pipeline: Pipeline, durations: Sequence[StageSeconds], hop_seconds: Sequence[float]) -> Simulation:
    """Play the schedule with these durations.

    Args:
        durations: one per stage (not per rank), in seconds.
        hop_seconds: of each stage but the last, one message between it and the next where that is of another rank.
    """
    assert len(durations) == len(hop_seconds) + 1 == pipeline.stages, (len(durations), len(hop_seconds), pipeline)
    graph = _GRAPHS.graph(pipeline)
    times = _times(graph, _costs(durations, hop_seconds))
    last = max(graph.ends, key=times.__getitem__)
    busy = [0.0] * pipeline.ranks
    for stage, each in enumerate(durations):
        microbatch = each.forward + each.backward_input + each.backward_weight
        busy[pipeline.rank_of(stage)] += pipeline.microbatches * microbatch + each.gather + each.reduce
    return Simulation(times[last], _trace(graph, times, last, pipeline.stages), tuple(busy))


def event_times(
    graph: EventGraph, durations: Sequence[StageSeconds], hop_seconds: Sequence[float]
) -> tuple[list[float], list[float]]:
    """(seconds by the numbers of `event_graph`, when each event is over)."""
    costs = _costs(durations, hop_seconds)
    return costs, _times(graph, costs)


def _costs(durations: Sequence[StageSeconds], hop_seconds: Sequence[float]) -> list[float]:
    """Seconds by the numbers of `event_graph`."""
    costs = [0.0]
    for each, send in zip(durations, (*hop_seconds, 0.0), strict=True):
        forward, first, second = each.forward, each.backward_input, each.backward_weight
        costs += [each.gather + forward, forward, first + second, first, second, each.reduce, send]
    return costs


def _times(graph: EventGraph, costs: Sequence[float]) -> list[float]:
    """When each event is over."""
    times = [0.0]
    append = times.append
    for first, second, third, cost in zip(*graph.waits, graph.costs, strict=True):
        start = times[first]
        if second and times[second] > start:
            start = times[second]
        if third and times[third] > start:
            start = times[third]
        append(start + costs[cost])
    return times


def _trace(graph: EventGraph, times: Sequence[float], last: int, stages: int) -> Path:
    """The path that ends in event `last`, going back by what was waited for longest, the own rank where equal."""
    first, second, third = graph.waits
    counts = [0] * (1 + events.COSTS * stages)
    at = last
    while at:
        counts[graph.costs[at - 1]] += 1
        a, b, c = first[at - 1], second[at - 1], third[at - 1]
        at = b if times[b] > times[a] else a
        at = c if times[c] > times[at] else at

    def of(kind: int) -> list[int]:
        return counts[kind :: events.COSTS]

    gathered, whole = of(events.GATHERED_FORWARD), of(events.RUN_BACKWARD)
    return Path(
        forward=_sums(gathered, of(events.RUN_FORWARD)),
        backward_input=_sums(whole, of(events.RUN_INPUT)),
        backward_weight=_sums(whole, of(events.RUN_WEIGHT)),
        gather=tuple(gathered),
        reduce=tuple(of(events.REDUCE)),
        sends=tuple(of(events.SEND)[:-1]),
    )


def _sums(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int.__add__, a, b))


# ---- paths known beforehand ----------------------------------------------------------------------------------


def blocked_sends(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """Sends to either neighbour that the stage itself waits for in 1F1B's steady state; GPipe: none.

    That is after its first backward. Each steady forward follows a fused wait for the gradient just sent up, each
    steady backward one for the activation just sent down.
    """
    return 0 if schedule == "gpipe" else microbatches - min(microbatches, stages - stage)


def late_forwards(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """Forwards that a stage runs after microbatch 0 has come down to it and gone all the way round."""
    return microbatches - (min(microbatches, stages - stage) if schedule == "1f1b" else 1)


def known_paths(pipeline: Pipeline) -> list[Path]:
    """Paths that every simulation of the schedule contains, three a rank: where the cuts start.

    Through rank r: the first forward comes down to r, r works off its list to its last backward, which goes up.
    Round trip: the microbatch of r's first backward goes all the way down and up to r, r works off what is left of
    its list, and its last backward goes up. Own work: as the first, but to the end of r's list.
    """
    if pipeline.schedule in BLOCKING:
        return _blocking_paths(pipeline.schedule, pipeline.stages, pipeline.microbatches)
    return list(_listed_paths(pipeline))


def _blocking_paths(schedule: str, stages: int, microbatches: int) -> list[Path]:
    paths = []
    first = tuple(1 if i == 0 else 0 for i in range(stages))
    for s in range(stages):
        at_s = tuple(1 if i == s else 0 for i in range(stages))
        blocked = blocked_sends(schedule, s, stages, microbatches)
        through = tuple(1 if i < s else microbatches if i == s else 0 for i in range(stages))
        own = tuple(microbatches if i == s else 0 for i in range(stages))
        late = late_forwards(schedule, s, stages, microbatches)
        forward = tuple(1 + late * at for at in at_s)
        backward = tuple(microbatches if at else 1 for at in at_s)
        down = tuple(1 if i <= s else 0 for i in range(stages))
        sends = [tuple(n * (i < s) + blocked * (s - 1 <= i <= s) for i in range(stages - 1)) for n in (2, 1)]
        paths.append(Path(through, through, through, down, first, sends[0]))
        # GPipe's later microbatches find the weights below s gathered already.
        round_trip = (1,) * stages if schedule == "1f1b" else down
        around = tuple(2 + blocked * (s - 1 <= i <= s) for i in range(stages - 1))
        paths.append(Path(forward, backward, backward, round_trip, first, around))
        paths.append(Path(through, own, own, down, at_s, sends[1]))
    return paths


@lru_cache(maxsize=96)
def _listed_paths(pipeline: Pipeline) -> tuple[Path, ...]:
    lists = [work_steps(actions, pipeline.microbatches) for actions in action_lists(pipeline)]
    last, rank_of = pipeline.stages - 1, pipeline.rank_of
    backwards = [
        {(stage, i): n for n, (stage, kind, i) in enumerate(steps) if kind in (BACKWARD, INPUT)} for steps in lists
    ]
    paths = []
    for rank, steps in enumerate(lists):
        # The last backward of a list is its first chunk's, so it goes up over ranks r-1 to 0.
        (turned, first_microbatch), first_back = next(iter(backwards[rank].items()))
        (stage, last_microbatch), last_back = next(reversed(backwards[rank].items()))
        assert stage == rank, (pipeline, rank)
        down = [(stage, FORWARD, 0) for stage in range(rank)]
        up = [lists[stage][backwards[stage][stage, last_microbatch]] for stage in range(rank - 1, 0, -1)]
        place = backwards[0][0, last_microbatch]
        up += lists[0][place:] if rank else lists[0][place + 1 :]
        begin = lists[0].index((0, FORWARD, first_microbatch))
        trip = lists[0][:begin] + [(stage, FORWARD, first_microbatch) for stage in range(last + 1)]
        for stage in range(last, turned, -1):
            trip.append(lists[rank_of(stage)][backwards[rank_of(stage)][stage, first_microbatch]])
        for path in (
            [*down, *steps[: last_back + 1], *up],
            [*trip, *steps[first_back : last_back + 1], *up],
            [*down, *steps],
        ):
            paths.append(_counted(pipeline, path))
    return tuple(paths)


def _counted(pipeline: Pipeline, path: Sequence[tuple[int, str, int]]) -> Path:
    """Where the path changes rank it waits for a send; a stage's first forward is of microbatch 0."""
    counts: dict[str, list[int]] = {kind: [0] * pipeline.stages for kind in (*"FBIWR", "gather")}
    ranks = [pipeline.rank_of(stage) for stage in range(pipeline.stages)]
    sends, before = [0] * (pipeline.stages - 1), path[0][0]
    for stage, kind, microbatch in path:
        if ranks[stage] != ranks[before]:
            assert abs(stage - before) == 1, (pipeline, before, stage)
            sends[min(stage, before)] += 1
        before = stage
        counts[kind][stage] += 1
        if kind == FORWARD and microbatch == 0:
            counts["gather"][stage] += 1
    whole = counts[BACKWARD]
    return Path(
        forward=tuple(counts[FORWARD]),
        backward_input=_sums(whole, counts[INPUT]),
        backward_weight=_sums(whole, counts[WEIGHT]),
        gather=tuple(counts["gather"]),
        reduce=tuple(counts["R"]),
        sends=tuple(sends),
    )
