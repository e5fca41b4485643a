"""The verb `megatron`: a Megatron-LM command line, planned and trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli_data import data_document_length, data_options, packed_options
from cli_parts import Devices, MemoryLimit, Target, command_line, print_json, print_report
from cli_precision import loss_scaling
from cli_training import launch_and_report

if TYPE_CHECKING:
    from planner.megatron_order import MegatronOrder, RunWishes
    from planner.plan import Plan
    from profiles.input_error import InputError
    from runtime.data.data_options import DataOptions
    from runtime.learning_rate import RateSchedule
    from runtime.trainer import TrainOptions
    from runtime.watching import Watching

# Option of `train` -> the flag that says the same on a command line of Megatron-LM's.
_THEIR_NAMES = {
    "--data": "--data-path",
    "--tokenizer": "--tokenizer-model",
    "--run-dir": "--save",
    "--resume": "--load",
}
_OURS = re.compile(f"(?:{'|'.join(_THEIR_NAMES)})(?![a-z-])")


def megatron(
    context: typer.Context,
    cluster: Annotated[str, typer.Option("--cluster", help="As of `plan`; local is measured if it was not.")] = "local",
    devices: Devices = None,
    memory_limit: MemoryLimit = None,
    target: Target = "meshwright",
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Plan, and train nothing.")] = False,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Train as this plan says, which --plan-only -o has written.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan here, as YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan-only: print the plan as JSON.")] = False,
) -> None:
    """Take a Megatron-LM command as it stands: its flags are pins, and what they leave open the planner chooses."""
    from planner.megatron_order import read_command
    from runtime.slurm import joins

    order = read_command(context.args, _vocabulary_of)
    if not plan_only:
        _check_training(order, joined=joins(), plan_file=plan_file, target=target, as_json=as_json)
        if plan_file is None:
            _check_early(order.run)
    if plan_file is not None:
        _say(order.remarks)
        plan = _plan_of(plan_file, order)
    else:
        plan = _make_plan(order, cluster, devices, memory_limit, target, output, as_json)
    if not plan_only:
        with _by_their_names():
            launch_and_report(plan, _options(order, plan))


@contextmanager
def _by_their_names() -> Iterator[None]:
    """An InputError that names options of `train` names the flags that were typed; a command of ours stays as it is."""
    from profiles.input_error import InputError

    try:
        yield
    except InputError as error:
        error.where = _OURS.sub(lambda ours: _THEIR_NAMES[ours[0]], error.where)
        if "cli.py" not in error.hint:
            error.hint = _OURS.sub(lambda ours: _THEIR_NAMES[ours[0]], error.hint)
        raise


def _make_plan(
    order: MegatronOrder,
    cluster: str,
    devices: int | None,
    memory_limit: str | None,
    target: str,
    output: Path | None,
    as_json: bool,
) -> Plan:
    from planner.planning import make
    from planner.question import ask
    from profiles.catalogue import LOCAL, local_cluster_path, resolve_cluster

    if cluster == LOCAL and not local_cluster_path().exists():
        from profiles.probes.session import measure

        measure(None, "quick", None, command_line())
    pins, remarks = order.pins(devices or resolve_cluster(cluster).devices)
    _say((*order.remarks, *remarks, f"taken from the flags: {', '.join(pins) or 'no part of the layout'}"))
    question = ask(
        order.model,
        cluster,
        order.global_batch,
        order.sequence,
        devices=devices,
        precision=order.precision,
        memory_limit=memory_limit,
        target=target,
        pins=pins,
        document_length=_document_length(order, target),
    )
    answer = make(question, output=output)
    print_json(answer.document) if as_json else print_report(answer.report())
    assert answer.plan is not None
    return answer.plan


def _document_length(order: MegatronOrder, target: str) -> float | None:
    """What prices attention within documents: the data's own lengths, if it lies here. Of other trainers it is priced
    as they do it: in full, since they mask what they computed."""
    from profiles.input_error import InputError

    if not order.run.packing.reset_attention or target != "meshwright":
        return None
    try:
        return data_document_length(list(order.run.paths), order.sequence)
    except InputError as error:
        _say((f"attention is priced in full, as if no document ended: {error.what}",))
        return None


def _say(remarks: tuple[str, ...]) -> None:
    from runtime import slurm

    for remark in remarks if slurm.is_first() else ():
        print_report(remark, error=True)


def _check_training(order: MegatronOrder, *, joined: bool, plan_file: Path | None, target: str, as_json: bool) -> None:
    order.run.require_trainable()
    if as_json:
        raise _wrong("--json goes with --plan-only", "--json", "--plan-only beside it")
    if target != "meshwright":
        raise _wrong("another trainer's plan is not trained here", "--target", "--plan-only beside it")
    if joined and (plan_file is None or order.run.save is None):
        raise _wrong(
            "under torchrun and srun all ranks must be told the same plan and folder",
            "megatron",
            "--plan PLAN.YAML, which --plan-only -o PLAN.YAML has written, and --save FOLDER",
        )


def _check_early(run: RunWishes) -> None:
    """What would be found wrong only after planning."""
    from runtime.early_checks import check_early

    folder = Path(run.save) if run.save is not None and run.load is None else None
    with _by_their_names():
        check_early(
            folder, _data_of(run), _watching_of(run), _schedule_of(run), steps=run.steps or 0, warmup=run.warmup_steps
        )


def _data_of(run: RunWishes) -> DataOptions:
    return data_options(list(run.paths), run.split, run.tokenizer, Path(run.cache) if run.cache else None)


def _watching_of(run: RunWishes) -> Watching:
    from runtime.watching import Watching

    return Watching(log_every=run.log_every, wandb=run.wandb, profile_steps=run.profile_steps)


def _schedule_of(run: RunWishes) -> RateSchedule:
    from runtime.learning_rate import RateSchedule

    return RateSchedule(
        shape=run.shape, decay_steps=run.decay_steps, cooldown=run.cooldown, cooldown_steps=run.cooldown_steps
    )


def _wrong(what: str, where: str, expected: str) -> InputError:
    from profiles.input_error import InputError

    return InputError(what, where=where, expected=expected, got="not both" if " and " in expected else "none")


def _plan_of(plan_file: Path, order: MegatronOrder) -> Plan:
    """The plan in the file; an InputError where it is of another model or batch than the flags."""
    from planner.plan import load
    from profiles.input_error import InputError

    plan = load(plan_file)
    same: tuple[tuple[str, Any, Any], ...] = (
        ("model", plan.model, order.model),
        ("global batch", plan.job.global_batch, order.global_batch),
        ("sequence", plan.job.sequence, order.sequence),
        ("precision", plan.job.precision, order.precision),
    )
    for what, planned, flags in same:
        if planned != flags:
            raise InputError(
                f"the plan is for another {what} than the flags",
                where=f"{plan_file}",
                expected=getattr(flags, "name", str(flags)),
                got=getattr(planned, "name", str(planned)),
                hint="plan again with --plan-only -o, and these flags",
            )
    return plan


def _options(order: MegatronOrder, plan: Plan) -> TrainOptions:
    from profiles.catalogue import resolve_hardware_path
    from profiles.hardware import load_hardware
    from runtime.checkpoint_folder import complete_steps
    from runtime.experts import Balance
    from runtime.optimizer import Adam
    from runtime.run_folder import default_run_dir
    from runtime.trainer import TrainOptions

    run = order.run
    assert run.steps is not None
    assert run.learning_rate is not None
    folder = Path(run.save) if run.save is not None else default_run_dir()
    hardware = load_hardware(resolve_hardware_path(plan.cluster.hardware))
    return TrainOptions(
        run_dir=folder,
        steps=run.steps,
        learning_rate=run.learning_rate,
        min_learning_rate=run.min_learning_rate,
        warmup_steps=run.warmup_steps,
        schedule=_schedule_of(run),
        weight_decay=run.weight_decay,
        adam=Adam(betas=run.betas, epsilon=run.epsilon),
        clip_norm=run.clip_norm,
        scaling=loss_scaling(
            run.loss_scale, run.initial_loss_scale, run.min_loss_scale, run.loss_scale_window, run.hysteresis
        ),
        seed=run.seed,
        data=packed_options(
            _data_of(run),
            plan,
            run.packing.reset_positions,
            run.packing.reset_attention,
            run.packing.mask_loss,
            run.packing.eod,
        ),
        validation_every=run.validation_every,
        validation_batches=run.validation_batches,
        checkpoint_every=run.checkpoint_every,
        async_checkpoint=run.async_checkpoint,
        time_limit_seconds=run.time_limit_seconds,
        settings=_settings(run),
        # As with Megatron-LM, the first start of a command finds nothing to load yet.
        resume=run.load is not None and bool(complete_steps(folder)),
        timeout_seconds=run.timeout_seconds,
        peak_flops_per_second=hardware.peak_flops_per_second[plan.job.precision],
        balance=Balance(run.balance_loss, run.bias_rate),
        watching=_watching_of(run),
    )


def _settings(run: RunWishes) -> dict[str, Any]:
    """The run's options by their names in `train`, which `train --resume` takes for its defaults."""
    return {
        "steps": run.steps,
        "learning_rate": run.learning_rate,
        "min_learning_rate": run.min_learning_rate,
        "warmup": run.warmup_steps,
        "lr_schedule": run.shape,
        "cooldown": run.cooldown_steps,
        "weight_decay": run.weight_decay,
        "betas": ",".join(map(str, run.betas)),
        "clip": run.clip_norm or 0.0,
        "loss_scale": run.loss_scale,
        "initial_loss_scale": run.initial_loss_scale,
        "min_loss_scale": run.min_loss_scale,
        "loss_scale_window": run.loss_scale_window,
        "hysteresis": run.hysteresis,
        "seed": run.seed,
        "data": list(run.paths) or None,
        "split": run.split,
        "tokenizer": run.tokenizer,
        "data_cache": run.cache,
        "reset_positions": run.packing.reset_positions,
        "reset_attention": run.packing.reset_attention,
        "eod_mask_loss": run.packing.mask_loss,
        "eod": run.packing.eod,
        "validation_every": run.validation_every,
        "checkpoint_every": run.checkpoint_every,
        "async_checkpoint": run.async_checkpoint,
        "log_every": run.log_every,
        "balance_loss": run.balance_loss,
        "bias_rate": run.bias_rate,
    }


def _vocabulary_of(tokenizer: str) -> int:
    from runtime.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer).vocabulary
