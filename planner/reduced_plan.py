"""A plan at reduced size: the same kinds of everything, so few of each that one small machine runs it in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from profiles.masked_language import predicted_tokens
from profiles.model import ModelSpec
from profiles.traced_model import TracedModel

from .layout import LOSS_TOKENS, RECOMPUTE_MODES, Layout
from .plan import Plan, Stage
from .recompute_spans import MODES_IN_ORDER, spans_of
from .reduced_model import small_model
from .reduced_module import module_stages
from .rules import RuleContext, violations
from .schedule import why_illegal
from .space import divisors

MOST_RANKS = 8  # processes of one small machine; 8 hold two of each of three axes
_SEQUENCE = 16  # tokens
_MOST_OF_A_MICROBATCH = 2  # sequences
_ACCUMULATED = 3  # microbatches without a pipeline; with one, twice its ranks, which has a steady state
_BLOCKS = 2  # of a stage that has at least so many; one more where it has more blocks than another
_HSDP_RANKS = 4  # of dp: two copies of two shards; fewer where cp cuts the shards

SIZE, RANKS, ROUNDING = (
    "seconds instead of hours",
    f"at most {MOST_RANKS} ranks here",
    "16 bits would hide what differs",
)

Counts = dict[str, int]  # blocks by recompute mode


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is smaller than in the plan, or other, and why."""

    what: str
    before: str
    after: str
    why: str

    def to_dict(self) -> dict[str, str]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ReducedPlan:
    """`plan` is what to run; its prediction and certificate are still those of the whole plan.

    `loss_tokens` are the tokens of a piece of the loss, so that a plan whose loss comes in pieces keeps several.
    """

    plan: Plan
    loss_tokens: int
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": self.plan.layout.to_dict(),
            "model": self.plan.model.to_dict(),
            "global_batch": self.plan.job.global_batch,
            "sequence": self.plan.job.sequence,
            "reduced": [change.to_dict() for change in self.changes],
        }


