"""Pipeline schedules as action lists, and which of them torch can run.

[Note: Action lists]
A schedule is one list of actions per pipeline rank. An action is written as torch writes it: stage, kind,
microbatch, so `1F0` is the forward of microbatch 0 on stage 1. Kinds: F forward, B whole backward, or the two
halves of it, I for the gradient of the stage's input and W for those of its weights. The same lists give what is
in flight (`in_flight.py`) and the simulation (`simulation.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from . import schedule_orders as orders
from .schedule_orders import Action

__all__ = [
    "BLOCKING",
    "FORWARDS_FIRST",
    "IN_ROUNDS",
    "SPLIT_BACKWARD",
    "V_SHAPED",
    "Action",
    "Pipeline",
    "action_lists",
    "order_of",
    "why_illegal",
]

# They run a backward in two halves; recomputation does not go with that on torch.
SPLIT_BACKWARD = ("zb1p", "zbv", "dualpipev")
# Of these, those that split every backward; DualPipeV splits few.
ALL_SPLIT = ("zb1p", "zbv")
# Every forward of a step comes before the first backward.
FORWARDS_FIRST = ("gpipe", "looped-bfs")
# torch runs them with paired sends and receives that block the host ([Note: Blocking point-to-point]).
BLOCKING = ("gpipe", "1f1b")
# Two stages a rank, the second on the way back.
V_SHAPED = ("zbv", "dualpipev")
# Microbatches run in rounds of about a pipeline's length.
IN_ROUNDS = ("interleaved-1f1b", "zb1p")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What fixes the action lists. `schedule` is one of `layout.SCHEDULES`, `chunks` the layout's virtual_stages.

    With `receives_early` all receives of a step are posted before its first action ([Note: Events]).
    """

    schedule: str
    ranks: int
    chunks: int
    microbatches: int
    receives_early: bool = False

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        """Stages go round the ranks, or in a V down and back up: stages 0 1 2 3 lie on ranks 0 1 0 1, or 0 1 1 0."""
        if self.schedule in V_SHAPED and stage >= self.ranks:
            return 2 * self.ranks - 1 - stage
        return stage % self.ranks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The rank's stages from its first chunk to its last."""
        if self.schedule in V_SHAPED:
            return rank, 2 * self.ranks - 1 - rank
        return tuple(range(rank, self.stages, self.ranks))


def why_illegal(pipeline: Pipeline) -> str | None:
    """Why torch refuses the schedule with these numbers, or None."""
    schedule, ranks, chunks, count = pipeline.schedule, pipeline.ranks, pipeline.chunks, pipeline.microbatches
    if schedule in BLOCKING and chunks != 1:
        return f"{schedule} runs one chunk a pipeline rank, and virtual_stages={chunks}"
    if schedule in V_SHAPED and chunks != 2:
        return f"{schedule} runs exactly 2 chunks a pipeline rank, and virtual_stages={chunks}"
    if schedule == "1f1b" and count < ranks:
        return (
            f"1f1b with {count} microbatches and pp={ranks}: torch runs it only with at least as many microbatches "
            f"as stages"
        )
    if schedule == "dualpipev" and count < 2 * ranks:
        return (
            f"dualpipev with {count} microbatches and pp={ranks}: it needs at least as many microbatches as its "
            f"{2 * ranks} stages"
        )
    rounds = max(1, count // ranks)
    if schedule in IN_ROUNDS and count % rounds:
        return (
            f"{schedule} with {count} microbatches and pp={ranks} runs in {rounds} rounds, and {rounds} does not "
            f"divide {count}"
        )
    return None


def action_lists(pipeline: Pipeline) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank, in order."""
    return tuple(tuple(order_of(pipeline, rank)) for rank in range(pipeline.ranks))


def order_of(pipeline: Pipeline, rank: int) -> list[Action]:
    """The actions of one rank, in order."""
    ranks, chunks, count = pipeline.ranks, pipeline.chunks, pipeline.microbatches
    match pipeline.schedule:
        case "gpipe":
            return orders.gpipe(rank, count)
        case "1f1b":
            return orders.one_forward_one_backward(rank, ranks, count)
        case "interleaved-1f1b":
            return orders.interleaved(rank, ranks, chunks, count)
        case "looped-bfs":
            return orders.looped_bfs(rank, ranks, chunks, count)
        case "zb1p":
            return orders.zb1p(rank, ranks, chunks, count)
        case "zbv":
            return orders.zbv(rank, ranks, count)
        case "dualpipev":
            return orders.dualpipev(rank, ranks, count)
    raise AssertionError(pipeline.schedule)
