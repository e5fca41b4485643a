"""torch 2.13's GPipe and 1F1B loops, transcribed as coroutines and run against a clock: a second simulator.

`yield ("run", seconds)` computes, `yield ("post", transfers)` starts sends or receives, `yield ("wait", transfers)`
blocks until they are done. A transfer ("F" or "B", sender, microbatch) takes its hop's seconds from when both of its
sides have posted it and the sender's transfer before it that way is over. Source:
torch/distributed/pipelining/schedules.py, `_step_microbatches` of `ScheduleGPipe` and `Schedule1F1B`;
`_wait_batch_p2p(_batch_p2p(ops))` is a post and a wait of the same transfers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from planner.simulation import StageSeconds

Transfer = tuple[str, int, int]
Step = tuple[str, float | list[Transfer]]


def _gpipe(rank: int, ranks: int, microbatches: int, seconds: StageSeconds) -> Iterator[Step]:
    for kind, upstream, downstream in (("F", rank - 1, rank + 1), ("B", rank + 1, rank - 1)):
        sends: list[Transfer] = []
        for i in range(microbatches):
            receive = [(kind, upstream, i)] if 0 <= upstream < ranks else []
            yield "post", receive
            yield "wait", receive
            if kind == "F" and i == 0:
                yield "run", seconds.gather
            yield "run", seconds.forward if kind == "F" else seconds.backward_input + seconds.backward_weight
            send = [(kind, rank, i)] if 0 <= downstream < ranks else []
            yield "post", send
            sends += send
        yield "wait", sends


def _one_forward_one_backward(rank: int, ranks: int, microbatches: int, seconds: StageSeconds) -> Iterator[Step]:
    def forward_receive(i: int) -> list[Transfer]:
        return [("F", rank - 1, i)] if rank > 0 else []

    def forward_send(i: int) -> list[Transfer]:
        return [("F", rank, i)] if rank < ranks - 1 else []

    def backward_receive(i: int) -> list[Transfer]:
        return [("B", rank + 1, i)] if rank < ranks - 1 else []

    def backward_send(i: int) -> list[Transfer]:
        return [("B", rank, i)] if rank > 0 else []

    warmup = min(microbatches, ranks - rank)
    forwards = backwards = 0
    send_work: list[Transfer] = []
    sends: list[Transfer] = []
    for _ in range(warmup):
        yield "post", forward_receive(forwards)
        yield "wait", forward_receive(forwards)
        if forwards == 0:
            yield "run", seconds.gather
        yield "run", seconds.forward
        yield "wait", send_work
        sends = forward_send(forwards)
        if forwards != warmup - 1:
            yield "post", sends
            send_work = sends
        forwards += 1
    while True:
        yield "post", sends + backward_receive(backwards)
        yield "wait", sends + backward_receive(backwards)
        yield "run", seconds.backward_input + seconds.backward_weight
        sends = backward_send(backwards)
        backwards += 1
        if forwards == microbatches:
            break
        yield "post", sends + forward_receive(forwards)
        yield "wait", sends + forward_receive(forwards)
        yield "run", seconds.forward
        sends = forward_send(forwards)
        forwards += 1
    yield "post", sends
    send_work = sends
    while backwards < microbatches:
        yield "post", backward_receive(backwards)
        yield "wait", backward_receive(backwards)
        yield "run", seconds.backward_input + seconds.backward_weight
        yield "wait", send_work
        send_work = backward_send(backwards)
        yield "post", send_work
        backwards += 1
    yield "wait", send_work


_LOOPS = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward}


def torch_seconds(
    schedule: str, durations: Sequence[StageSeconds], microbatches: int, hops: Sequence[float], *, early: bool = False
) -> float:
    """Seconds until the last rank has reduced its gradients; with `early` all receives were posted at the start."""
    ranks = len(durations)
    loops = [_LOOPS[schedule](rank, ranks, microbatches, durations[rank]) for rank in range(ranks)]
    clocks = [0.0] * ranks
    posted: dict[Transfer, dict[int, float]] = {}

    def arrived(transfer: Transfer) -> float:
        kind, sender, microbatch = transfer
        before = arrived((kind, sender, microbatch - 1)) if microbatch else 0.0
        sides = [posted[transfer][sender]] if early else posted[transfer].values()
        return max(before, *sides) + hops[sender if kind == "F" else sender - 1]

    def known(transfer: Transfer) -> bool:
        return transfer[1] in posted[transfer] if early else len(posted[transfer]) == 2

    pending: list[Step | None] = [next(loop) for loop in loops]
    while any(step is not None for step in pending):
        moved = False
        for rank, step in enumerate(pending):
            if step is None:
                continue
            word, what = step
            if word == "run":
                assert isinstance(what, float)
                clocks[rank] += what
            elif word == "post":
                assert isinstance(what, list)
                for transfer in what:
                    posted.setdefault(transfer, {})[rank] = clocks[rank]
            else:
                assert isinstance(what, list)
                if not all(map(known, what)):
                    continue
                clocks[rank] = max([clocks[rank], *map(arrived, what)])
            pending[rank] = next(loops[rank], None)
            moved = True
        assert moved, "deadlock"
    return max(clock + seconds.reduce for clock, seconds in zip(clocks, durations, strict=True))