def reduce_plan(plan: Plan, most_ranks: int = MOST_RANKS) -> ReducedPlan:
    """The plan on at most `most_ranks` ranks, of a model of the same form.

    Kept are the schedule and its chunks, zero, sequence parallelism, every axis above 1 (as much of pp as fits, then of
    tp, of cp and of dp, which is not kept beside all three), HSDP where 4 ranks of dp fit, which stages have more
    blocks than others and which none, every recompute mode, experts' axes above 1, and all that the model is besides
    its sizes. Precision is fp32. A module of another package is run as its factory makes it.
    """
    before = plan.layout
    layout = _small_layout(before, most_ranks)
    traced = isinstance(plan.model, TracedModel)
    stages = module_stages(plan, layout) if traced else _stages(plan, layout)
    cut = layout.tp if layout.cp == 1 else 2 * layout.cp * layout.tp
    sequence = plan.job.sequence if traced else -(-min(plan.job.sequence, _SEQUENCE) // cut) * cut
    positions = sequence * (2 if plan.model.max_positions > plan.job.sequence else 1)
    model = plan.model if traced else small_model(plan.model, before, layout, stages[-1].end, positions)
    job = replace(
        plan.job,
        global_batch=layout.micro_batch * layout.dp * _microbatches(plan.microbatches, layout),
        sequence=sequence,
        precision="fp32",
        memory_limit_bytes=None,
        offload="none",
        pins={},
        bans=(),
    )
    reasons = violations(layout, RuleContext(model, job, layout.world_size))
    assert not reasons, reasons
    ranks = layout.world_size
    links = (replace(plan.cluster.links[0], span=ranks),)
    cluster = replace(plan.cluster, nodes=1, devices_per_node=ranks, links=links)
    small = replace(plan, model=model, cluster=cluster, job=job, layout=layout, stages=stages, alternatives=())
    whole = before.micro_batch * predicted_tokens(plan.model, plan.job.sequence)
    tokens = layout.micro_batch * predicted_tokens(model, sequence)
    loss_tokens = max(1, 2 * tokens // 5) if whole > LOSS_TOKENS else tokens  # three pieces, the last one smaller
    return ReducedPlan(plan=small, loss_tokens=loss_tokens, changes=tuple(_changes(plan, small)))


# ---- layout --------------------------------------------------------------------------------------------------


def _small_layout(before: Layout, most_ranks: int) -> Layout:
    pp, tp, cp, dp, dp_shard = _degrees(before, most_ranks)
    etp = tp if before.etp > 1 else 1
    ep = 1
    if before.ep > 1:  # the least, so that the same experts are on several ranks where they were, and their copies
        replicas = dp // dp_shard if before.zero else 1
        ranks = tp * cp * dp // etp
        grids = [(n, ranks // n) for n in divisors(ranks) if n > 1]
        ep = next((n for n, edp in grids if (edp > 1) == (before.edp > 1) and edp % replicas == 0), grids[0][0])
    micro_batch = min(before.micro_batch, _MOST_OF_A_MICROBATCH)
    return replace(before, pp=pp, tp=tp, cp=cp, dp=dp, dp_shard=dp_shard, ep=ep, etp=etp, micro_batch=micro_batch)


def _degrees(layout: Layout, most_ranks: int) -> tuple[int, int, int, int, int]:
    """(pp, tp, cp, dp, dp_shard)."""

    def down(degree: int) -> range:
        return range(min(degree, most_ranks), min(degree, 2) - 1, -1)

    hsdp = bool(layout.zero) and layout.dp_shard < layout.dp
    for replicas, dps in ((2, (min(layout.dp, _HSDP_RANKS),) if hsdp else ()), (1, down(layout.dp)), (1, (1,))):
        for pp, tp, cp, dp in itertools.product(down(layout.pp), down(layout.tp), down(layout.cp), dps):
            if pp * tp * cp * dp <= most_ranks:
                return pp, tp, cp, dp, dp // replicas if layout.zero else 1
    raise AssertionError(f"no two ranks of each of pp, tp and cp in {most_ranks}")


def _microbatches(number: int, layout: Layout) -> int:
    """Microbatches of a step, few and such that torch runs the schedule with them."""
    if layout.pp == 1:
        return min(number, _ACCUMULATED)
    most = min(number, 2 * layout.pp)
    legal = (count for count in range(most, 0, -1) if why_illegal(layout.pipeline(count)) is None)
    return next(legal)


# ---- stages --------------------------------------------------------------------------------------------------


def _stages(plan: Plan, layout: Layout) -> tuple[Stage, ...]:
    """Stages evenly chosen from the plan's, the first and the last among them, with few blocks each."""
    places, pipeline = range(layout.stages), layout.pipeline(1)
    step = (len(plan.stages) - 1) / max(1, layout.stages - 1)
    chosen = [plan.stages[round(place * step)] for place in places]
    sizes = [stage.end - stage.first for stage in chosen]
    fewest = min((size for size in sizes if size), default=0)
    counts = [_few(_modes(stage), _BLOCKS + (size > fewest)) for stage, size in zip(chosen, sizes, strict=True)]
    for mode in RECOMPUTE_MODES:  # those that only stages had which were not chosen
        having = [index for index, stage in enumerate(plan.stages) if _modes(stage)[mode]]
        if having and not any(count[mode] for count in counts):
            counts[round(having[0] / step) if step else 0][mode] = 1
    ends = list(itertools.accumulate(sum(count.values()) for count in counts))
    runs = [[(mode, count[mode]) for mode in _in_order(stage)] for stage, count in zip(chosen, counts, strict=True)]
    return tuple(
        Stage(
            rank=pipeline.rank_of(place),
            chunk=pipeline.stages_of(pipeline.rank_of(place)).index(place),
            first=ends[place - 1] if place else 0,
            end=ends[place],
            embedding=place == 0,
            head=place == places[-1],
            recompute_none=counts[place]["none"],
            recompute_selective=counts[place]["selective"],
            recompute_full=counts[place]["full"],
            recompute_spans=spans_of(runs[place], ends[place - 1] if place else 0),
            reshard=chosen[place].reshard,
        )
        for place in places
    )


def _in_order(stage: Stage) -> list[str]:
    """The modes as they first appear in a stage whose spans say where, else as they stand without."""
    spans = stage.recompute_spans
    begins = {mode: first for mode, first, _ in reversed(spans)}
    plain_first = bool(spans) and spans[0][1] > stage.first
    begins["none"] = stage.first if plain_first else stage.end
    return sorted(MODES_IN_ORDER, key=lambda mode: begins.get(mode, stage.first))


def _modes(stage: Stage) -> Counts:
    return {mode: getattr(stage, f"recompute_{mode}") for mode in RECOMPUTE_MODES}


def _few(counts: Counts, most: int) -> Counts:
    """One block of each mode that there is, and up to `most` in all, the rest of the commonest mode."""
    few = {mode: min(count, 1) for mode, count in counts.items()}
    common = max(counts, key=lambda mode: counts[mode])
    few[common] += max(0, min(sum(counts.values()), most) - sum(few.values()))
    return few


# ---- what changed --------------------------------------------------------------------------------------------


def _changes(plan: Plan, small: Plan) -> Iterator[Change]:
    old, new = plan.layout, small.layout
    models = (plan.model, small.model)
    has_experts = plan.model.experts is not None
    rows = [
        (f"ranks, pp·tp{'·cp' if old.cp > 1 else ''}·dp", *map(_ranks_text, (old, new)), RANKS),
        ("expert grid, edp·ep·etp", *(f"{o.edp}·{o.ep}·{o.etp}" if has_experts else "" for o in (old, new)), RANKS),
        ("shards of HSDP", *map(_hsdp_text, (old, new)), f"HSDP needs {_HSDP_RANKS} ranks of dp"),
        ("micro batch", old.micro_batch, new.micro_batch, SIZE),
        ("microbatches", plan.microbatches, small.microbatches, SIZE),
        ("blocks a stage", _blocks(plan.stages), _blocks(small.stages), SIZE),
        ("hidden, feed-forward", *(f"{model.hidden_size:,}, {model.ffn_hidden_size:,}" for model in models), SIZE),
        ("heads × width", *map(_heads_text, models), SIZE),
        ("experts", *map(_experts_text, models), SIZE),
        ("vocabulary", *(f"{model.vocab_size:,}" for model in models), SIZE),
        ("sequence", f"{plan.job.sequence:,}", f"{small.job.sequence:,}", SIZE),
        ("offload", plan.job.offload, small.job.offload, "ranks here have no device beside the host"),
        ("precision", plan.job.precision, "fp32" if plan.job.precision == "fp32" else "fp32, float64", ROUNDING),
    ]
    for what, before, after, why in rows:
        if str(before) != str(after):
            yield Change(what=what, before=str(before), after=str(after), why=why)


def _ranks_text(layout: Layout) -> str:
    degrees = [layout.pp, layout.tp, *([layout.cp] if layout.cp > 1 else []), layout.dp]
    return f"{layout.world_size} = {'·'.join(map(str, degrees))}"


def _hsdp_text(layout: Layout) -> str:
    return str(layout.dp_shard) if layout.zero and layout.dp_shard < layout.dp else "none"


def _experts_text(model: ModelSpec) -> str:
    experts = model.experts
    return f"{experts.top_k} of {experts.number}, width {experts.ffn_hidden_size}" if experts is not None else ""


def _heads_text(model: ModelSpec) -> str:
    kv = f" ({model.kv_heads} key-value)" if model.kv_heads != model.heads else ""
    return f"{model.heads} × {model.head_dim}{kv}"


def _blocks(stages: Sequence[Stage]) -> str:
    """`12` where all stages have as many, else `17, 15`; of very many the least and the most."""
    sizes = [stage.end - stage.first for stage in stages]
    if len(set(sizes)) == 1:
        return str(sizes[0])
    return ", ".join(map(str, sizes)) if len(sizes) <= MOST_RANKS else f"{min(sizes)} to {max(sizes)}"
