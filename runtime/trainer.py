"""Train as a plan says: a loop on each rank that reads from top to bottom."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.plan import Plan
from planner.record import RECORD_FILE
from planner.record import SCHEMA as RECORD_SCHEMA
from profiles.input_error import InputError
from profiles.store import dump_yaml, write_atomically

from . import checkpoint, flight_recorder, not_finite
from .compilation import choose_compilation
from .context_parallel import inputs_and_targets
from .data import VOCABULARY, Corpus, bigram_loss, global_batch, load_corpus, own_samples, validation_batch
from .disk import full_disk_ends_run
from .experts import Balance
from .measure import StepMeter, busiest
from .metrics import MetricsWriter, only_finite, peak_memory_bytes
from .optimizer import learning_rate_at
from .process_group import process_group, set_timeout
from .run_folder import LOGS_FOLDER
from .step import StepResult, TrainState, build_state, sum_over_ranks, training_step
from .whereabouts import Whereabouts

Record = dict[str, Any]
# Compilation happens in the first step, pipeline stage after pipeline stage, while the others wait in a collective.
# An allowance for each, not a measurement.
COMPILE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train, beside what the plan says.

    `steps` counts from the first step of the run, also after a resume. `data` is a text file or folder; None
    is Python's standard library. `validation_every` and `checkpoint_every` are in steps, 0 for only at the
    end. The run fails after `skip_limit` steps in a row whose loss or gradient norm is not finite, and when a
    collective takes more than `timeout_seconds`. `peak_flops_per_second` of one device is what mfu divides by;
    without it mfu is null. `compile` None is yes on CUDA where no rule forbids it.
    """

    run_dir: Path
    steps: int = 100
    learning_rate: float = 3e-3
    min_learning_rate: float = 3e-4
    warmup_steps: int = 10
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    seed: int = 0
    data: Path | None = None
    validation_every: int = 0
    validation_batches: int = 4
    checkpoint_every: int = 0
    resume: bool = False
    skip_limit: int = 3
    timeout_seconds: float = 120.0
    dtype: torch.dtype = torch.float32
    peak_flops_per_second: float | None = None
    compile: bool | None = None
    balance: Balance | None = None


def run(plan: Plan, options: TrainOptions, on_progress: Callable[[Record], None] | None = None) -> None:
    """This rank's part of a run, in a process that a launcher has started; the run folder is prepared.

    Rank 0 writes metrics.jsonl, TensorBoard events and record.yaml, and calls `on_progress` with the record
    of each step.

    [Note: Steps that are not finite]
    Where loss or gradient norm of a step is NaN or infinite, on whichever rank it began, no rank changes its weights
    or moments; all know, since they have the same sums. The step counts, its samples are not seen again, its record
    says `skipped`. No checkpoint is written while steps are skipped, since it may be the weights that are spoilt, but
    where a validation loss says that they are not. After `skip_limit` of them in a row, or at the end, the run fails.
    """
    layout, job = plan.layout, plan.job
    compilation, said = choose_compilation(plan, options.compile, "cuda" if torch.cuda.is_available() else "cpu")
    patience = options.timeout_seconds + (layout.pp * COMPILE_SECONDS if compilation is not None else 0.0)
    logs = options.run_dir / LOGS_FOLDER
    flight_recorder.turn_on(logs)
    with process_group(layout.world_size, patience) as device, ExitStack() as stack:
        stack.enter_context(full_disk_ends_run(options.run_dir, layout))
        here = stack.enter_context(Whereabouts(logs, dist.get_rank()))
        corpus = load_corpus(options.data, job.sequence)
        check_vocabulary(plan)
        state = build_state(
            plan,
            device,
            dtype=options.dtype,
            seed=options.seed,
            weight_decay=options.weight_decay,
            compilation=compilation,
            balance=options.balance,
        )
        folder = checkpoint.latest(options.run_dir) if options.resume else None
        done = checkpoint.load(folder, state.chunks, state.optimizer) if folder is not None else 0
        meter = StepMeter(state.mesh, state.runner.clock, layout.pp, options.steps - done)
        writer = stack.enter_context(MetricsWriter(options.run_dir)) if dist.get_rank() == 0 else None
        record: Record = {}
        skipped, in_a_row, due = 0, 0, False

        for step in range(done + 1, options.steps + 1):
            here.note(step, "data")
            step_start = time.perf_counter()
            batch = global_batch(corpus, seed=options.seed, step=step, samples=job.global_batch, sequence=job.sequence)
            learning_rate = learning_rate_at(
                step,
                steps=options.steps,
                warmup_steps=options.warmup_steps,
                peak=options.learning_rate,
                minimum=options.min_learning_rate,
            )
            samples = _own_tensors(batch, plan, state)
            here.note(step, "forward, backward and update")
            result = training_step(
                state,
                *samples,
                learning_rate=learning_rate,
                clip_norm=options.clip_norm,
                watch=meter.watch(step - done),
            )
            step_seconds = time.perf_counter() - step_start
            if step == done + 1 and compilation is not None:
                set_timeout(state.mesh.all_groups(), options.timeout_seconds)
            meter.end_step(
                step - done,
                step_seconds=step_seconds,
                optimizer=result.optimizer_seconds,
                synchronise=result.synchronise_seconds,
            )

            in_a_row = 0 if result.finite else in_a_row + 1
            skipped += not result.finite

            record = _step_record(plan, options, step, result, learning_rate, step_seconds, device)
            if _due(step, options.validation_every, options.steps):
                here.note(step, "validation")
                record["validation_loss"] = _validate(plan, options, corpus, state)
            sound = result.finite or math.isfinite(record.get("validation_loss", math.nan))
            record = only_finite(record)
            if writer is not None:
                here.note(step, "metrics")
                writer.write(record)
                if on_progress is not None:
                    on_progress(record)
            if in_a_row == options.skip_limit or (step == options.steps and not sound):
                raise not_finite.failure(state, *samples, result, layout, options.run_dir, step=step, in_a_row=in_a_row)
            due = due or _due(step, options.checkpoint_every, options.steps)
            if due and sound:
                here.note(step, "checkpoint")
                checkpoint.save(options.run_dir, step, state.chunks, state.optimizer)
                due = False

        ranks = _gather_measurements(meter, device, kernels_seen=compilation is None)
        if writer is not None:
            _write_record(plan, options, record, ranks, corpus, skipped, said)


