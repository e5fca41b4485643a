"""Question: everything a plan depends on, and how it is put together from the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from profiles.catalogue import resolve_cluster, resolve_hardware_path, resolve_model
from profiles.cluster import ClusterSpec
from profiles.hardware import HardwareProfile, load_hardware
from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.traced_model import keeps_documents_apart

from .job import OFFLOADS, PRECISIONS, TARGETS, TrainingJob
from .parse import parse_bytes, parse_pins
from .plan import Plan
from .rules import RuleContext

MOST_LAYERS = 1000  # what bounds look up grows with the layers' square; the catalogue's deepest has 128


@dataclass(frozen=True)
class Question:
    """Everything the answer depends on."""

    model: ModelSpec
    cluster: ClusterSpec
    hardware: HardwareProfile
    job: TrainingJob

    @property
    def limit_bytes(self) -> float:
        return self.job.memory_limit_bytes or self.cluster.memory_bytes

    @property
    def rules(self) -> RuleContext:
        return RuleContext(self.model, self.job, self.cluster.devices, tuple(link.span for link in self.cluster.links))


def ask(
    model: str | ModelSpec,
    cluster: str,
    global_batch: int,
    sequence: int,
    *,
    devices: int | None = None,
    precision: str | None = None,
    memory_limit: str | None = None,
    target: str = "meshwright",
    pins: Sequence[str] = (),
    bans: Sequence[str] = (),
    expert_imbalance: float = 1.0,
    offload: str = "none",
    document_length: float | None = None,
) -> Question:
    """The question that the words ask; an InputError names the flag that cannot be understood.

    `precision` defaults to what the device is made for: bf16 on GPUs, fp32 on CPUs.
    """
    _one_of("--target", target, TARGETS)
    _one_of("--offload", offload, OFFLOADS)
    if precision is not None:
        _one_of("--precision", precision, PRECISIONS)
    if document_length is not None and target != "meshwright":
        raise InputError(
            "packed documents are priced as our own runtime attends to them",
            where="--document-length",
            expected="--target meshwright",
            got=f"--target {target}",
        )
    pinned, banned = parse_pins(pins, bans)
    spec = resolve_cluster(cluster)
    if devices is not None:
        spec = spec.with_devices(devices)
    hardware = load_hardware(resolve_hardware_path(spec.hardware))
    job = TrainingJob(
        global_batch=global_batch,
        sequence=sequence,
        precision=precision or ("fp32" if hardware.backend == "gloo" else "bf16"),
        target=target,
        memory_limit_bytes=parse_bytes(memory_limit, "--memory-limit") if memory_limit else None,
        pins=pinned,
        bans=banned,
        expert_imbalance=expert_imbalance,
        offload=offload,
        document_length=document_length,
    )
    known = resolve_model(model) if isinstance(model, str) else model
    _check_depth(known, "--model")
    if document_length is not None and not keeps_documents_apart(known):
        raise InputError(
            "documents are kept apart in causal attention of our own alone",
            where="--document-length",
            expected="a decoder of the catalogue or of a config.json",
            got=known.name,
        )
    return Question(known, spec, hardware, job)


def question_of(plan: Plan) -> Question:
    """The question that the plan answers, with the hardware profile as it is today."""
    _check_depth(plan.model, "the plan: model.layers")
    hardware = load_hardware(resolve_hardware_path(plan.cluster.hardware))
    return Question(plan.model, plan.cluster, hardware, plan.job)


def _check_depth(model: ModelSpec, where: str) -> None:
    if model.layers > MOST_LAYERS:
        raise InputError(
            f"{model.name} is too deep to be planned",
            where=where,
            expected=f"at most {MOST_LAYERS:,} layers",
            got=f"{model.layers:,}",
            hint="is it the number of layers?",
        )


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{value!r} is not known", where=flag, expected="one of " + ", ".join(choices), got=value)
