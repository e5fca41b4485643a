"""A published run as a case of the planner: model, cluster, job, layout, layers of each chunk, software.

[Note: What a row does not state]
A blank is filled by a rule that is the same for all rows, and the case lists it under `assumptions`:
- micro batch: 1 in a pipeline, which wants many microbatches (torch's own: as many as ranks); without a pipeline
  the row is skipped;
- sequence parallelism: on with tp > 1 in trainers from 2022 on, when arXiv 2205.05198 brought it;
- vpp 1, cp 1, ep 1, zero 0: as trainers run unless told otherwise;
- recomputation: the least that fits the device's memory, which is what recomputation is for;
- precision: bf16, fp16 where the device has no bf16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from profiles.catalogue import list_catalogue, resolve_model
from profiles.cluster import ClusterSpec
from profiles.model import ModelSpec
from profiles.published_cluster import Catalogue, NoDeviceError, cluster_of, load_catalogue
from profiles.published_model import NoModelError, model_of
from profiles.published_runs import PublishedRun
from profiles.software import Software, SoftwareEntry, load_all_software, resolve_software

from .job import TrainingJob
from .layout import Layout
from .schedule import Pipeline, why_illegal

# What notes call a schedule -> its name here. ZB-2p holds up to twice 1F1B's activations (arXiv 2401.10241,
# section 3), which is no schedule of ours.
SCHEDULE_NAMES = {
    "gpipe": "gpipe",
    "1f1b": "1f1b",
    "1f1b-i": "interleaved-1f1b",
    "interleaved": "interleaved-1f1b",
    "zb-1p": "zb1p",
    "zb-h1": "zb1p",
    "zb-v": "zbv",
    "zbv": "zbv",
    "dualpipev": "dualpipev",
}
_V_SHAPED = ("zbv", "dualpipev")
_FIRST_YEAR_OF_SEQUENCE_PARALLELISM = 2022
# Trainers that pad the vocabulary to a multiple of 128 tp (Megatron-LM's make_vocab_size_divisible_by, from memory).
_PADDED_TO = 128
_PADDING_FAMILIES = ("megatron", "megascale", "nemo")


class SkippedRunError(Exception):
    """A row that states too little, or what no prediction is for; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class RunCase:
    """All that a prediction needs of a row.

    `chunk_layers` is the layers of each of the pp · virtual_stages chunks in the model's order; chunk c lies on
    pipeline rank c mod pp (on the way back in V-shaped schedules). `recompute` None: not stated, so the least
    that fits. `assumptions` are what the row leaves open and this fills in, `warnings` what stands in for
    something that the catalogue does not have.
    """

    run: PublishedRun
    model: ModelSpec
    cluster: ClusterSpec
    job: TrainingJob
    layout: Layout
    chunk_layers: tuple[int, ...]
    recompute: str | None
    software: Software
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def hardware(self) -> str:
        """The hardware profile's name."""
        return self.cluster.hardware

    @property
    def layout_stated(self) -> bool:
        """Whether the row says all that the layout needs: no blank that would make a difference to it."""
        run, layout = self.run, self.layout
        needed = [run.recompute, run.micro_batch]
        needed += [run.vpp] if layout.pp > 1 else []
        needed += [run.sp] if layout.tp > 1 else []
        if layout.dp * layout.cp > 1 and run.zero_stage is None:
            needed.append(run.dist_opt)
        return None not in needed


@dataclass(frozen=True)
class RunFacts:
    """What all rows share, loaded once."""

    catalogue: Catalogue
    software: Mapping[str, SoftwareEntry]
    expert_models: tuple[ModelSpec, ...]


def load_run_facts() -> RunFacts:
    models = [resolve_model(name) for name in list_catalogue("models")]
    return RunFacts(load_catalogue(), load_all_software(), tuple(m for m in models if m.experts is not None))


