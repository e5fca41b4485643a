"""A pipeline's events as a graph that holds for any durations: what each waits for and what it costs.

[Note: Events]
An event is over when the last of the (at most three) events it waits for is over and then its own duration has
passed: the run of an action, a transfer, or a gradient reduction. What waits for what follows from the action lists
and from how torch 2.13 runs them, and never from the durations, so one graph serves all of them and every path
through it is a lower bound on the makespan. Events are numbered so that each waits for smaller numbers only;
number 0 is the start.

[Note: Blocking point-to-point]
torch's GPipe and 1F1B run on the host: a receive is posted and waited for just before the action that needs it; in
1F1B's steady state the send of one direction and the receive of the other are one batch and both are waited for. A
transfer starts when both sides have posted it. Gradients are reduced after the last action.

[Note: Posted point-to-point]
torch runs all other schedules from lists with communication written in: a send stands right after its action (after
both parts of an overlap) and is not waited for; its receive is put in the receiver's list where that list has got to
when all ranks are written down one entry a turn. The entries that gather and free a stage's weights take turns too.
A receive is waited for just before its consumer, so a transfer may start no earlier than the receiver gets to its
entry. Gradients are reduced right after the stage's last backward. Stages of the same rank need no transfer.

[Note: Early receives]
On gloo our runtime posts all receives of a step before its first action, whatever the schedule, and a transfer starts
when it is sent.

[Note: Messages queue]
What a rank sends to another goes one after the other over their connection (gloo, and NCCL on one communicator), so a
transfer waits for the one before it from the same rank to the same rank. With several chunks that is what a slow link
costs: v chunks send 2·v-1 messages a microbatch each way where one chunk sends one.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from .schedule import BLOCKING, Action, Pipeline, action_lists
from .schedule_orders import BACKWARD, FORWARD, INPUT, WEIGHT

# What an event costs is a number: NOTHING, or COSTS·stage + one of these. SEND is a message between the stage and the
# next one, either way.
NOTHING = 0
GATHERED_FORWARD, RUN_FORWARD, RUN_BACKWARD, RUN_INPUT, RUN_WEIGHT, REDUCE, SEND = range(1, 8)
COSTS = 7
ACTION_KINDS = (FORWARD, FORWARD, BACKWARD, INPUT, WEIGHT, "R")  # of the first six, "R" for a reduction
_RUNS = {FORWARD: RUN_FORWARD, BACKWARD: RUN_BACKWARD, INPUT: RUN_INPUT, WEIGHT: RUN_WEIGHT}
# torch gathers the weights of this many stages ahead (`_add_unshard_reshard`).
_STAGES_AHEAD = 3


class EventGraph:
    """Events in order of their numbers from 1, four columns: three events waited for (0 for none) and the cost."""

    def __init__(self) -> None:
        self.waits = (array("i"), array("i"), array("i"))
        self.costs = array("i")
        self.ends: list[int] = []  # each rank's last event

    def __len__(self) -> int:
        return len(self.costs)

    def add(self, cost: int, first: int, second: int = 0, third: int = 0) -> int:
        a, b, c = self.waits
        a.append(first)
        b.append(second)
        c.append(third)
        self.costs.append(cost)
        return len(self.costs)


def build_graph(pipeline: Pipeline) -> EventGraph:
    """The events of the pipeline, in O(actions)."""
    if pipeline.schedule in BLOCKING:
        return _blocking(pipeline)
    return _posted(pipeline)


class GraphCache:
    """The graphs used last, up to a number of events in all (16 bytes each)."""

    def __init__(self, most_events: int) -> None:
        self._most, self._held = most_events, 0
        self._graphs: OrderedDict[Pipeline, EventGraph] = OrderedDict()

    def graph(self, pipeline: Pipeline) -> EventGraph:
        graph = self._graphs.pop(pipeline, None)
        if graph is None:
            graph = build_graph(pipeline)
            self._held += len(graph)
        self._graphs[pipeline] = graph
        while self._held > self._most and len(self._graphs) > 1:
            self._held -= len(self._graphs.popitem(last=False)[1])
        return graph


# ---- GPipe and 1F1B ------------------------------------------------------------------------------------------

# Operations of a rank's program: run an action, post a send, or wait (posting what is not posted yet).
_RUN, _POST, _WAIT = 0, 1, 2
_Operation = tuple[int, Sequence[int]]


def _program(pipeline: Pipeline, stage: int, actions: Sequence[Action]) -> list[_Operation]:
    """What torch's loop does on this rank. A transfer is a number: the sender's stage, direction and microbatch."""
    count, stages = pipeline.microbatches, pipeline.stages
    first, last = stage == 0, stage == stages - 1
    down, up = [stage * count, (stage + 1) * count], [(stages + stage - 1) * count, (stages + stage) * count]
    # Sends down and up of stage s are numbered s·M + i and (p + s)·M + i.
    sends = {
        FORWARD: [()] * count if last else [(n,) for n in range(*down)],
        BACKWARD: [()] * count if first else [(n + count,) for n in range(*up)],
    }
    receives = {
        FORWARD: [()] * count if first else [(n - count,) for n in range(*down)],
        BACKWARD: [()] * count if last else [(n + 2 * count,) for n in range(*up)],
    }
    runs = {FORWARD: (COSTS * stage + RUN_FORWARD,), BACKWARD: (COSTS * stage + RUN_BACKWARD,)}
    program: list[_Operation] = []
    if pipeline.schedule == "gpipe":
        for position, (_, kind, i, _) in enumerate(actions):
            program.append((_WAIT, receives[kind][i]))
            program.append((_RUN, runs[kind] if position else (COSTS * stage + GATHERED_FORWARD,)))
            program.append((_POST, sends[kind][i]))
            if i == count - 1:
                program.append((_WAIT, [n for each in sends[kind] for n in each]))
        return program
    warmup = min(count, stages - stage)
    cooldown = 2 * count - warmup  # position of the first backward that no forward follows
    held: tuple[int, ...] = ()
    fired: tuple[int, ...] = ()
    for position, (_, kind, i, _) in enumerate(actions):
        program.append((_WAIT, held + receives[kind][i]))
        program.append((_RUN, runs[kind] if position else (COSTS * stage + GATHERED_FORWARD,)))
        held = sends[kind][i]
        if position < warmup or position > cooldown:
            program.append((_WAIT, fired))  # warm-up and cool-down look after the send before
        if position < warmup - 1 or position >= cooldown:
            program.append((_POST, held))
            held, fired = (), held
    program.append((_WAIT, fired))
    return program


def _blocking(pipeline: Pipeline) -> EventGraph:
    """Play the programs against each other; a rank that waits for an unposted transfer stands still."""
    graph, ranks = EventGraph(), pipeline.ranks
    add = graph.add
    programs = [_program(pipeline, stage, actions) for stage, actions in enumerate(action_lists(pipeline))]
    at, now = [0] * ranks, [0] * ranks
    waiting: list[tuple[int, ...]] = [()] * ranks  # transfers that the next run waits for too
    transfers = 2 * pipeline.stages * pipeline.microbatches
    poster, posted, ended = [-1] * transfers, [0] * transfers, [0] * transfers
    # By direction and sender: down to the next stage, up from it.
    hops = [COSTS * stage + SEND for way in (0, 1) for stage in range(-way, ranks - way)]
    ready = list(range(ranks))

    def settle(rank: int) -> int:
        """The rank's latest event with what it has waited for."""
        if waiting[rank]:
            now[rank] = add(NOTHING, now[rank], *waiting[rank])
            waiting[rank] = ()
        return now[rank]

    while ready:
        rank = ready.pop()
        program, position = programs[rank], at[rank]
        while position < len(program):
            operation, items = program[position]
            if operation == _RUN:
                now[rank] = add(items[0], now[rank], *waiting[rank])
                waiting[rank] = ()
            elif items:
                complete = True
                for transfer in items:
                    if ended[transfer]:
                        continue
                    other = poster[transfer]
                    if other < 0:
                        poster[transfer], posted[transfer] = rank, settle(rank)
                    elif other != rank:
                        before = ended[transfer - 1] if transfer % pipeline.microbatches else 0
                        sides = {other: posted[transfer], rank: settle(rank)}
                        if pipeline.receives_early:
                            sides = {0: sides[transfer // pipeline.microbatches % ranks]}
                        ended[transfer] = add(hops[transfer // pipeline.microbatches], before, *sides.values())
                        ready.append(other)
                    complete = complete and ended[transfer] > 0
                if operation == _WAIT:
                    if not complete:
                        break
                    for transfer in items:
                        if len(waiting[rank]) == 2:
                            settle(rank)
                        waiting[rank] += (ended[transfer],)
            position += 1
        at[rank] = position
    assert all(at[r] == len(programs[r]) for r in range(ranks)), "the schedule deadlocks"
    for rank in range(ranks):
        graph.ends.append(add(COSTS * rank + REDUCE, now[rank], *waiting[rank]))
    return graph


# ---- the schedules that run from lists -----------------------------------------------------------------------


def _turns(actions: Sequence[Action], microbatches: int) -> list[Action | int | None]:
    """A rank's list as torch writes it but for communication: an action, the stage to reduce, or None for a turn
    that gathers or frees weights."""
    coming: list[int] = []  # the stages of the actions from here on, nearest first
    ahead: list[tuple[int, ...]] = []
    for action in reversed(actions):
        for part in reversed(action.parts or (action,)):
            if not coming or coming[0] != part.stage:
                coming = [part.stage, *(stage for stage in coming if stage != part.stage)]
        ahead.append(tuple(coming[:_STAGES_AHEAD]))
    turns: list[Action | int | None] = []
    gathered: set[int] = set()
    backwards: dict[int, int] = {}
    wanted: tuple[int, ...] = ()
    for action, stages in zip(actions, reversed(ahead), strict=True):
        if stages != wanted:
            wanted = stages
            turns += [None] * len(gathered.symmetric_difference(stages))
            gathered = set(stages)
        turns.append(action)
        turns += _reduced_after(action.parts or (action,), backwards, microbatches)
    return turns


def work_steps(actions: Sequence[Action], microbatches: int) -> list[tuple[int, str, int]]:
    """What takes time on a rank of a listed schedule, in order: (stage, kind, microbatch), "R" for a reduction."""
    steps: list[tuple[int, str, int]] = []
    backwards: dict[int, int] = {}
    for action in actions:
        parts = action.parts or (action,)
        steps += [part[:3] for part in parts]
        steps += [(stage, "R", 0) for stage in _reduced_after(parts, backwards, microbatches)]
    return steps


def _reduced_after(parts: Sequence[Action], backwards: dict[int, int], microbatches: int) -> list[int]:
    """The stages that have now had their last backward; `backwards` counts those of each."""
    reduced: list[int] = []
    for part in parts:
        if part.kind in (BACKWARD, WEIGHT):
            done = backwards[part.stage] = backwards.get(part.stage, 0) + 1
            if done == microbatches:
                reduced.append(part.stage)
    return reduced


def _posted(pipeline: Pipeline) -> EventGraph:
    graph, count, last = EventGraph(), pipeline.microbatches, pipeline.stages - 1
    add = graph.add
    rank_of = [pipeline.rank_of(stage) for stage in range(pipeline.stages)]
    lists = [_turns(actions, count) for actions in action_lists(pipeline)]
    at, now = [0] * pipeline.ranks, [0] * pipeline.ranks
    # What a forward or backward waits for: a transfer, 0 if nothing but its own rank, None if not sent yet.
    inputs: list[list[int | None]] = [[None] * count if stage else [0] * count for stage in range(last + 1)]
    gradients: list[list[int | None]] = [[None] * count if stage < last else [0] * count for stage in range(last + 1)]
    ungathered = set(range(last + 1))
    queued: dict[tuple[int, int], int] = {}  # the last transfer from one rank to another

    def ready(part: Action) -> bool:
        if part.kind == FORWARD:
            return inputs[part.stage][part.microbatch] is not None
        return part.kind == WEIGHT or gradients[part.stage][part.microbatch] is not None

    def run(rank: int, part: Action) -> None:
        stage, kind, microbatch, _ = part
        awaited = 0
        cost = COSTS * stage + _RUNS[kind]
        if kind == FORWARD:
            awaited = inputs[stage][microbatch] or 0
            if stage in ungathered:
                ungathered.remove(stage)
                cost = COSTS * stage + GATHERED_FORWARD
        elif kind != WEIGHT:
            awaited = gradients[stage][microbatch] or 0
        now[rank] = add(cost, now[rank], awaited)

    def send(rank: int, part: Action) -> None:
        stage, kind, microbatch, _ = part
        to, arrivals = (stage + 1, inputs) if kind == FORWARD else (stage - 1, gradients)
        if kind == WEIGHT or not 0 <= to <= last:
            return
        receiver = rank_of[to]
        if receiver == rank:
            arrivals[to][microbatch] = 0
            return
        before, there = queued.get((rank, receiver), 0), 0 if pipeline.receives_early else now[receiver]
        hop = COSTS * min(stage, to) + SEND
        arrivals[to][microbatch] = queued[rank, receiver] = add(hop, now[rank], there, before)

    left = list(range(pipeline.ranks))
    while left:
        progress = False
        for rank in left:
            turn = lists[rank][at[rank]]
            if turn is not None:
                if isinstance(turn, int):
                    now[rank] = add(COSTS * turn + REDUCE, now[rank])
                else:
                    parts = turn.parts or (turn,)
                    if not all(ready(part) for part in parts):
                        continue
                    for part in parts:
                        run(rank, part)
                    for part in parts:
                        send(rank, part)
            at[rank] += 1
            progress = True
        assert progress, "the schedule deadlocks"
        left = [rank for rank in left if at[rank] < len(lists[rank])]
    graph.ends += now
    return graph
