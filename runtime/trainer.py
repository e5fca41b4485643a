"""Train as a plan says: a loop on each rank that reads from top to bottom."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.plan import Plan
from planner.record import RECORD_FILE
from planner.record import SCHEMA as RECORD_SCHEMA
from profiles.store import dump_yaml, write_atomically

from . import checkpoint, flight_recorder, not_finite
from .checkpoint_folder import StateText, latest
from .checkpoint_writer import CheckpointWriter, Written
from .compilation import choose_compilation
from .context_parallel import inputs_and_targets
from .data.data_options import DataOptions
from .data.kept_order import check_order, keep_order
from .data.open_tokens import open_tokens
from .data.token_source import TokenSource, own_rows
from .disk import full_disk_ends_run
from .experts import Balance
from .learning_rate import COSINE, RateSchedule, learning_rate_at
from .leaving import Leaving
from .measure import WATCH_EVERY, StepMeter, busiest
from .metrics import only_finite, peak_memory_bytes
from .optimizer import GPT3_ADAM, Adam
from .process_group import process_group, set_timeout
from .run_folder import LOGS_FOLDER
from .spike_guard import SpikeGuard
from .step import StepResult, TrainState, build_state, sum_over_ranks, training_step
from .stragglers import stragglers
from .trace_window import TraceWindow
from .watching import PLAIN, RunWriter, Watching
from .whereabouts import Whereabouts

Record = dict[str, Any]
# Compilation happens in the first step, pipeline stage after pipeline stage, while the others wait in a collective.
# An allowance for each, not a measurement.
COMPILE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train, beside what the plan says.

    `steps` counts from the first step of the run, also after a resume. `validation_every` and `checkpoint_every` are in
    steps, `checkpoint_minutes` besides in minutes, 0 for only at the end. Of whole checkpoints the `keep_checkpoints`
    newest stay, 0 for all; `async_checkpoint` writes them while training goes on. `time_limit_seconds`, from the ranks'
    start, is when the run leaves with a checkpoint. `settings` are what a resume goes on from, as plain values (see
    RunState). The learning rate warms up to `learning_rate`, and `schedule` says how it falls to `min_learning_rate`.
    The run fails after `skip_limit` steps in a row without an update ([Note: Steps that are not finite]), and when a
    collective takes more than `timeout_seconds`. `peak_flops_per_second` of one device is what mfu divides by; without
    it mfu is null. `compile` None is yes on CUDA where no rule forbids it. `weights` is a Hugging Face folder to start
    from; None draws first values from `seed`.
    """

    run_dir: Path
    steps: int = 100
    learning_rate: float = 3e-3
    min_learning_rate: float = 3e-4
    warmup_steps: int = 10
    schedule: RateSchedule = COSINE
    weight_decay: float = 0.1
    adam: Adam = GPT3_ADAM
    clip_norm: float | None = 1.0
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    validation_every: int = 0
    validation_batches: int = 4
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 0
    async_checkpoint: bool = False
    time_limit_seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    skip_limit: int = 3
    timeout_seconds: float = 120.0
    dtype: torch.dtype = torch.float32
    peak_flops_per_second: float | None = None
    compile: bool | None = None
    balance: Balance | None = None
    weights: Path | None = None
    watching: Watching = PLAIN


