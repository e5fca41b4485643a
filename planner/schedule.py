"""Pipeline schedules as action lists, and their event simulation: seconds, in-flight microbatches, critical path.

[Note: Action lists]
A schedule is one list of actions per pipeline rank. An action is written as torch writes it: stage, F or B,
microbatch, so `1F0` is the forward of microbatch 0 on stage 1. The same lists give the in-flight counts
(forwards done minus backwards done) and, with the point-to-point operations that torch issues around each
action, the simulation.

[Note: Blocking point-to-point]
torch's GPipe and 1F1B run on the host: a receive is posted and waited for just before the action that needs
it; in 1F1B's steady state the send of one direction and the receive of the other are one batch and both are
waited for. A transfer starts when both sides have posted it. The simulation does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Action:
    """One forward (F) or backward (B) of a microbatch on a stage."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def action_lists(schedule: str, stages: int, microbatches: int) -> list[list[Action]]:
    """The actions of each rank, in order, for `gpipe` or `1f1b`."""
    return [
        [Action(stage, kind, microbatch) for kind, microbatch in _order(schedule, stage, stages, microbatches)]
        for stage in range(stages)
    ]


def _order(schedule: str, stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    if schedule == "gpipe":
        return [(kind, i) for kind in "FB" for i in range(microbatches)]
    assert schedule == "1f1b", schedule
    # min(M, p - s) warm-up forwards, then one backward and one forward in turn (arXiv 2104.04473, fig. 4).
    warmup = min(microbatches, stages - stage)
    order = [("F", i) for i in range(warmup)]
    for i in range(microbatches):
        order.append(("B", i))
        if warmup + i < microbatches:
            order.append(("F", warmup + i))
    return order


def in_flight(schedule: str, stages: int, microbatches: int) -> list[int]:
    """The most microbatches whose forward is done and backward is not, per stage, read off the lists."""
    steps = {"F": 1, "B": -1}
    return [
        max(accumulate(steps[kind] for kind, _ in _order(schedule, stage, stages, microbatches)))
        for stage in range(stages)
    ]


@dataclass(frozen=True)
class StageSeconds:
    """Durations on one stage. `gather` adds to its first forward; `reduce` follows its last action."""

    forward: float
    backward: float
    gather: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True)
class Path:
    """How often each duration lies on one path through a schedule: seconds = counts · durations.

    Linear in the durations, so any path is a lower bound on the makespan of every assignment.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    gather: tuple[int, ...]
    reduce: tuple[int, ...]
    sends: int

    def seconds(self, stages: Sequence[StageSeconds], send_seconds: float) -> float:
        total = self.sends * send_seconds
        for i, stage in enumerate(stages):
            total += self.forward[i] * stage.forward + self.backward[i] * stage.backward
            total += self.gather[i] * stage.gather + self.reduce[i] * stage.reduce
        return total


@dataclass(frozen=True)
class Simulation:
    """Seconds from the first action to the last reduction, and the path that took so long."""

    seconds: float
    critical_path: Path


# Operations of a rank's program: run an action, post a send, or wait (posting what is not posted yet).
_RUN, _POST, _WAIT = 0, 1, 2


def _program(schedule: str, stage: int, stages: int, microbatches: int) -> list[tuple[int, list[tuple[str, int, int]]]]:
    """What torch's schedule does on this rank; a transfer is (direction, sending stage, microbatch)."""
    first, last = stage == 0, stage == stages - 1

    def receive(kind: str, microbatch: int) -> list[tuple[str, int, int]]:
        if kind == "F":
            return [] if first else [("F", stage - 1, microbatch)]
        return [] if last else [("B", stage + 1, microbatch)]

    def send(kind: str, microbatch: int) -> list[tuple[str, int, int]]:
        missing = last if kind == "F" else first
        return [] if missing else [(kind, stage, microbatch)]

    order = _order(schedule, stage, stages, microbatches)
    program: list[tuple[int, list[tuple[str, int, int]]]] = []
    if schedule == "gpipe":
        for kind in "FB":
            for i in range(microbatches):
                program.append((_WAIT, receive(kind, i)))
                program.append((_RUN, [(kind, stage, i)]))
                program.append((_POST, send(kind, i)))
            program += [(_WAIT, send(kind, i)) for i in range(microbatches)]
        return program
    warmup = min(microbatches, stages - stage)
    cooldown = 2 * microbatches - warmup  # position of the first backward that no forward follows
    held: list[tuple[str, int, int]] = []
    fired: list[tuple[str, int, int]] = []
    for position, (kind, i) in enumerate(order):
        program.append((_WAIT, held + receive(kind, i)))
        program.append((_RUN, [(kind, stage, i)]))
        held = send(kind, i)
        if position < warmup or position > cooldown:
            program.append((_WAIT, fired))  # warm-up and cool-down look after the send before
        if position < warmup - 1 or position >= cooldown:
            program.append((_POST, held))
            held, fired = [], held
    program.append((_WAIT, fired))
    return program


