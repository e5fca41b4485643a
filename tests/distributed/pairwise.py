"""Small layouts that the runtime trains: all there are, and a few that hold every pair of settings that can meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.rules import RuleContext, violations, why_no_recompute
from tests.plans import (
    make_plan,
    tiny_bert,
    tiny_experts,
    tiny_gpt2,
    tiny_latent,
    tiny_llama,
    tiny_megatron_bert,
    tiny_shared_experts,
)

JOB = TrainingJob(global_batch=8, sequence=16, precision="fp32")
MODELS = {
    "llama": tiny_llama(),
    "gpt2": tiny_gpt2(),
    "bert": tiny_bert(),
    "megatron-bert": tiny_megatron_bert(),
    "experts": tiny_experts(),
    "shared": tiny_shared_experts(),
    "latent": tiny_latent(),
}
DECODERS, MASKED, EXPERTS = ("llama", "gpt2"), ("bert", "megatron-bert"), ("experts", "shared", "latent")
MOST_RANKS = 8
# Schedule and chunks a rank; the first is no pipeline.
PIPELINES = (
    ("", 1),
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 3),
    ("looped-bfs", 2),
    ("zb1p", 1),
    ("zb1p", 2),
    ("zbv", 2),
    ("dualpipev", 2),
)
# Style and degree of context parallelism.
CONTEXTS = (("none", 1), ("ring", 2), ("all-to-all", 2))
# ep and etp.
GRIDS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
FACTORS: dict[str, tuple[object, ...]] = {
    "model": (),  # those that are asked for
    "tp": (1, 2),
    "sequence_parallel": (False, True),
    "context": CONTEXTS,
    "pipeline": PIPELINES,
    "pp": (1, 2, 3),
    "dp": (1, 2, 4),
    "zero": (0, 1, 2, 3),
    "shard_groups": (1, 2),  # more than one is HSDP
    "micro_batch": (1, 2),
    "recompute": ("none", "selective", "full", "mixed"),
    "cuts": ("even", "uneven"),
    "grid": GRIDS[:1],
}
_PLACES = {factor: place for place, factor in enumerate(FACTORS)}
# For models with experts: every grid, and what has nothing to do with it in fewer ways.
WITH_GRIDS: dict[str, tuple[object, ...]] = {
    "pp": (1, 2),
    "recompute": ("none", "selective", "full"),
    "cuts": ("even",),
    "grid": GRIDS,
}


@dataclass(frozen=True)
class Setting:
    """One value of every factor, in the order of FACTORS."""

    values: tuple[object, ...]

    def __getitem__(self, factor: str) -> object:
        return self.values[_PLACES[factor]]

    @property
    def pairs(self) -> frozenset[tuple[int, object, int, object]]:
        indexed = tuple(enumerate(self.values))
        return frozenset((i, a, j, b) for (i, a), (j, b) in itertools.combinations(indexed, 2))

    def layout(self) -> Layout:
        """The layout, which need not be legal."""
        number = {name: int(str(self[name])) for name in ("tp", "pp", "dp", "zero", "micro_batch", "shard_groups")}
        pipeline, context, grid = self["pipeline"], self["context"], self["grid"]
        assert isinstance(pipeline, tuple)
        assert isinstance(context, tuple)
        assert isinstance(grid, tuple)
        return Layout(
            tp=number["tp"],
            sequence_parallel=bool(self["sequence_parallel"]),
            cp_style=context[0],
            cp=context[1],
            pp=number["pp"],
            schedule=pipeline[0] or "1f1b",
            virtual_stages=pipeline[1],
            dp=number["dp"],
            dp_shard=max(1, number["dp"] // number["shard_groups"]) if number["zero"] else 1,
            zero=number["zero"],
            micro_batch=number["micro_batch"],
            ep=grid[0],
            etp=grid[1],
        )

    def plan(self) -> Plan:
        """The plan, which need not be legal either."""
        layout, model = self.layout(), MODELS[str(self["model"])]
        cuts = None
        # As few layers in front as is legal, the rest behind; with so many stages there is no other way.
        if self["cuts"] == "uneven" or layout.stages > model.layers:
            middle = layout.stages - 2
            cuts = [0, *range(1, middle + 1)]
        ends = [0, *(cuts or [model.layers * i // layout.stages for i in range(1, layout.stages)]), model.layers]
        sizes = [end - start for start, end in itertools.pairwise(ends)]
        mode = self["recompute"]
        full = [size if mode == "full" else size // 2 if mode == "mixed" else 0 for size in sizes]
        selective = [size if mode == "selective" else size - size // 2 if mode == "mixed" else 0 for size in sizes]
        return make_plan(model, layout, JOB, cuts, full, selective, check=False)

    def __str__(self) -> str:
        words = [str(self["model"]), self.layout().short()]
        words += [str(self[name]) for name in ("recompute", "cuts") if self[name] not in ("none", "even")]
        return " ".join(words)


def settings(models: tuple[str, ...] = DECODERS) -> Iterator[Setting]:
    """All settings of these models, legal or not, that say nothing twice: what has no effect has its first value."""
    factors = FACTORS | {"model": models} | (WITH_GRIDS if models == EXPERTS else {})
    for values in itertools.product(*factors.values()):
        setting = Setting(values)
        piped = setting["pipeline"] != ("", 1)
        if piped != (setting["pp"] != 1) or (not piped and setting["cuts"] == "uneven"):
            continue
        if setting["shard_groups"] == 2 and (setting["dp"] != 4 or setting["zero"] == 0):
            continue
        if setting["tp"] == 1 and setting["sequence_parallel"]:
            continue
        yield setting


def refusals(setting: Setting) -> list[str]:
    """The reasons why the runtime does not train it."""
    layout = setting.layout()
    context = RuleContext(MODELS[str(setting["model"])], JOB, layout.world_size)
    reasons = list(violations(layout, context))
    modes = {"mixed": ("selective", "full")}.get(str(setting["recompute"]), (str(setting["recompute"]),))
    return reasons + [reason for mode in modes if (reason := why_no_recompute(mode, layout, context)) is not None]


@cache
def legal_settings(models: tuple[str, ...] = DECODERS) -> tuple[Setting, ...]:
    """Every setting that is trained on at most `MOST_RANKS` ranks."""
    return tuple(
        setting for setting in settings(models) if setting.layout().world_size <= MOST_RANKS and not refusals(setting)
    )


@cache
def pairwise_settings(models: tuple[str, ...] = DECODERS) -> tuple[Setting, ...]:
    """Few legal settings among which every pair of values that any legal setting has occurs; the same each time.

    Greedy: of the settings with some pair that is missing, one that has the most of those; fewer ranks first.
    """
    legal = list(legal_settings(models))
    random.Random(5).shuffle(legal)
    legal.sort(key=lambda setting: setting.layout().world_size)
    pairs = {setting: setting.pairs for setting in legal}
    missing = set(itertools.chain.from_iterable(pairs.values()))
    chosen: list[Setting] = []
    while missing:
        rare = min(missing, key=repr)
        able = list(itertools.islice((setting for setting in legal if rare in pairs[setting]), 80))
        best = max(able, key=lambda setting: len(pairs[setting] & missing) / setting.layout().world_size ** 0.5)
        chosen.append(best)
        missing -= pairs[best]
    return tuple(chosen)