def run(plan: Plan, options: TrainOptions, on_progress: Callable[[Record], None] | None = None) -> str | None:
    """This rank's part of a run, in a process that a launcher has started; the run folder is prepared.

    Rank 0 writes metrics.jsonl, TensorBoard events and record.yaml, and calls `on_progress` with the record
    of each step. Returns why the run left before its last step, without a record.yaml; None where it did not.

    [Note: Steps that are not finite]
    Where loss or gradient norm of a step is NaN or infinite, on whichever rank it began, no rank changes its weights
    or moments; all know, since they have the same sums. The step counts, its samples are not seen again, its record
    says `skipped`. No checkpoint is written while steps are not finite, since it may be the weights that are spoilt,
    but where a validation loss says that they are not. After `skip_limit` of them in a row, or at the end, the run
    fails. A step whose norm is finite and above the spike guard's limit is left out alike, and is no reason against a
    checkpoint.
    """
    layout, job = plan.layout, plan.job
    compilation, said = choose_compilation(plan, options.compile, "cuda" if torch.cuda.is_available() else "cpu")
    patience = options.timeout_seconds + (layout.pp * COMPILE_SECONDS if compilation is not None else 0.0)
    logs = options.run_dir / LOGS_FOLDER
    flight_recorder.turn_on(logs)
    with process_group(layout.world_size, patience) as device, ExitStack() as stack:
        stack.enter_context(full_disk_ends_run(options.run_dir, layout))
        here = stack.enter_context(Whereabouts(logs, dist.get_rank()))
        tokens = open_data(plan, options)
        state = build_state(
            plan,
            device,
            dtype=options.dtype,
            seed=options.seed,
            weight_decay=options.weight_decay,
            compilation=compilation,
            balance=options.balance,
            weights=None if options.resume else options.weights,
            adam=options.adam,
        )
        folder = latest(options.run_dir) if options.resume else None
        done = checkpoint.load(folder, state.chunks, state.optimizer) if folder is not None else 0
        window = TraceWindow(options.watching.profile_steps, options.run_dir, state.runner.clock, layout)
        meter = StepMeter(
            state.mesh,
            state.runner.clock,
            layout.pp,
            options.steps - done,
            watch_every=WATCH_EVERY if compilation is None else 0,
            unwatched=range(window.steps.start - done, window.steps.stop - done),
        )
        guard = SpikeGuard(options.watching.spike_guard)
        writer = stack.enter_context(_writer(plan, options)) if dist.get_rank() == 0 else None
        if writer is not None and not options.resume:
            keep_order(options.run_dir, tokens.order)
        checkpoints = CheckpointWriter(
            options.run_dir,
            state.chunks,
            state.optimizer,
            StateText(plan, options.settings),
            keep=options.keep_checkpoints,
            asynchronous=options.async_checkpoint,
        )
        leaving = Leaving(logs, dist.get_rank(), options.time_limit_seconds)
        leaving.obey_sigterm()
        record: Record = {}
        skipped, spiked, in_a_row, due, last_due = 0, 0, 0, False, time.monotonic()

        for step in range(done + 1, options.steps + 1):
            here.note(step, "data")
            step_start = time.perf_counter()
            batch = tokens.batch(step, job.global_batch, own_rows(job.global_batch, layout, state.mesh.coordinate.dp))
            learning_rate = learning_rate_at(
                step,
                steps=options.steps,
                warmup_steps=options.warmup_steps,
                peak=options.learning_rate,
                minimum=options.min_learning_rate,
                schedule=options.schedule,
            )
            window.before(step, options.steps)
            samples = _own_tensors(batch, plan, state)
            here.note(step, "forward, backward and update")
            result = training_step(
                state,
                *samples,
                learning_rate=learning_rate,
                clip_norm=options.clip_norm,
                norm_limit=guard.limit,
                watch=meter.watch(step - done),
                wishes=(
                    _minutes_are_over(options.checkpoint_minutes, last_due),
                    leaving.wish(checkpoints.longest_seconds),
                ),
            )
            step_seconds = time.perf_counter() - step_start
            if step == done + 1 and compilation is not None:
                set_timeout(state.mesh.all_groups(), options.timeout_seconds)
            window.after(step)
            meter.end_step(
                step - done,
                step_seconds=step_seconds,
                optimizer=result.optimizer_seconds,
                synchronise=result.synchronise_seconds,
            )

            in_a_row = 0 if result.updated else in_a_row + 1
            skipped += not result.updated
            spiked += result.finite and not result.updated
            if result.updated:
                guard.note(result.grad_norm)

            record = _step_record(plan, options, step, result, learning_rate, step_seconds, device)
            record |= checkpoints.news()
            if tokens.has_validation and _due(step, options.validation_every, options.steps):
                here.note(step, "validation")
                record["validation_loss"] = _validate(plan, options, tokens, state)
            sound = result.finite or math.isfinite(record.get("validation_loss", math.nan))
            record = only_finite(record)
            if writer is not None:
                here.note(step, "metrics")
                writer.write(record)
                if on_progress is not None:
                    on_progress(record)
            if in_a_row == options.skip_limit and result.finite:
                raise guard.failure(result.grad_norm, options.run_dir, step=step, in_a_row=in_a_row)
            if in_a_row == options.skip_limit or (step == options.steps and not sound):
                raise not_finite.failure(state, *samples, result, layout, options.run_dir, step=step, in_a_row=in_a_row)
            minutes_over, left = result.wishes
            due = due or _due(step, options.checkpoint_every, options.steps) or minutes_over or left
            if due and sound:
                here.note(step, "checkpoint")
                checkpoints.write(step)
                due, last_due = False, time.monotonic()
            else:
                checkpoints.poll()
            leaving.note_step(time.perf_counter() - step_start)
            if left and sound and step < options.steps:
                checkpoints.finish()
                return leaving.why

        checkpoints.finish()
        ranks = _gather_measurements(meter, device, kernels_seen=compilation is None)
        if writer is not None:
            _write_record(plan, options, record, ranks, tokens, (skipped, spiked), said, checkpoints.written)
    return None