def simulate(schedule: str, durations: Sequence[StageSeconds], microbatches: int, send_seconds: float) -> Simulation:
    """Play the schedule's programs against each other; a transfer starts when both sides have posted it.

    Args:
        durations: one per stage, in seconds.
        send_seconds: one message between neighbouring stages.
    """
    stages = len(durations)
    times: list[float] = [0.0]
    previous: list[int] = [-1]
    labels: list[tuple[str, int] | None] = [None]

    def event(time: float, before: int, label: tuple[str, int] | None) -> int:
        times.append(time)
        previous.append(before)
        labels.append(label)
        return len(times) - 1

    programs = [_program(schedule, stage, stages, microbatches) for stage in range(stages)]
    position = [0] * stages
    now = [0] * stages  # each rank's latest event
    posted: dict[tuple[str, int, int], tuple[int, int]] = {}  # transfer -> (poster, event), one side so far
    ended: dict[tuple[str, int, int], int] = {}
    ready = list(range(stages))

    def post(stage: int, transfer: tuple[str, int, int]) -> None:
        other = posted.get(transfer)
        if other is None:
            posted[transfer] = (stage, now[stage])
        elif other[0] != stage and transfer not in ended:
            later = max(other[1], now[stage], key=times.__getitem__)
            ended[transfer] = event(times[later] + send_seconds, later, ("P", 0))
            ready.append(other[0])

    while ready:
        stage = ready.pop()
        program, duration = programs[stage], durations[stage]
        while position[stage] < len(program):
            operation, items = program[position[stage]]
            if operation == _RUN:
                kind, _, microbatch = items[0]
                seconds = duration.forward if kind == "F" else duration.backward
                if kind == "F" and microbatch == 0 and duration.gather > 0:
                    now[stage] = event(times[now[stage]] + duration.gather, now[stage], ("G", stage))
                now[stage] = event(times[now[stage]] + seconds, now[stage], (kind, stage))
            else:
                for transfer in items:
                    post(stage, transfer)
                if operation == _WAIT:
                    if any(transfer not in ended for transfer in items):
                        break
                    for transfer in items:
                        if times[ended[transfer]] > times[now[stage]]:
                            now[stage] = ended[transfer]
            position[stage] += 1
    assert all(position[s] == len(programs[s]) for s in range(stages)), "the schedule deadlocks"
    ends = [event(times[now[s]] + durations[s].reduce, now[s], ("R", s)) for s in range(stages)]
    last = max(ends, key=times.__getitem__)
    return Simulation(times[last], _trace(last, previous, labels, stages))


def _trace(last: int, previous: list[int], labels: list[tuple[str, int] | None], stages: int) -> Path:
    counts = {kind: [0] * stages for kind in "FBGR"}
    sends = 0
    at = last
    while at >= 0:
        label = labels[at]
        if label is not None:
            if label[0] == "P":
                sends += 1
            else:
                counts[label[0]][label[1]] += 1
        at = previous[at]
    return Path(tuple(counts["F"]), tuple(counts["B"]), tuple(counts["G"]), tuple(counts["R"]), sends)


def blocked_sends(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """Sends that the stage itself waits for in 1F1B's steady state, after its first backward; GPipe: none.

    Each steady forward follows a fused wait for the gradient just sent up, each steady backward one for the
    activation just sent down.
    """
    if schedule == "gpipe":
        return 0
    steady = microbatches - min(microbatches, stages - stage)
    return steady * ((stage > 0) + (stage < stages - 1))


def late_forwards(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """Forwards that a stage runs after microbatch 0 has come down to it and gone all the way round."""
    return microbatches - (min(microbatches, stages - stage) if schedule == "1f1b" else 1)


def known_paths(schedule: str, stages: int, microbatches: int) -> list[Path]:
    """Paths that every simulation of the schedule contains, three a stage: where the cuts start.

    Through stage s: the first forward comes down to s, s works M microbatches, the last backward goes up.
    Round trip: microbatch 0 goes all the way down and up to s, s does what it had not done before, and the
    last backward goes up. Own work: as the first, but ending in the reduction of s.
    """
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
        paths.append(Path(through, through, down, first, 2 * s + blocked))
        # GPipe's later microbatches find the weights below s gathered already.
        round_trip = (1,) * stages if schedule == "1f1b" else down
        paths.append(Path(forward, backward, round_trip, first, 2 * (stages - 1) + blocked))
        paths.append(Path(through, own, down, at_s, s + blocked))
    return paths
