"""Layout: the degrees and knobs of one way to train, and every rule that forbids one, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.store import Reader

from .job import TrainingJob

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb1p", "zbv", "dualpipev")
CP_STYLES = ("none", "ring", "all-to-all")
RECOMPUTE_MODES = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of each mesh axis and the knobs beside them.

    Ranks count tp fastest, then cp, dp, pp: with tp=2, dp=2, pp=2 rank 5 is (pp 1, dp 0, tp 1).
    `dp_shard` is how many dp ranks share one sharded copy of the state: 1 under zero 0, dp under plain
    ZeRO. `virtual_stages` is the number of model chunks per pipeline rank.
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

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

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
        """One line for people: `tp2·sp pp4 dp8 zero1 mb1 1f1b`, axes of size 1 left out."""
        words = []
        if self.tp > 1:
            words.append(f"tp{self.tp}" + ("·sp" if self.sequence_parallel else ""))
        if self.pp > 1:
            words.append(f"pp{self.pp}")
        if self.dp > 1:
            words.append(f"dp{self.dp} zero{self.zero}")
        words.append(f"mb{self.micro_batch}")
        if self.pp > 1:
            words.append(self.schedule)
        return " ".join(words)


LAYOUT_KEYS = tuple(field.name for field in fields(Layout))


@dataclass(frozen=True)
class Capabilities:
    """What a target executor trains today; the planner proposes nothing else for it."""

    schedules: tuple[str, ...]
    recompute: tuple[str, ...]
    precisions: tuple[str, ...]
    zero_with_pipeline: tuple[int, ...]


# One row a target. The rows of megatron and torchtitan come with their exporters.
CAPABILITIES = {
    "meshwright": Capabilities(
        schedules=("gpipe", "1f1b"),
        recompute=("none", "full"),
        precisions=("fp32", "bf16"),
        zero_with_pipeline=(0, 1, 3),
    ),
}


# What a model may have beyond a dense, causal pre-norm decoder (`ModelSpec.features`) -> the executors that train
# it. Beside megatron stands the argument of Megatron-LM's own training scripts that switches it on.
FEATURES: dict[str, tuple[str, ...]] = {
    "experts": ("megatron",),  # --num-experts, with all that the router may be: --moe-router-*, --moe-layer-freq
    "latent attention": ("megatron",),  # --multi-latent-attention
    "sliding-window attention": ("megatron",),  # --window-size, --window-attn-skip-freq
    "QK norm": ("megatron",),  # --qk-layernorm
    "attention sinks": ("megatron",),  # --softmax-type learnable
    "bidirectional attention": ("megatron",),  # pretrain_bert.py, as all that BERT has
    "ALiBi positions": (),
    "YaRN positions": ("megatron",),  # --rope-type yarn, with latent attention; --position-embedding-type yarn
    "linearly stretched positions": ("megatron",),  # --rotary-seq-len-interpolation-factor
    "dynamically stretched positions": (),
    "LongRoPE positions": (),
    "partial rotary positions": ("megatron",),  # --rotary-percent
    "parallel residuals": (),
    "post-norm layers": ("megatron",),  # --apply-residual-connection-post-layernorm
    "ReLU": (),
    "clamped SwiGLU": ("megatron",),  # --quick-geglu, --glu-linear-offset, --activation-func-clamp-value
    "offset positions": (),
    "token types": ("megatron",),
    "embedding norm": (),
    "output transform": ("megatron",),
    "output bias": ("megatron",),
    "next-sentence head": ("megatron",),
}


def missing_features(model: ModelSpec, executor: str) -> tuple[str, ...]:
    """What the model has and the executor does not train today; empty when it trains the model."""
    return tuple(feature for feature in model.features if executor not in FEATURES[feature])


@dataclass(frozen=True)
class RuleContext:
    """What a rule looks at besides the layout."""

    model: ModelSpec
    job: TrainingJob
    world_size: int


Rule = Callable[[Layout, RuleContext], str | None]


def _world(layout: Layout, context: RuleContext) -> str | None:
    if layout.world_size == context.world_size:
        return None
    return (
        f"tp·cp·pp·dp = {layout.tp}·{layout.cp}·{layout.pp}·{layout.dp} = {layout.world_size} "
        f"and {context.world_size} devices: a layout uses every device once"
    )


def _unsupported_axes(layout: Layout, context: RuleContext) -> str | None:
    for axis in ("cp", "ep", "etp"):
        if getattr(layout, axis) > 1:
            return f"{axis}={getattr(layout, axis)}: the meshwright runtime does not train with {axis} > 1 today"
    if layout.virtual_stages > 1:
        return f"virtual_stages={layout.virtual_stages}: the meshwright runtime runs one chunk per pipeline rank today"
    return None


def _heads(layout: Layout, context: RuleContext) -> str | None:
    heads = context.model.heads
    if heads % layout.tp:
        return f"tp={layout.tp} does not divide {heads} attention heads"
    return None


def _kv_heads(layout: Layout, context: RuleContext) -> str | None:
    kv = context.model.kv_heads
    if kv % layout.tp and layout.tp % kv:
        return f"tp={layout.tp} and {kv} key-value heads: neither divides the other"
    return None


def _ffn(layout: Layout, context: RuleContext) -> str | None:
    ffn = context.model.ffn_hidden_size
    if ffn % layout.tp:
        return f"tp={layout.tp} does not divide ffn_hidden_size = {ffn}"
    return None


def _vocabulary(layout: Layout, context: RuleContext) -> str | None:
    vocab = context.model.vocab_size
    if -(-vocab // layout.tp) * (layout.tp - 1) >= vocab:
        return f"tp={layout.tp} leaves the last rank no row of a vocabulary of {vocab}"
    return None


def _sequence_parallel(layout: Layout, context: RuleContext) -> str | None:
    if not layout.sequence_parallel:
        return None
    if layout.tp == 1:
        return "sequence_parallel splits the sequence over tp, and tp=1"
    if context.job.sequence % layout.tp:
        return f"sequence_parallel: tp={layout.tp} does not divide the sequence of {context.job.sequence} tokens"
    return None


def _positions(layout: Layout, context: RuleContext) -> str | None:
    model, sequence = context.model, context.job.sequence
    if model.positions == "learned" and sequence > model.max_positions:
        return f"sequence of {sequence} tokens and {model.max_positions} learned positions"
    return None


def _stages(layout: Layout, context: RuleContext) -> str | None:
    layers = context.model.layers
    if layout.pp > layers + 2:
        return (
            f"pp={layout.pp} and {layers} layers: every stage between the embedding's and the head's "
            f"needs a layer, so pp is at most {layers + 2}"
        )
    return None


def _batch(layout: Layout, context: RuleContext) -> str | None:
    batch, share = context.job.global_batch, layout.micro_batch * layout.dp
    if batch % share:
        return f"global batch {batch} is not a multiple of micro_batch·dp = {layout.micro_batch}·{layout.dp} = {share}"
    return None


def _schedule(layout: Layout, context: RuleContext) -> str | None:
    allowed = CAPABILITIES["meshwright"].schedules
    if layout.schedule not in allowed:
        return f"schedule={layout.schedule}: the meshwright runtime runs {', '.join(allowed)} today"
    if layout.pp == 1 and layout.schedule != "1f1b":
        return f"schedule={layout.schedule} and pp=1: without a pipeline there is only 1f1b (accumulation)"
    microbatches = layout.microbatches(context.job.global_batch)
    if layout.schedule == "1f1b" and 0 < microbatches < layout.pp:
        return (
            f"1f1b with {microbatches} microbatches and pp={layout.pp}: torch runs it only with at least "
            f"as many microbatches as stages"
        )
    return None


def _zero(layout: Layout, context: RuleContext) -> str | None:
    if layout.zero > 3:
        return f"zero={layout.zero}: the levels are 0, 1, 2 and 3"
    if layout.zero and layout.dp == 1:
        return f"zero={layout.zero} shards state over dp, and dp=1"
    if layout.pp > 1 and layout.zero not in CAPABILITIES["meshwright"].zero_with_pipeline:
        return (
            "zero=2 with pp > 1: torch's pipeline keeps gradients unsharded until the last microbatch, "
            "so zero 2 is zero 1 there; ask for zero=1"
        )
    return None


def _dp_shard(layout: Layout, context: RuleContext) -> str | None:
    wanted = layout.dp if layout.zero else 1
    if layout.dp_shard != wanted:
        return (
            f"dp_shard={layout.dp_shard} with zero={layout.zero} and dp={layout.dp}: the meshwright runtime "
            f"shards over all of dp or not at all today, so dp_shard={wanted}"
        )
    return None


RULES: tuple[Rule, ...] = (
    _world,
    _unsupported_axes,
    _heads,
    _kv_heads,
    _ffn,
    _vocabulary,
    _sequence_parallel,
    _positions,
    _stages,
    _batch,
    _schedule,
    _zero,
    _dp_shard,
)


def violations(layout: Layout, context: RuleContext) -> tuple[str, ...]:
    """The reasons that forbid the layout, in words with the numbers; empty when it is legal.

    No layout is legal for a model with features that the runtime does not train.
    """
    reasons = [reason for rule in RULES if (reason := rule(layout, context)) is not None]
    if missing := missing_features(context.model, "meshwright"):
        reasons.insert(0, f"{context.model.name}: the meshwright runtime does not train {', '.join(missing)} today")
    return tuple(reasons)


def require_legal(layout: Layout, recompute: str, context: RuleContext) -> None:
    """Raise an InputError with every reason that forbids a layout which a person wrote."""
    reasons = list(violations(layout, context))
    allowed = CAPABILITIES["meshwright"].recompute
    if recompute not in allowed:
        reasons.append(f"recompute={recompute}: the meshwright runtime recomputes {' or '.join(allowed)} today")
    if reasons:
        raise InputError(
            "the layout is not legal",
            where="--layout",
            expected=f"a layout that {context.model.name} can be trained in on {context.world_size} devices",
            got="; ".join(reasons),
        )


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def enumerate_layouts(context: RuleContext) -> Iterator[Layout]:
    """Every legal layout once, pins and bans of the job held.

    Only divisors are tried, so that the rules have little to throw away; the rules still judge each one.
    """
    capabilities = CAPABILITIES["meshwright"]
    world, job = context.world_size, context.job
    for tp in divisors(world):
        if context.model.heads % tp:
            continue
        for pp in divisors(world // tp):
            dp = world // (tp * pp)
            if job.global_batch % dp:
                continue
            zeros = (0,) if dp == 1 else capabilities.zero_with_pipeline if pp > 1 else (0, 1, 2, 3)
            for micro_batch in divisors(job.global_batch // dp):
                for zero in zeros:
                    for schedule in capabilities.schedules if pp > 1 else ("1f1b",):
                        for sequence_parallel in (False, True) if tp > 1 else (False,):
                            layout = Layout(
                                tp=tp,
                                pp=pp,
                                dp=dp,
                                dp_shard=dp if zero else 1,
                                sequence_parallel=sequence_parallel,
                                zero=zero,
                                micro_batch=micro_batch,
                                schedule=schedule,
                            )
                            if _held(layout, job) and not violations(layout, context):
                                yield layout


def _held(layout: Layout, job: TrainingJob) -> bool:
    """Whether the layout keeps the job's pins and bans (recompute is pinned per stage, not here)."""
    for key, value in job.pins.items():
        if key != "recompute" and getattr(layout, key) != value:
            return False
    off = {"sequence_parallel": False, "zero": 0}
    return all(getattr(layout, key) == off.get(key, 1) for key in job.bans if key in LAYOUT_KEYS)
