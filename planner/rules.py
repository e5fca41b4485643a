"""Every rule that forbids a layout, each with its reason in words with the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from math import gcd

from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.traced_model import TracedModel

from .capabilities import CAPABILITIES, Capabilities, able_targets, missing_features
from .job import TrainingJob
from .layout import Layout
from .schedule import ALL_SPLIT, SPLIT_BACKWARD, Pipeline, why_illegal
from .traced_rules import why_no_degrees, why_no_schedule


@dataclass(frozen=True)
class RuleContext:
    """What a rule looks at besides the layout; `spans` are the devices that each tier of links joins."""

    model: ModelSpec
    job: TrainingJob
    world_size: int
    spans: tuple[int, ...] = ()

    @property
    def capabilities(self) -> Capabilities:
        return CAPABILITIES[self.job.target]

    @property
    def executor(self) -> str:
        """The target in the words of a reason."""
        return {"meshwright": "the meshwright runtime", "megatron": "Megatron-LM"}.get(self.job.target, self.job.target)


FP8_MULTIPLE = 16  # of each dim of an operand in torch's _scaled_mm on CUDA
Rule = Callable[[Layout, RuleContext], str | None]


def _of_a_spec(rule: Rule) -> Rule:
    """A rule of what ModelSpec says of a layer, which does not hold for a traced module: `_traced_degrees` does."""

    @wraps(rule)
    def looked_at(layout: Layout, context: RuleContext) -> str | None:
        return None if isinstance(context.model, TracedModel) else rule(layout, context)

    return looked_at


# ---- degrees -------------------------------------------------------------------------------------------


def _world(layout: Layout, context: RuleContext) -> str | None:
    if layout.world_size == context.world_size:
        return None
    return (
        f"tp·cp·pp·dp = {layout.tp}·{layout.cp}·{layout.pp}·{layout.dp} = {layout.world_size} "
        f"and {context.world_size} devices: a layout uses every device once"
    )


@_of_a_spec
def _heads(layout: Layout, context: RuleContext) -> str | None:
    heads = context.model.heads
    if heads % layout.tp:
        return f"tp={layout.tp} does not divide {heads} attention heads"
    return None


@_of_a_spec
def _kv_heads(layout: Layout, context: RuleContext) -> str | None:
    kv = context.model.kv_heads
    if kv % layout.tp and layout.tp % kv:
        return f"tp={layout.tp} and {kv} key-value heads: neither divides the other"
    return None


@_of_a_spec
def _ffn(layout: Layout, context: RuleContext) -> str | None:
    ffn = context.model.ffn_hidden_size
    if ffn % layout.tp:
        return f"tp={layout.tp} does not divide ffn_hidden_size = {ffn}"
    return None


@_of_a_spec
def _vocabulary(layout: Layout, context: RuleContext) -> str | None:
    vocab = context.model.vocab_size
    if -(-vocab // layout.tp) * (layout.tp - 1) >= vocab and not context.capabilities.vocabulary_padding:
        return f"tp={layout.tp} leaves the last rank no row of a vocabulary of {vocab}"
    return None


def _positions(layout: Layout, context: RuleContext) -> str | None:
    model, sequence = context.model, context.job.sequence
    if model.positions == "learned" and sequence > model.max_positions:
        return f"sequence of {sequence} tokens and {model.max_positions} learned positions"
    return None


def _context_parallel(layout: Layout, context: RuleContext) -> str | None:
    styles = context.capabilities.cp_styles
    if layout.cp == 1:
        return f"cp_style={layout.cp_style} and cp=1" if layout.cp_style != "none" else None
    if layout.cp_style not in styles:
        return f"cp={layout.cp} with cp_style={layout.cp_style}: {context.executor} runs {' or '.join(styles)}"
    if context.job.sequence % (2 * layout.cp):
        return f"cp={layout.cp}: 2·cp = {2 * layout.cp} does not divide the sequence of {context.job.sequence} tokens"
    if layout.cp_style == "all-to-all":
        heads = gcd(context.model.heads, context.model.kv_heads) // layout.tp
        if heads % layout.cp or not heads:
            return f"cp={layout.cp} all-to-all does not divide the {heads} key-value heads of a tp rank"
    return None


def _windows_and_sinks(layout: Layout, context: RuleContext) -> str | None:
    features, names = context.model.features, ("sliding-window attention", "attention sinks")
    has = " and ".join(name for name in names if name in features)
    if not has or not context.capabilities.windows_of_whole_sequences:
        return None
    for other in ("bidirectional attention", "latent attention"):
        if other in features:
            return f"{has} with {other}: {context.executor} has them in causal attention to keys of each head alone"
    if layout.cp_style == "ring":
        return f"cp={layout.cp} ring with {has}: {context.executor} needs whole sequences; ask for cp_style=all-to-all"
    return None


def _experts(layout: Layout, context: RuleContext) -> str | None:
    experts, able = context.model.experts, context.capabilities
    ep, etp = layout.ep, layout.etp
    if experts is None or not able.experts:
        for axis, degree in (("ep", ep), ("etp", etp)):
            if degree > 1:
                lacks = f"{context.model.name} has no experts" if experts is None else ""
                return f"{axis}={degree}: " + (lacks or f"{context.executor} does not train with {axis} > 1 today")
        return None
    if experts.number % ep:
        return f"ep={ep} does not divide {experts.number} experts"
    if etp not in ((1, layout.tp) if able.expert_tp else (1,)):
        return f"etp={etp}: experts are cut over tp={layout.tp} or not at all"
    if experts.ffn_hidden_size % etp:
        return f"etp={etp} does not divide the experts' width of {experts.ffn_hidden_size}"
    if experts.shared_width % layout.tp:
        return f"tp={layout.tp} does not divide the shared experts' width of {experts.shared_width}"
    ranks = layout.tp * layout.cp * layout.dp
    if ranks % (ep * etp):
        return f"ep·etp = {ep}·{etp} does not divide tp·cp·dp = {ranks} ranks of a pipeline stage"
    if layout.zero and layout.dp_shard < layout.dp and layout.edp % (layout.dp // layout.dp_shard):
        return f"edp={layout.edp} does not divide into the {layout.dp // layout.dp_shard} replicas of dp_shard"
    if able.experts_need_sequence_parallel and layout.tp > 1 and not layout.sequence_parallel:
        return f"experts with tp={layout.tp}: {context.executor} asks for sequence_parallel"
    return None


def _sequence_parallel(layout: Layout, context: RuleContext) -> str | None:
    if not layout.sequence_parallel:
        return None
    if layout.tp == 1:
        return "sequence_parallel splits the sequence over tp, and tp=1"
    if context.job.sequence % (layout.tp * layout.cp):
        axes, over = ("tp", layout.tp) if layout.cp == 1 else ("tp·cp", layout.tp * layout.cp)
        return f"sequence_parallel: {axes}={over} does not divide the sequence of {context.job.sequence} tokens"
    return None


def _stages(layout: Layout, context: RuleContext) -> str | None:
    layers = context.model.layers
    if layout.stages > layers + 2:
        chunks = f"pp={layout.pp}" + (f" with {layout.virtual_stages} chunks" if layout.virtual_stages > 1 else "")
        return (
            f"{chunks} and {layers} layers: every stage between the embedding's and the head's "
            f"needs a layer, so pp is at most {(layers + 2) // layout.virtual_stages}"
        )
    return None


# ---- knobs -----------------------------------------------------------------------------------------------


def _batch(layout: Layout, context: RuleContext) -> str | None:
    batch, share = context.job.global_batch, layout.micro_batch * layout.dp
    if batch % share:
        return f"global batch {batch} is not a multiple of micro_batch·dp = {layout.micro_batch}·{layout.dp} = {share}"
    return None


def _schedule(layout: Layout, context: RuleContext) -> str | None:
    allowed = context.capabilities.schedules
    if layout.schedule not in allowed:
        return f"schedule={layout.schedule}: {context.executor} runs {', '.join(allowed)} today"
    if layout.pp == 1:
        if layout.schedule != "1f1b":
            return f"schedule={layout.schedule} and pp=1: without a pipeline there is only 1f1b (accumulation)"
        if layout.virtual_stages > 1:
            return f"virtual_stages={layout.virtual_stages} and pp=1: chunks are of a pipeline"
        return None
    microbatches = layout.microbatches(context.job.global_batch)
    if microbatches == 0:
        return None  # the batch's own rule says so
    if (reason := why_no_schedule(layout, context.model)) is not None:
        return reason
    if layout.schedule in ALL_SPLIT and microbatches == 1 and context.job.precision != "fp32":
        return (
            f"{layout.schedule} with one microbatch in {context.job.precision}: torch's FSDP2, 2.11 to 2.13, fails on "
            "gradients of two precisions when it reduces them; ask for two microbatches or fp32"
        )
    return why_illegal(Pipeline(layout.schedule, layout.pp, layout.virtual_stages, microbatches))


def zero_rule(layout: Layout, context: RuleContext) -> str | None:
    able = context.capabilities
    if layout.zero > 3:
        return f"zero={layout.zero}: the levels are 0, 1, 2 and 3"
    if layout.zero and layout.dp * layout.cp == 1:
        return f"zero={layout.zero} shards state over dp, and dp=1"
    if layout.zero not in (able.zero_with_pipeline if layout.pp > 1 else able.zero):
        return f"zero={layout.zero}{' with pp > 1' if layout.pp > 1 else ''}: {able.zero_reason}"
    if layout.zero == 3 and layout.splits_backward:
        return (
            f"zero=3 with {layout.schedule}: torch 2.11 to 2.13 loses gradients where weights are freed between the "
            "halves of a backward; ask for zero=1"
        )
    return None


def _fp8_schedule(layout: Layout, context: RuleContext) -> str | None:
    if context.job.precision == "fp8" and context.capabilities.fp8_whole and layout.splits_backward:
        return f"fp8 with {layout.schedule}: a product in fp8 would run its whole backward in both halves"
    return None


def _fp8(layout: Layout, context: RuleContext) -> str | None:
    if context.job.precision != "fp8" or not context.capabilities.fp8_whole:
        return None
    if context.model.experts is not None or context.model.latent_attention is not None:
        return f"fp8: {context.executor} has fp8 products in dense blocks alone today; ask for --precision bf16"
    if layout.tp > 1:
        return f"fp8 with tp={layout.tp}: {context.executor} runs fp8 products of whole linears alone today"
    tokens = layout.micro_batch * context.job.sequence // layout.cp
    widths = {width for shape in context.model.linear_shapes.values() for width in shape}
    odd = [number for number in (tokens, *sorted(widths)) if number % FP8_MULTIPLE]
    if odd:
        return f"fp8: torch's product takes multiples of {FP8_MULTIPLE} tokens and widths, not {odd[0]}"
    return None


def _dp_shard(layout: Layout, context: RuleContext) -> str | None:
    shard, dp = layout.dp_shard, layout.dp
    if layout.zero == 0:
        return f"dp_shard={shard} with zero=0: nothing is sharded, so dp_shard=1" if shard != 1 else None
    if dp % shard:
        return f"dp_shard={shard} does not divide dp={dp}"
    if shard == 1 and dp > 1 and layout.cp == 1:
        return (
            f"dp_shard=1 with zero={layout.zero}: a group of one rank shards nothing; ask for dp_shard={dp} or zero=0"
        )
    return None


def _traced_degrees(layout: Layout, context: RuleContext) -> str | None:
    return why_no_degrees(layout, context.model, context.job)


DEGREE_RULES: tuple[Rule, ...] = (
    _world,
    _traced_degrees,
    _context_parallel,
    _windows_and_sinks,
    _heads,
    _kv_heads,
    _ffn,
    _vocabulary,
    _sequence_parallel,
    _positions,
    _stages,
    _batch,
)
# Besides pp: what depends on the micro batch and the degrees, on schedule and chunks, on the state and the expert grid.
MICRO_BATCH_RULES: tuple[Rule, ...] = (_fp8,)
PIPELINE_RULES: tuple[Rule, ...] = (_schedule, _fp8_schedule)
STATE_RULES: tuple[Rule, ...] = (zero_rule, _dp_shard, _experts)
RULES = DEGREE_RULES + PIPELINE_RULES + STATE_RULES + MICRO_BATCH_RULES


def violations(layout: Layout, context: RuleContext) -> tuple[str, ...]:
    """The reasons that forbid the layout, in words with the numbers; empty when it is legal.

    No layout is legal for a model with features that the target does not train.
    """
    reasons = [reason for rule in RULES if (reason := rule(layout, context)) is not None]
    if missing := missing_features(context.model, context.job.target):
        others = able_targets(context.model)
        way_out = f"; {' and '.join(others)} can" if others else ""
        lacks = f"{context.model.name}: {context.executor} does not train {', '.join(missing)} today{way_out}"
        reasons.insert(0, lacks)
    return tuple(reasons)


def why_not_proposed(layout: Layout) -> str | None:
    """The reason why a legal layout is not in the space; `estimate` and `train` take it all the same.

    With a common factor g of cp and micro_batch, cp/g, micro_batch/g and g·dp give every rank the same tokens, as many
    microbatches and the same shards of the state, and less to send.
    """
    both = gcd(layout.cp, layout.micro_batch)
    if both == 1:
        return None
    fewer = f"cp={layout.cp // both} with micro_batch={layout.micro_batch // both} and dp={layout.dp * both}"
    return (
        f"cp={layout.cp} with micro_batch={layout.micro_batch}: {fewer} gives every rank as many tokens and less to "
        "send, so only estimate and train take it"
    )


def recompute_modes(layout: Layout, context: RuleContext) -> tuple[str, ...]:
    """The modes that a block of this layout may have, the job's pin held."""
    allowed = tuple(mode for mode in context.capabilities.recompute if why_no_recompute(mode, layout, context) is None)
    return tuple(mode for mode in allowed if context.job.allows("recompute", mode))


