"""Plan: the planner's answer and the runtime's orders; frozen, versioned, load(save(plan)) == plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from profiles.cluster import ClusterSpec
from profiles.model import ModelSpec
from profiles.store import Reader, dump_yaml, load_document, write_atomically
from profiles.traced_model import read_model

from .capabilities import CAPABILITIES
from .job import TrainingJob
from .layout import RECOMPUTE_MODES, Layout
from .parse import check_pin
from .recompute_spans import Span, plain_spans, read_spans
from .rules import RuleContext, violations, why_no_recompute, why_no_reshard

SCHEMA = "meshwright.plan/v1"
TIME_PARTS = ("compute", "recompute", "tp", "cp", "ep", "pp", "bubble", "dp_exposed", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One chunk of the model on one pipeline rank: blocks [first, end), and how many recompute how.

    Its first blocks do, unless `recompute_spans` says which ([Note: Which blocks recompute]). `reshard` is whether its
    layers' weights are freed between passes ([Note: Resharding] in `layout_costs`).
    """

    rank: int
    chunk: int
    first: int
    end: int
    embedding: bool
    head: bool
    recompute_none: int
    recompute_selective: int
    recompute_full: int
    recompute_spans: tuple[Span, ...] = ()
    reshard: bool | None = None

    @classmethod
    def whole(cls, model: ModelSpec) -> Stage:
        """The one stage of a model that is not cut, of which nothing recomputes."""
        return cls(
            rank=0,
            chunk=0,
            first=0,
            end=model.layers,
            embedding=True,
            head=True,
            recompute_none=model.layers,
            recompute_selective=0,
            recompute_full=0,
        )

    def recompute_mode(self, block: int) -> str:
        """`full`, `selective` or `none` for a global block index of this stage."""
        if self.recompute_spans:
            return next((mode for mode, first, end in self.recompute_spans if first <= block < end), "none")
        position = block - self.first
        if position < self.recompute_full:
            return "full"
        return "selective" if position < self.recompute_full + self.recompute_selective else "none"

    def to_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "chunk": self.chunk,
            "layers": [self.first, self.end],
            "embedding": self.embedding,
            "head": self.head,
            "recompute": {mode: getattr(self, f"recompute_{mode}") for mode in RECOMPUTE_MODES},
            **({"recompute_layers": plain_spans(self.recompute_spans)} if self.recompute_spans else {}),
            **({"reshard": self.reshard} if self.reshard is not None else {}),
        }

    @classmethod
    def from_dict(cls, reader: Reader) -> Stage:
        first, end = reader.integers("layers", length=2)
        counts = reader.child("recompute")
        stage = cls(
            rank=reader.integer("rank"),
            chunk=reader.integer("chunk"),
            first=first,
            end=end,
            embedding=reader.boolean("embedding"),
            head=reader.boolean("head"),
            recompute_none=counts.integer("none"),
            recompute_selective=counts.integer("selective"),
            recompute_full=counts.integer("full"),
            reshard=reader.boolean("reshard") if "reshard" in reader else None,
        )
        counts.finish()
        spans = reader.child("recompute_layers") if "recompute_layers" in reader else None
        reader.finish()
        if first > end:
            raise reader.fail("layers", "[first, end) with first <= end", [first, end])
        total = stage.recompute_none + stage.recompute_selective + stage.recompute_full
        if total != end - first:
            raise reader.fail("recompute", f"counts that add up to the stage's {end - first} layers", total)
        if spans is None:
            return stage
        again = {"full": stage.recompute_full, "selective": stage.recompute_selective}
        return replace(stage, recompute_spans=read_spans(spans, first, end, again))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step should take. `memory_bytes` has one itemised mapping per pipeline rank."""

    step_seconds: float
    tokens_per_second_per_device: float
    model_tflops_per_device: float
    mfu: float
    peak_memory_bytes: float
    breakdown_seconds: dict[str, float]
    memory_bytes: tuple[dict[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        document = asdict(self)
        document["memory_bytes"] = [dict(items) for items in self.memory_bytes]
        return document

    @classmethod
    def from_dict(cls, reader: Reader) -> Prediction:
        parts = reader.child("breakdown_seconds")
        prediction = cls(
            step_seconds=reader.number("step_seconds", above=0),
            tokens_per_second_per_device=reader.number("tokens_per_second_per_device", above=0),
            model_tflops_per_device=reader.number("model_tflops_per_device", above=0),
            mfu=reader.number("mfu", minimum=0),
            peak_memory_bytes=reader.number("peak_memory_bytes", minimum=0),
            breakdown_seconds={part: parts.number(part, minimum=0) for part in TIME_PARTS},
            memory_bytes=tuple(_numbers(child) for child in reader.children("memory_bytes")),
        )
        parts.finish()
        reader.finish()
        return prediction


def _numbers(reader: Reader) -> dict[str, float]:
    return {key: reader.number(key, minimum=0) for key in reader}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How we know that no legal layout is faster: counts of what was ruled out and by what.

    `objective_seconds` is the simulated step of the plan as emitted; `bound_seconds` the least that any
    layout or assignment could reach; `gap` = objective / bound - 1.
    """

    objective_seconds: float
    bound_seconds: float
    gap: float
    layouts_legal: int
    layouts_pruned_memory: int
    layouts_pruned_bound: int
    ilps_solved: int
    solver: str
    solve_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, reader: Reader) -> Certificate:
        certificate = cls(
            objective_seconds=reader.number("objective_seconds", above=0),
            bound_seconds=reader.number("bound_seconds", minimum=0),
            gap=reader.number("gap", minimum=0),
            layouts_legal=reader.integer("layouts_legal"),
            layouts_pruned_memory=reader.integer("layouts_pruned_memory"),
            layouts_pruned_bound=reader.integer("layouts_pruned_bound"),
            ilps_solved=reader.integer("ilps_solved"),
            solver=reader.text("solver"),
            solve_seconds=reader.number("solve_seconds", minimum=0),
        )
        reader.finish()
        return certificate


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A layout that was solved and lost, or was ranked by `--top`."""

    layout: Layout
    step_seconds: float
    peak_memory_bytes: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_dict(),
            "step_seconds": self.step_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    @classmethod
    def from_dict(cls, reader: Reader) -> Alternative:
        alternative = cls(
            layout=Layout.from_dict(reader.child("layout")),
            step_seconds=reader.number("step_seconds", above=0),
            peak_memory_bytes=reader.number("peak_memory_bytes", minimum=0),
        )
        reader.finish()
        return alternative


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a run needs: model, cluster, job, layout, stages, and what it should cost."""

    model: ModelSpec
    cluster: ClusterSpec
    job: TrainingJob
    layout: Layout
    stages: tuple[Stage, ...]
    prediction: Prediction
    certificate: Certificate
    alternatives: tuple[Alternative, ...] = ()

    @property
    def microbatches(self) -> int:
        return self.layout.microbatches(self.job.global_batch)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model.to_dict(),
            "cluster": self.cluster.to_dict(),
            "job": self.job.to_dict(),
            "layout": self.layout.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "prediction": self.prediction.to_dict(),
            "certificate": self.certificate.to_dict(),
            "alternatives": [alternative.to_dict() for alternative in self.alternatives],
        }

    @classmethod
    def from_dict(cls, reader: Reader) -> Plan:
        """Read and check a plan: layout legal for its model and job, layers neither lost nor doubled."""
        plan = cls(
            model=read_model(reader.child("model")),
            cluster=ClusterSpec.from_dict(reader.child("cluster")),
            job=TrainingJob.from_dict(reader.child("job")),
            layout=Layout.from_dict(reader.child("layout")),
            stages=tuple(Stage.from_dict(child) for child in reader.children("stages")),
            prediction=Prediction.from_dict(reader.child("prediction")),
            certificate=Certificate.from_dict(reader.child("certificate")),
            alternatives=tuple(Alternative.from_dict(child) for child in reader.children("alternatives", default=[])),
        )
        reader.finish()
        for key, pin in plan.job.pins.items():
            check_pin(key, pin, f"{reader.source}: job.pins.{key}")
        reasons = violations(plan.layout, RuleContext(plan.model, plan.job, plan.cluster.devices))
        if reasons:
            raise reader.refuse("layout", "a layout that is legal for this model, job and cluster", reasons)
        capabilities = CAPABILITIES[plan.job.target]
        if plan.job.precision not in capabilities.precisions:
            raise reader.fail("job.precision", "one of " + ", ".join(capabilities.precisions), plan.job.precision)
        ranks = len(plan.prediction.memory_bytes)
        if ranks != plan.layout.pp:
            expected = f"one mapping for each of {plan.layout.pp} pipeline ranks"
            raise reader.fail("prediction.memory_bytes", expected, ranks)
        _check_stages(plan, reader)
        return plan


