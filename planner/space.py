"""The space: every layout of a question that is legal and worth proposing once, in groups that share their degrees.

Within a group the pipeline's schedule, the sharding of the state and the experts' grid are chosen apart, so a group
says how many layouts it holds without listing them, and a bound on all of them costs as much as one on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from .capabilities import Capabilities, missing_features
from .job import TrainingJob
from .layout import Layout
from .rules import (
    DEGREE_RULES,
    MICRO_BATCH_RULES,
    PIPELINE_RULES,
    STATE_RULES,
    Rule,
    RuleContext,
    recompute_modes,
    why_not_proposed,
    zero_rule,
)


@dataclass(frozen=True)
class LayoutGroup:
    """Layouts of one set of degrees and micro batch; `base` has the plainest knobs.

    `pipelines` are (schedule, virtual_stages), `states` (zero, dp_shard, ep, etp).
    """

    base: Layout
    pipelines: tuple[tuple[str, int], ...]
    states: tuple[tuple[int, int, int, int], ...]

    def by_state(self) -> Iterator[LayoutGroup]:
        """The same layouts, a group for each way to shard the state and lay out the experts."""
        for state in self.states:
            zero, shard, ep, etp = state
            yield replace(self, base=self.base.but(zero=zero, dp_shard=shard, ep=ep, etp=etp), states=(state,))

    def by_schedule(self) -> Iterator[LayoutGroup]:
        """The same layouts, a group for each schedule."""
        for pipelines in pipelines_by_schedule(self.pipelines):
            yield replace(self, pipelines=pipelines)

    def by_chunks(self) -> Iterator[LayoutGroup]:
        """The same layouts, a group for each schedule with each number of chunks."""
        for pipeline in self.pipelines:
            yield replace(self, pipelines=(pipeline,))

    def __len__(self) -> int:
        return len(self.pipelines) * len(self.states)

    def __iter__(self) -> Iterator[Layout]:
        for (schedule, chunks), (zero, shard, ep, etp) in product(self.pipelines, self.states):
            yield self.base.but(schedule=schedule, virtual_stages=chunks, zero=zero, dp_shard=shard, ep=ep, etp=etp)


@lru_cache(maxsize=4096)
def pipelines_by_schedule(pipelines: tuple[tuple[str, int], ...]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The (schedule, virtual_stages) of each schedule, fewest chunks first."""
    return tuple(tuple(sorted(each for each in pipelines if each[0] == one)) for one in dict(pipelines))


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def enumerate_layouts(context: RuleContext) -> Iterator[Layout]:
    """Every legal layout of the space once, pins and bans of the job held."""
    for group in layout_groups(context):
        yield from group


def layout_groups(context: RuleContext) -> Iterator[LayoutGroup]:
    """The space by groups. HSDP shards over the dp ranks that a tier of links joins, or over all of dp."""
    if missing_features(context.model, context.job.target):
        return
    space = _Space(context)
    for base in space.degrees():
        pipelines, states = space.pipelines(base), space.states(base)
        for together, apart in space.meeting(base, pipelines, states):
            if together and apart:
                yield LayoutGroup(base, together, apart)