def why_no_recompute(mode: str, layout: Layout, context: RuleContext) -> str | None:
    """The reason why blocks of this layout cannot recompute so."""
    allowed = context.capabilities.recompute
    if mode not in allowed:
        return f"recompute={mode}: {context.executor} recomputes {' or '.join(allowed)} today"
    if mode != "none" and layout.schedule in SPLIT_BACKWARD:
        return (
            f"recompute={mode} with {layout.schedule}: torch 2.11 to 2.13 runs the recomputation of a split backward "
            "several times over (full) or raises (selective)"
        )
    if mode == "selective" and isinstance(context.model, TracedModel):
        return f"recompute=selective: what is cheap in {context.model.factory} nobody has said; ask for full"
    if mode == "selective" and context.model.experts is not None and not context.capabilities.experts_with_selective:
        return (
            "recompute=selective with experts: torch 2.13 may raise where FSDP2 wraps a part of what is recomputed; "
            "ask for full"
        )
    return None


def why_no_reshard(layout: Layout) -> str | None:
    """The reason why stages of this layout cannot say whether their weights are freed between passes."""
    if layout.zero != 3:
        return f"zero={layout.zero} keeps gathered weights, so only stages of zero=3 have a choice"
    if layout.pp == 1:
        return "pp=1 has one stage, which zero=3 reshards and zero=2 does not"
    if not layout.stages_choose:
        return (
            f"under {layout.schedule} torch's pipeline gathers all weights of a chunk before its turn; gpipe and 1f1b "
            "leave that to each layer"
        )
    return None


def require_legal(layout: Layout, recompute: str, context: RuleContext, *, reshard: bool | None = None) -> None:
    """Raise an InputError with every reason that forbids a layout, and what its stages do, as a person wrote them."""
    reasons = list(violations(layout, context))
    if (reason := why_no_recompute(recompute, layout, context)) is not None:
        reasons.append(reason)
    if reshard is not None and (reason := why_no_reshard(layout)) is not None:
        reasons.append(f"reshard={str(reshard).lower()}: {reason}")
    if reasons:
        raise InputError(
            "the layout is not legal",
            where="--layout",
            expected=f"a layout that {context.model.name} can be trained in on {context.world_size} devices",
            got="; ".join(reasons),
        )