def case_of(run: PublishedRun, facts: RunFacts) -> RunCase:
    """The case of a row.

    Raises:
        SkippedRunError: with the reason.
    """
    assumptions: list[str] = []
    software, warning = resolve_software(run.software, facts.software, run.notes)
    try:
        model, assumed = model_of(run, facts.expert_models)
        assumptions += assumed
        layout = _layout(run, model, software, assumptions)
        cluster, assumed = cluster_of(run, layout.world_size, facts.catalogue)
        assumptions += assumed
    except (NoModelError, NoDeviceError) as error:
        raise SkippedRunError(str(error)) from None
    assert run.global_batch is not None
    assert run.seq is not None
    model = replace(model, vocab_size=_vocabulary(model.vocab_size, layout.tp, software))
    precision = _precision(run, cluster.hardware, facts, assumptions)
    if run.recompute is None:
        assumptions.append("the least recomputation that fits")
    return RunCase(
        run=run,
        model=model,
        cluster=cluster,
        job=TrainingJob(global_batch=run.global_batch, sequence=run.seq, precision=precision, target="megatron"),
        layout=layout,
        chunk_layers=stage_layers(model, layout.pp * layout.virtual_stages, software),
        recompute=run.recompute,
        software=software,
        assumptions=tuple(assumptions),
        warnings=(warning,) if warning else (),
    )


# ---- the layout ------------------------------------------------------------------------------------------------


def _layout(run: PublishedRun, model: ModelSpec, software: Software, assumptions: list[str]) -> Layout:
    tp, pp, cp = run.tp, run.pp, run.cp or 1
    if tp is None or pp is None:
        raise SkippedRunError("tp or pp not stated")
    dp = run.dp
    if dp is None:
        if run.num_gpus is None:
            raise SkippedRunError("neither dp nor num_gpus stated")
        if run.num_gpus % (tp * pp * cp):
            raise SkippedRunError(f"tp·pp·cp = {tp * pp * cp} does not divide {run.num_gpus} GPUs")
        dp = run.num_gpus // (tp * pp * cp)
    world = tp * pp * cp * dp
    if run.num_gpus not in (None, world):
        raise SkippedRunError(f"tp·cp·pp·dp = {world} and {run.num_gpus} GPUs")
    if run.global_batch is None:
        raise SkippedRunError("global_batch not stated")
    micro_batch = run.micro_batch
    if micro_batch is None:
        if pp == 1:
            raise SkippedRunError("micro_batch not stated")
        micro_batch = _usual_micro_batch(run.global_batch, dp, pp, software)
        assumptions.append(f"micro_batch {micro_batch}")
    if run.global_batch % (micro_batch * dp):
        raise SkippedRunError(f"global_batch {run.global_batch} is no multiple of micro_batch·dp = {micro_batch * dp}")
    schedule, chunks = _schedule(run, pp, assumptions)
    microbatches = run.global_batch // (micro_batch * dp)
    # That torch's 1F1B wants as many microbatches as stages holds for no other trainer.
    reason = None if schedule == "1f1b" else why_illegal(Pipeline(schedule, pp, chunks, microbatches))
    if reason:
        raise SkippedRunError(reason)
    if model.heads % tp:
        raise SkippedRunError(f"tp={tp} does not divide {model.heads} heads")
    if model.layers < pp * chunks - 2:
        raise SkippedRunError(f"{model.layers} layers do not fill {pp * chunks} stages")
    zero = _zero(run, dp * cp, assumptions)
    if zero == 3 and pp > 1 and software.on_torch_pipeline:
        # pytorch/torchtitan, parallelize_llama.py: reshard_after_forward is false under a pipeline.
        zero = 2
        assumptions.append("zero 2, weights stay gathered under a pipeline")
    return Layout(
        tp=tp,
        cp=cp,
        cp_style="ring" if cp > 1 else "none",
        pp=pp,
        dp=dp,
        dp_shard=dp if zero else 1,
        ep=run.ep or 1,
        etp=tp if model.experts is not None else 1,
        sequence_parallel=_sequence_parallel(run, tp, software, assumptions),
        zero=zero,
        micro_batch=micro_batch,
        schedule=schedule,
        virtual_stages=chunks,
    )


