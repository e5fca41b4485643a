"""A rank's bytes as its plan predicts them, beside what it held in a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from profiles.input_error import InputError

from .plan import Plan, Stage

NO_TENSORS = ("context", "communicators", "allocator_slack")  # of a prediction; a dry run has none of them


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes by part: `predicted` of what is tensors, `left_out` of what is not; `live` at the moment of the peak.

    `gpu` is what the same rank did on a GPU, as `runtime.gpu_rank` has it, where there is one. `seconds` is how long
    the dry run took. `gpu_kernels`: whether it kept what a GPU's kernels keep.
    """

    plan: Plan
    rank: int
    predicted: Mapping[str, float]
    left_out: Mapping[str, float]
    live: Mapping[str, int]
    gpu_kernels: bool
    seconds: float
    gpu: Mapping[str, Any] | None

    @property
    def pipeline_rank(self) -> int:
        return pipeline_rank_of(self.plan, self.rank)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.plan.stages if stage.rank == self.pipeline_rank)

    @property
    def predicted_bytes(self) -> float:
        return sum(self.predicted.values())

    @property
    def live_bytes(self) -> int:
        return sum(self.live.values())

    @property
    def predicted_seconds(self) -> float:
        """What computes of the step; a rank's own seconds the plan does not hold."""
        parts = self.plan.prediction.breakdown_seconds
        return parts["compute"] + parts["recompute"] + parts["optimizer"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "pipeline_rank": self.pipeline_rank,
            "layout": self.plan.layout.to_dict(),
            "predicted": dict(self.predicted),
            "live": dict(self.live),
            "left_out": dict(self.left_out),
            "predicted_bytes": self.predicted_bytes,
            "live_bytes": self.live_bytes,
            "gpu_kernels": self.gpu_kernels,
            "seconds": self.seconds,
            "gpu": None if self.gpu is None else dict(self.gpu),
        }


def rank_memory(
    plan: Plan, rank: int, live: Mapping[str, int], *, gpu_kernels: bool, seconds: float, gpu: Mapping[str, Any] | None
) -> RankMemory:
    """`live` of the rank beside the plan's prediction for its pipeline rank."""
    items = plan.prediction.memory_bytes[pipeline_rank_of(plan, rank)]
    return RankMemory(
        plan=plan,
        rank=rank,
        predicted={part: size for part, size in items.items() if part not in NO_TENSORS},
        left_out={part: size for part, size in items.items() if part in NO_TENSORS},
        live=live,
        gpu_kernels=gpu_kernels,
        seconds=seconds,
        gpu=gpu,
    )


def chosen_rank(plan: Plan, rank: int | None) -> int:
    """The global rank asked for, or the first of the pipeline rank that holds the most by the prediction.

    Raises InputError for one that the plan does not have.
    """
    world = plan.layout.world_size
    if rank is None:
        totals = [sum(items.values()) for items in plan.prediction.memory_bytes]
        return totals.index(max(totals)) * (world // plan.layout.pp)
    if rank < 0 or rank >= world:
        raise InputError(
            f"the plan has no rank {rank}",
            where="--rank",
            expected=f"0 to {world - 1}, a rank of {plan.layout.short()}",
            got=str(rank),
        )
    return rank


def pipeline_rank_of(plan: Plan, rank: int) -> int:
    """pp is the slowest axis."""
    return rank // (plan.layout.world_size // plan.layout.pp)
