"""Layout: the degrees of every axis and the knobs of one way to train."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from profiles.store import Reader

from .schedule import BLOCKING, FORWARDS_FIRST, SPLIT_BACKWARD, Pipeline

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb1p", "zbv", "dualpipev")
CP_STYLES = ("none", "ring", "all-to-all")
RECOMPUTE_MODES = ("none", "selective", "full")
# What a stage may do with gathered weights, from quick to small ([Note: Resharding] in `layout_costs`).
RESHARD_CHOICES = (False, None, True)
# Tokens whose logits our own runtime holds at once; fewer make the head's GEMM slower, more cost memory.
LOSS_TOKENS = 1024
# Gradients that our own runtime sums at once, at most ([Note: Gradient sum] in runtime/replicas.py): as many as torch's
# DistributedDataParallel unless told otherwise. The last of them hide behind nothing, but each message wakes threads.
MESSAGE_BYTES = 25 * 2**20


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of each mesh axis and the knobs beside them.

    Ranks count tp fastest, then cp, dp, pp: with tp=2, dp=2, pp=2 rank 5 is (pp 1, dp 0, tp 1).
    `dp_shard` is how many dp ranks share one sharded copy of the state: 1 under zero 0, dp under plain
    ZeRO, less under HSDP. `virtual_stages` is the number of model chunks per pipeline rank.

    [Note: Expert grid]
    The same ranks of a pipeline stage count etp fastest, then ep, edp for the experts: etp·ep·edp = tp·cp·dp. Experts
    borrow the ranks of dp, cp and tp, and ep need not divide dp. Gradients of dense weights are reduced over dp·cp,
    those of experts over edp.
    """

    tp: int = 1
    cp: int = 1
    cp_style: str = "none"
    pp: int = 1
    dp: int = 1
    dp_shard: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    micro_batch: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1

    def but(self, **changes: Any) -> Layout:
        """As `dataclasses.replace`, much sooner: the fields that stay are copied at once."""
        changed = object.__new__(Layout)
        changed.__dict__.update(self.__dict__, **changes)
        return changed

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def edp(self) -> int:
        """Ranks that hold the same expert weights ([Note: Expert grid])."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def shards(self) -> int:
        """Ranks over which the state of dense weights is cut."""
        return self.dp_shard * self.cp if self.zero else 1

    @property
    def expert_shards(self) -> int:
        """Ranks over which the state of experts is cut: edp, less the replicas of HSDP."""
        return max(1, self.edp * self.dp_shard // self.dp) if self.zero else 1

    def replicates(self, *, experts: bool) -> bool:
        """Whether several ranks have gradients of the same weights."""
        return self.dp * self.cp > 1 or (experts and self.edp > 1)

    def on_fsdp(self, precision: str, *, experts: bool) -> bool:
        """Whether our runtime gives a rank's weights to FSDP2: where they are cut, or widened for `precision`."""
        return precision != "fp32" or (self.zero > 0 and self.replicates(experts=experts))

    def sums_alone(self, precision: str, *, experts: bool) -> bool:
        """Whether our runtime sums gradients of the same weights without FSDP2 ([Note: Gradient sum] in
        runtime/replicas.py)."""
        return self.replicates(experts=experts) and not self.on_fsdp(precision, experts=experts)

    @property
    def stages(self) -> int:
        """Chunks of the model, those of all pipeline ranks together."""
        return self.pp * self.virtual_stages

    @property
    def splits_backward(self) -> bool:
        """Whether backwards run in two halves, for the inputs and for the weights."""
        return self.pp > 1 and self.schedule in SPLIT_BACKWARD

    @property
    def forwards_first(self) -> bool:
        """Whether all microbatches are in flight before the first backward."""
        return self.pp > 1 and self.schedule in FORWARDS_FIRST

    @property
    def stages_choose(self) -> bool:
        """Whether each stage says if its weights are freed between passes ([Note: Resharding] in `layout_costs`)."""
        return self.zero == 3 and self.pp > 1 and self.schedule in BLOCKING

    def logits_again(self, microbatches: int) -> bool:
        """Whether our runtime computes the logits once more in the backward pass ([Note: Loss in pieces])."""
        return self.forwards_first and microbatches > 1

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, from its first chunk to its last."""
        return self.pipeline(1).stages_of(rank)

    def pipeline(self, microbatches: int) -> Pipeline:
        """What fixes the order in which its pipeline works."""
        return Pipeline(self.schedule, self.pp, self.virtual_stages, microbatches)

    def microbatches(self, global_batch: int) -> int:
        """Microbatches that each dp rank runs in one step."""
        return global_batch // (self.micro_batch * self.dp)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, reader: Reader) -> Layout:
        layout = cls(
            tp=reader.integer("tp", minimum=1),
            cp=reader.integer("cp", minimum=1),
            cp_style=reader.text("cp_style", choices=CP_STYLES),
            pp=reader.integer("pp", minimum=1),
            dp=reader.integer("dp", minimum=1),
            dp_shard=reader.integer("dp_shard", minimum=1),
            ep=reader.integer("ep", minimum=1),
            etp=reader.integer("etp", minimum=1),
            sequence_parallel=reader.boolean("sequence_parallel"),
            zero=reader.integer("zero", minimum=0),
            micro_batch=reader.integer("micro_batch", minimum=1),
            schedule=reader.text("schedule", choices=SCHEDULES),
            virtual_stages=reader.integer("virtual_stages", minimum=1),
        )
        reader.finish()
        return layout

    def short(self) -> str:
        """One line for people: `tp2·sp pp4·v2 dp8 zero1 mb1 1f1b`, axes of size 1 left out."""
        words = []
        if self.tp > 1:
            words.append(f"tp{self.tp}" + ("·sp" if self.sequence_parallel else ""))
        if self.cp > 1:
            words.append(f"cp{self.cp}·{self.cp_style}")
        if self.pp > 1:
            words.append(f"pp{self.pp}" + (f"·v{self.virtual_stages}" if self.virtual_stages > 1 else ""))
        if self.dp > 1:
            shard = f"·hsdp{self.dp_shard}" if self.zero and self.dp_shard < self.dp else ""
            words.append(f"dp{self.dp} zero{self.zero}{shard}")
        elif self.zero:  # over cp
            words.append(f"zero{self.zero}")
        if self.ep > 1:
            words.append(f"ep{self.ep}")
        if self.etp > 1:
            words.append(f"etp{self.etp}")
        words.append(f"mb{self.micro_batch}")
        if self.pp > 1:
            words.append(self.schedule)
        return " ".join(words)


LAYOUT_KEYS = tuple(field.name for field in fields(Layout))