def fills_devices(job: TrainingJob, world_size: int) -> bool:
    """Whether some degrees that pins and bans leave have a product of `world_size`, whatever else forbids them."""
    return any(
        job.allows("dp", world_size // (tp * cp * pp))
        for tp in divisors(world_size)
        if job.allows("tp", tp)
        for cp in divisors(world_size // tp)
        if job.allows("cp", cp)
        for pp in divisors(world_size // (tp * cp))
        if job.allows("pp", pp)
    )


class _Space:
    def __init__(self, context: RuleContext) -> None:
        self._context = context
        self._pipelines: dict[tuple[int, int], tuple[tuple[str, int], ...]] = {}
        self._states: dict[tuple[int, int, int, int, bool], tuple[tuple[int, int, int, int], ...]] = {}

    @property
    def _able(self) -> Capabilities:
        return self._context.capabilities

    @property
    def _job(self) -> TrainingJob:
        return self._context.job

    def _held(self, key: str, value: object) -> bool:
        """Whether the job's pins and bans allow the value."""
        return self._job.allows(key, value)

    def degrees(self) -> Iterator[Layout]:
        """Degrees, micro batch and sequence parallelism, each with the rules of degrees held."""
        world, batch = self._context.world_size, self._job.global_batch
        for tp in self._choices("tp", world):
            for cp in self._choices("cp", world // tp):
                for pp in self._choices("pp", world // (tp * cp)):
                    dp = world // (tp * cp * pp)
                    if batch % dp or not self._held("dp", dp):
                        continue
                    for style, parallel in product(
                        self._able.cp_styles if cp > 1 else ("none",), (False, True) if tp > 1 else (False,)
                    ):
                        yield from self._micro_batches(tp, cp, style, pp, dp, parallel)

    def _micro_batches(self, tp: int, cp: int, style: str, pp: int, dp: int, parallel: bool) -> Iterator[Layout]:
        if not self._held("sequence_parallel", parallel) or not self._held("cp_style", style):
            return
        base = Layout(tp=tp, cp=cp, cp_style=style, pp=pp, dp=dp, sequence_parallel=parallel)
        if _any_forbids(DEGREE_RULES, base, self._context):
            return
        for micro_batch in divisors(self._job.global_batch // dp):
            layout = base.but(micro_batch=micro_batch)
            if not self._held("micro_batch", micro_batch) or why_not_proposed(layout) is not None:
                continue
            if not _any_forbids(MICRO_BATCH_RULES, layout, self._context):
                yield layout

    def _choices(self, key: str, most: int) -> list[int]:
        return [degree for degree in divisors(most) if self._held(key, degree)]

    def pipelines(self, base: Layout) -> tuple[tuple[str, int], ...]:
        key = (base.pp, base.microbatches(self._job.global_batch))
        if key not in self._pipelines:
            layers = self._context.model.layers
            found = []
            for schedule in self._able.schedules if base.pp > 1 else ("1f1b",):
                for chunks in range(1, (layers + 2) // base.pp + 1):
                    layout = base.but(schedule=schedule, virtual_stages=chunks)
                    if not self._held("schedule", schedule) or not self._held("virtual_stages", chunks):
                        continue
                    legal = layout.stages <= layers + 2 and not _any_forbids(PIPELINE_RULES, layout, self._context)
                    if legal and recompute_modes(layout, self._context):
                        found.append((schedule, chunks))
            self._pipelines[key] = tuple(found)
        return self._pipelines[key]

    def states(self, base: Layout) -> tuple[tuple[int, int, int, int], ...]:
        key = (base.tp, base.cp, base.pp, base.dp, base.sequence_parallel)
        if key not in self._states:
            found = []
            for zero, shard in self._sharding(base):
                for ep, etp in self._expert_grids(base):
                    layout = base.but(zero=zero, dp_shard=shard, ep=ep, etp=etp)
                    if not _any_forbids(STATE_RULES, layout, self._context):
                        found.append((zero, shard, ep, etp))
            self._states[key] = tuple(found)
        return self._states[key]

    def meeting(
        self, base: Layout, pipelines: tuple[tuple[str, int], ...], states: tuple[tuple[int, int, int, int], ...]
    ) -> Iterator[tuple[tuple[tuple[str, int], ...], tuple[tuple[int, int, int, int], ...]]]:
        """(pipelines, states) of which each goes with each; only zero 3 does not go with every schedule."""
        if "reshard" in self._job.pins:  # of layouts whose stages have the choice
            states = tuple(state for state in states if state[0] == 3)
            pipelines = tuple(each for each in pipelines if base.but(zero=3, schedule=each[0]).stages_choose)
        freed = tuple(state for state in states if state[0] == 3)
        if not freed or base.pp == 1:
            yield pipelines, states
            return
        yield pipelines, tuple(state for state in states if state[0] < 3)
        zero, shard, _, _ = freed[0]
        sharded = base.but(zero=zero, dp_shard=shard)
        able = {s for s in dict(pipelines) if zero_rule(replace(sharded, schedule=s), self._context) is None}
        yield tuple(pipeline for pipeline in pipelines if pipeline[0] in able), freed

    def _sharding(self, base: Layout) -> list[tuple[int, int]]:
        found = [(0, 1)] if self._held("zero", 0) and self._held("dp_shard", 1) else []
        inner = {span // (base.tp * base.cp) for span in self._context.spans if span % (base.tp * base.cp) == 0}
        shards = sorted({base.dp} | ({n for n in inner if 1 < n < base.dp}))
        for zero in range(1, 4):
            if self._held("zero", zero):
                found += [(zero, shard) for shard in shards if self._held("dp_shard", shard)]
        return found

    def _expert_grids(self, base: Layout) -> list[tuple[int, int]]:
        experts = self._context.model.experts
        if experts is None or not self._able.experts:
            return [(1, 1)]
        grids = product(divisors(experts.number), sorted({1, base.tp}))
        return [(ep, etp) for ep, etp in grids if self._held("ep", ep) and self._held("etp", etp)]


def _any_forbids(rules: Iterable[Rule], layout: Layout, context: RuleContext) -> bool:
    return any(rule(layout, context) is not None for rule in rules)