def _check_stages(plan: Plan, reader: Reader) -> None:
    layout, layers = plan.layout, plan.model.layers
    rules = RuleContext(plan.model, plan.job, plan.cluster.devices)
    places = [(rank, chunk) for rank in range(layout.pp) for chunk in range(layout.virtual_stages)]
    places.sort(key=lambda place: layout.stages_of(place[0])[place[1]])
    got = [(stage.rank, stage.chunk) for stage in plan.stages]
    if got != places:
        held = "chunk 0" if layout.virtual_stages == 1 else f"chunks 0 to {layout.virtual_stages - 1}"
        expected = f"one stage for each of the {layout.pp} pipeline ranks, in order, {held}"
        raise reader.fail("stages", expected, got)
    expected_first = 0
    for index, stage in enumerate(plan.stages):
        place = f"stages[{index}]"
        if stage.first != expected_first:
            verb = "lost" if stage.first > expected_first else "doubled"
            span = sorted((stage.first, expected_first))
            raise reader.fail(
                f"{place}.layers",
                f"a stage that starts at layer {expected_first}, where the one before it ends",
                f"{stage.first}: layers {span[0]} to {span[1] - 1} are {verb}",
            )
        if stage.embedding != (index == 0) or stage.head != (index == len(places) - 1):
            raise reader.fail(f"{place}", "the embedding on the first stage and the head on the last", stage.to_dict())
        for mode in RECOMPUTE_MODES:
            number = getattr(stage, f"recompute_{mode}")
            if number and (reason := why_no_recompute(mode, layout, rules)) is not None:
                raise reader.fail(f"{place}.recompute.{mode}", f"0: {reason}", number)
        if stage.reshard is not None and (reason := why_no_reshard(layout)) is not None:
            raise reader.fail(f"{place}.reshard", f"no such key: {reason}", stage.reshard)
        if stage.first == stage.end and not (stage.embedding or stage.head):
            raise reader.fail(f"{place}.layers", "at least one layer on a stage between first and last", 0)
        expected_first = stage.end
    if expected_first != layers:
        verb = "lost" if expected_first < layers else "doubled or invented"
        raise reader.fail(
            f"stages[{len(places) - 1}].layers",
            f"stages that end at the model's {layers} layers",
            f"{expected_first}: layers are {verb}",
        )


def dumps(plan: Plan) -> str:
    """The plan as YAML text."""
    return dump_yaml(plan.to_dict())


def save(plan: Plan, path: Path) -> None:
    """Write the plan to `path`, whole or not at all."""
    write_atomically(path, dumps(plan))


def load(path: Path) -> Plan:
    """The plan in `path`; an InputError names file and key path of whatever is wrong."""
    return Plan.from_dict(load_document(path, schema=SCHEMA, kind="plan"))