def _writer(plan: Plan, options: TrainOptions) -> RunWriter:
    settings = {
        "steps": options.steps,
        "global_batch": plan.job.global_batch,
        "sequence": plan.job.sequence,
        "precision": plan.job.precision,
        "learning_rate": options.learning_rate,
        "schedule": options.schedule.shape,
        "seed": options.seed,
    }
    return RunWriter(
        plan, options.run_dir, options.watching, steps=options.steps, resume=options.resume, settings=settings
    )


def open_data(plan: Plan, options: TrainOptions) -> TokenSource:
    """What the run reads; raises InputError where it cannot, or a resumed run would not go on where it was."""
    tokens = open_tokens(
        options.data,
        plan,
        steps=options.steps,
        validation_batches=options.validation_batches,
        seed=options.seed,
    )
    if options.resume:
        check_order(options.run_dir, tokens.order)
    return tokens


def _minutes_are_over(minutes: float, since: float) -> bool:
    """On rank 0, whose clock counts, whether so many minutes have gone by; 0 is never."""
    return dist.get_rank() == 0 and 0 < minutes * 60 <= time.monotonic() - since


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _own_tensors(ids: Any, plan: Plan, state: TrainState) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [samples, sequence / cp] of this cp rank, of ids [samples, sequence + 1]; or an example's."""
    if isinstance(ids, tuple):
        return ids[0].to(state.device), ids[1].to(state.device)
    inputs, targets = inputs_and_targets(torch.from_numpy(ids), plan.layout, state.mesh.coordinate.cp)
    return inputs.to(state.device), targets.to(state.device)


def _validate(plan: Plan, options: TrainOptions, tokens: TokenSource, state: TrainState) -> float:
    """Mean cross-entropy in nats on held-out samples, the same ones each time. Every rank must call it."""
    samples = plan.job.global_batch
    rows = own_rows(samples, plan.layout, state.mesh.coordinate.dp)
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    for index in range(options.validation_batches):
        total += state.runner.evaluate(*_own_tensors(tokens.validation_batch(index, samples, rows), plan, state))
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
        "skipped": not result.updated,
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
        "kernel_seconds": meter.kernel_seconds() if kernels_seen else [],
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    ranks: list[Record] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return [{"rank": rank, **measured} for rank, measured in enumerate(ranks)]


def _write_record(
    plan: Plan,
    options: TrainOptions,
    last: Record,
    ranks: list[Record],
    tokens: TokenSource,
    skipped: tuple[int, int],
    compiled: str,
    written: Sequence[Written],
) -> None:
    """record.yaml: predicted beside measured. The measured parts are those of the rank with the most compute.

    `skipped` are all steps without an update, and those among them that were left out for their norm.
    """
    busy = ranks[busiest([rank["parts"] for rank in ranks])]
    slow = stragglers([rank.pop("kernel_seconds") for rank in ranks], plan.layout)
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
            "stragglers": slow,
        },
        "host": platform.node(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "compile": compiled,
        "steps": options.steps,
        "skipped_steps": skipped[0],
        "spiked_steps": skipped[1],
        "checkpoints": {
            "written": len(written),
            "bytes": written[-1].size_bytes,
            "median_seconds": statistics.median(found.seconds for found in written),
            "median_stall_seconds": statistics.median(found.stall_seconds for found in written),
        },
        "train_loss": last["loss"],
        **({"validation_loss": last["validation_loss"]} if tokens.has_validation else {}),
        "bigram_loss": tokens.baseline_loss(),
        "token_unit": tokens.unit,
        "data": tokens.name,
    }
    write_atomically(options.run_dir / RECORD_FILE, dump_yaml(document))