def _usual_micro_batch(global_batch: int, dp: int, pp: int, software: Software) -> int:
    """1; of torch's pipelines what a rank's batch cut in as many microbatches as there are ranks has.

    pytorch/torchtitan, torchtitan/parallelisms/pipeline_llama.py: microbatches are the pipeline's degree unless told.
    """
    return max(1, global_batch // (dp * pp)) if software.on_torch_pipeline else 1


def _schedule(run: PublishedRun, pp: int, assumptions: list[str]) -> tuple[str, int]:
    """The schedule and the chunks per pipeline rank."""
    if pp == 1:
        return "1f1b", 1
    notes = run.notes.lower()
    chunks = run.vpp
    if "schedule=" in notes:
        said = re.split(r"[;,\s]", notes.partition("schedule=")[2], maxsplit=1)[0] or "(none)"
        if said not in SCHEDULE_NAMES:
            raise SkippedRunError(f"schedule {said}: none of ours")
        schedule = SCHEDULE_NAMES[said]
    elif chunks is None and "interleaved 1f1b" in notes:
        raise SkippedRunError("interleaved, and vpp not stated")
    else:
        schedule = "interleaved-1f1b" if (chunks or 1) > 1 else "1f1b"
    if chunks is None:
        assumptions.append("vpp 1")
    if schedule in _V_SHAPED:
        return schedule, 2
    if schedule == "interleaved-1f1b" and (chunks or 1) == 1:
        return "1f1b", 1
    if schedule != "interleaved-1f1b" and (chunks or 1) > 1:
        raise SkippedRunError(f"schedule {schedule} and vpp={chunks} contradict each other")
    return schedule, chunks or 1


def _zero(run: PublishedRun, copies: int, assumptions: list[str]) -> int:
    """The zero level: a distributed optimizer is zero 1 at least; one copy has nothing to shard."""
    if run.zero_stage is None and run.dist_opt is None:
        assumptions.append("zero 0")
    zero = run.zero_stage or 0
    if run.dist_opt and zero == 0:
        zero = 1
    return min(zero, 3) if copies > 1 else 0


def _sequence_parallel(run: PublishedRun, tp: int, software: Software, assumptions: list[str]) -> bool:
    if tp == 1:
        return False
    if run.sp is not None:
        return run.sp
    on = software.year >= _FIRST_YEAR_OF_SEQUENCE_PARALLELISM
    assumptions.append(f"sequence parallelism {'on' if on else 'off'}")
    return on


def _precision(run: PublishedRun, hardware: str, facts: RunFacts, assumptions: list[str]) -> str:
    """The dtype of the GEMMs: `fp8-rowwise` is fp8, `bf16/fp16` is bf16."""
    profile = facts.catalogue.hardware[hardware]
    precision = run.precision.lower().replace("/", "-").partition("-")[0]
    if not precision:
        precision = "bf16" if profile.supports("bf16") else "fp16"
        assumptions.append(f"precision {precision}")
    known = profile.supports(precision)
    if precision == "fp8":  # GEMMs alone: attention and all else stay in bf16
        known = profile.supports("bf16") and any(model.dtype == "fp8" for model in profile.gemm_models)
    if not known:
        raise SkippedRunError(f"the hardware profile {hardware} has no figures for {precision}")
    return precision


def _vocabulary(rows: int, tp: int, software: Software) -> int:
    if not any(family in software.family for family in _PADDING_FAMILIES):
        return rows
    return _PADDED_TO * tp * -(-rows // (_PADDED_TO * tp))


def stage_layers(model: ModelSpec, chunks: int, software: Software) -> tuple[int, ...]:
    """Layers of each chunk in the model's order, as the trainer splits them."""
    if software.stage_layers == "even":
        return split_layers(model.layers, chunks)
    layer = sum(rows * columns for rows, columns in model.linear_shapes.values())
    return fill_by_cost(model.layers, chunks, layer, model.vocab_size * model.hidden_size)


def fill_by_cost(layers: int, chunks: int, layer: int, head: int) -> tuple[int, ...]:
    """Layers of each chunk where one takes layers until its share of the costs is passed, the head's in the last.

    Each ends with the layer that passes its share, as nanotron's build_model has it (src/nanotron/models/base.py).

    >>> fill_by_cost(80, 16, layer=973, head=1074)
    (6, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 3)
    """
    total = layers * layer + head
    ends = [min(layers, chunk * total // (chunks * layer) + 1) for chunk in range(1, chunks)]
    return tuple(b - a for a, b in pairwise((0, *ends, layers)))


def split_layers(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk in the model's order, as trainers split them.

    Evenly where that goes. With two layers too few the first and the last chunk hold one less, beside embedding
    and head (arXiv 2401.10241, table 3; arXiv 2407.21783, section 3.3.2). Otherwise the chunk boundaries are the
    even ones rounded.

    >>> split_layers(22, 8)
    (2, 3, 3, 3, 3, 3, 3, 2)
    """
    if chunks > 1 and layers % chunks and (layers + 2) % chunks == 0:
        each = (layers + 2) // chunks
        return (each - 1, *[each] * (chunks - 2), each - 1)
    bounds = [(i * layers + chunks // 2) // chunks for i in range(chunks + 1)]
    bounds[0], bounds[-1] = 0, layers
    return tuple(b - a for a, b in pairwise(bounds))