def check_vocabulary(plan: Plan) -> None:
    """Raise InputError where the model has fewer tokens than there are bytes."""
    if plan.model.vocab_size < VOCABULARY:
        raise InputError(
            f"{plan.model.name} cannot read bytes",
            where="plan: model.vocab_size",
            expected=f"at least {VOCABULARY}, since every byte of the text is a token",
            got=str(plan.model.vocab_size),
        )


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _own_tensors(batch: Any, plan: Plan, state: TrainState) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [microbatches · micro_batch, sequence / cp] of this dp and cp rank."""
    here = state.mesh.coordinate
    ids = torch.from_numpy(own_samples(batch, plan.layout, here.dp))
    inputs, targets = inputs_and_targets(ids, plan.layout, here.cp)
    return inputs.to(state.device), targets.to(state.device)


def _validate(plan: Plan, options: TrainOptions, corpus: Corpus, state: TrainState) -> float:
    """Mean cross-entropy in nats on held-out samples, the same ones each time. Every rank must call it."""
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    for index in range(options.validation_batches):
        batch = validation_batch(
            corpus,
            seed=options.seed,
            index=index,
            samples=plan.job.global_batch,
            sequence=plan.job.sequence,
        )
        total += state.runner.evaluate(*_own_tensors(batch, plan, state))
    return sum_over_ranks(total / options.validation_batches)


def _step_record(
    plan: Plan,
    options: TrainOptions,
    step: int,
    result: StepResult,
    learning_rate: float,
    step_seconds: float,
    device: torch.device,
) -> Record:
    flops = plan.model.step_flops(plan.job.global_batch, plan.job.sequence)
    flops_per_second = flops / step_seconds / plan.layout.world_size
    peak = options.peak_flops_per_second
    return {
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "skipped": not result.finite,
        "lr": learning_rate,
        "step_seconds": step_seconds,
        "tokens_per_second": plan.job.tokens / step_seconds,
        "model_tflops_per_device": flops_per_second / 1e12,
        "mfu": flops_per_second / peak if peak is not None else None,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _gather_measurements(meter: StepMeter, device: torch.device, *, kernels_seen: bool) -> list[Record]:
    """Every rank's parts of one and the same step: rank 0's median one. Every rank must call it.

    Of compiled kernels torch's dispatcher, by which they would be timed, sees none.
    """
    chosen = [meter.median_step()]
    dist.broadcast_object_list(chosen, src=0)
    own = {
        "step_seconds": meter.seconds(chosen[0]),
        "parts": meter.table(chosen[0]),
        "kernels": meter.kernels() if kernels_seen else {},
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    ranks: list[Record] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return [{"rank": rank, **measured} for rank, measured in enumerate(ranks)]


def _write_record(
    plan: Plan, options: TrainOptions, last: Record, ranks: list[Record], corpus: Corpus, skipped: int, compiled: str
) -> None:
    """record.yaml: predicted beside measured. The measured parts are those of the rank with the most compute."""
    busy = ranks[busiest([rank["parts"] for rank in ranks])]
    document = {
        "schema": RECORD_SCHEMA,
        "predicted": {
            "step_seconds": plan.prediction.step_seconds,
            "breakdown_seconds": dict(plan.prediction.breakdown_seconds),
            "peak_memory_bytes": plan.prediction.peak_memory_bytes,
        },
        "measured": {
            "step_seconds": busy["step_seconds"],
            "parts": dict(busy["parts"]),
            "kernels": dict(busy["kernels"]),
            "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
            "rank": busy["rank"],
            "per_rank": ranks,
        },
        "host": platform.node(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "compile": compiled,
        "steps": options.steps,
        "skipped_steps": skipped,
        "train_loss": last["loss"],
        "validation_loss": last["validation_loss"],
        "bigram_loss": bigram_loss(corpus),
        "data": corpus.source,
    }
    write_atomically(options.run_dir / RECORD_FILE, dump_yaml(document))
