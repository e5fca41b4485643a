"""What a Megatron-LM command asks for: model, batch and pins for the planner, and how to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.input_error import InputError
from profiles.model import ModelSpec

from .megatron_command import Given, parse_command
from .megatron_model import model_of
from .megatron_packing import PackingWishes, packing_wishes

_OF_FP16 = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
_SIMPLE_PINS = ("tp", "pp", "cp", "cp_style", "ep", "etp", "micro_batch")


@dataclass(frozen=True)
class RunWishes:
    """How to train, with Megatron-LM's defaults; `steps` and `learning_rate` None where they are left out.

    Steps, where Megatron-LM also takes samples; seconds, where it takes minutes. `profile_steps` are the first and the
    last step of a trace.
    """

    steps: int | None
    learning_rate: float | None
    min_learning_rate: float
    shape: str
    warmup_steps: int
    decay_steps: int | None
    cooldown: str
    cooldown_steps: int | None
    weight_decay: float
    clip_norm: float | None
    betas: tuple[float, float]
    epsilon: float
    loss_scale: float | None
    initial_loss_scale: float
    min_loss_scale: float
    loss_scale_window: int
    hysteresis: int
    seed: int
    balance_loss: float
    bias_rate: float
    paths: tuple[str, ...]
    split: str | None
    tokenizer: str | None
    cache: str | None
    save: str | None
    load: str | None
    checkpoint_every: int
    async_checkpoint: bool
    time_limit_seconds: float | None
    validation_every: int
    validation_batches: int
    log_every: int
    timeout_seconds: float
    wandb: str | None
    profile_steps: tuple[int, int] | None
    packing: PackingWishes

    def require_trainable(self) -> None:
        """Raise InputError for what a plan does without and a run does not."""
        for flag, value in (("--train-iters", self.steps), ("--lr", self.learning_rate)):
            if value is None:
                raise InputError(
                    f"{flag} is missing", where=flag, expected=f"{flag} among the flags", got="none", hint="--plan-only"
                )
        if self.learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise InputError(
                "the least learning rate is above the peak",
                where="--min-lr",
                expected=f"at most --lr {self.learning_rate:g}",
                got=f"{self.min_learning_rate:g}",
            )


@dataclass(frozen=True)
class MegatronOrder:
    """A command as the planner and the runtime understand it; `remarks` are what a person should read."""

    model: ModelSpec
    global_batch: int
    sequence: int
    precision: str
    run: RunWishes
    remarks: tuple[str, ...]
    given: Given

    def pins(self, devices: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(pins as `--pin` takes them, remarks) on so many devices. What is not pinned the planner chooses."""
        return _pins(self.given, devices)


def read_command(words: Sequence[str], vocabulary_of: Callable[[str], int]) -> MegatronOrder:
    """The order of a command line.

    Raises:
        InputError: a flag that is unknown, missing, cannot be had, or contradicts another.
    """
    given = parse_command(words)
    given.exclusive("bf16", "fp16")
    batch = given.required("global_batch", "--global-batch-size")
    sequence = given.required("sequence", "--seq-length")
    model = model_of(given, vocabulary_of)
    if sequence > model.max_positions:
        raise given.fail(
            "sequence", "sequences are longer than positions reach", f"at most {model.max_positions} tokens"
        )
    run = _run(given, batch, packing_wishes(given, model.positions))
    precision = "bf16" if "bf16" in given else "fp16" if "fp16" in given else "fp32"
    return MegatronOrder(model, batch, sequence, precision, run, tuple(given.remarks), given)


# ---- the layout ------------------------------------------------------------------------------------------------


def _pins(given: Given, devices: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    pins: dict[str, Any] = {key: given.get(key) for key in _SIMPLE_PINS if key in given}
    remarks: list[str] = []
    if pins.get("cp", 1) == 1:
        pins.pop("cp_style", None)
    if "sequence_parallel" in given:
        if pins.get("tp", 1) > 1:
            pins["sequence_parallel"] = "true"
        else:
            left = "tp is 1" if "tp" in pins else "tp is left to the planner, and so is it"
            remarks.append(f"--sequence-parallel ignored: {left}")
    pins |= _chunks(given) | _sharding(given, pins, devices, remarks) | _recompute(given, remarks)
    return tuple(f"{key}={value}" for key, value in pins.items()), tuple(remarks)


def _chunks(given: Given) -> dict[str, Any]:
    """Chunks a rank, of the layers in each."""
    given.exclusive("chunk_layers", "virtual_stages")
    chunks = given.get("virtual_stages")
    if "chunk_layers" in given:
        pp, layers, each = given.get("pp", 1), given.get("layers"), given.get("chunk_layers")
        if each < 1 or layers % (pp * each):
            raise given.fail(
                "chunk_layers", "the layers do not part into chunks", f"a divisor of {layers} layers / pp={pp}"
            )
        chunks = layers // (pp * each)
    if chunks is None:
        return {}
    key = "chunk_layers" if "chunk_layers" in given else "virtual_stages"
    if given.get("pp", 1) == 1:
        raise given.fail(key, "chunks are of a pipeline", "--pipeline-model-parallel-size above 1")
    return {"virtual_stages": chunks, "schedule": "interleaved-1f1b"} if chunks > 1 else {"virtual_stages": 1}


def _sharding(given: Given, pins: dict[str, Any], devices: int, remarks: list[str]) -> dict[str, Any]:
    """zero, and dp_shard where the optimizer has several copies."""
    given.exclusive("zero", "torch_fsdp")
    given.exclusive("torch_fsdp", "megatron_fsdp")
    zero = given.get("zero")
    if "torch_fsdp" in given:
        zero = 2 if "keep_gathered" in given else 3
    if "megatron_fsdp" in given:
        zero = given.get("sharding", 0)
    elif "sharding" in given:
        raise given.fail("sharding", "the strategy is of Megatron's FSDP", "--use-megatron-fsdp beside it")
    if not zero:
        return {} if zero is None else {"zero": 0}
    degrees = pins.get("tp", 1) * pins.get("pp", 1) * pins.get("cp", 1)
    if degrees == devices:
        remarks.append(f"zero={zero} ignored: dp is 1, and nothing to shard over")
        return {"zero": 0}
    replicas = given.get("replicas", 1)
    if replicas == 1:
        return {"zero": zero}
    if not {"tp", "pp", "cp"} <= set(pins) or devices % (degrees * replicas):
        raise given.fail(
            "replicas", "copies of the optimizer are counted in dp", "tp, pp and cp given, and dp a multiple"
        )
    return {"zero": zero, "dp_shard": devices // degrees // replicas}


def _recompute(given: Given, remarks: list[str]) -> dict[str, Any]:
    mode, method, layers = given.get("recompute"), given.get("recompute_method"), given.get("recompute_layers")
    if mode is None:
        if method is not None:
            raise given.fail("recompute_method", "nothing is recomputed", "--recompute-granularity full beside it")
        return {}
    if mode == "selective" and method is not None:
        raise given.fail("recompute_method", "a method is of full recomputation", "--recompute-granularity full")
    if method == "block":
        remarks.append(
            f"--recompute-num-layers {layers} ignored: the planner says how many layers of a stage recompute"
        )
        return {"recompute": "none|full"}
    if method == "uniform" and (layers or 1) > 1:
        remarks.append(f"--recompute-num-layers {layers} ignored: each layer keeps its own input")
    return {"recompute": mode}


# ---- the run ---------------------------------------------------------------------------------------------------


def _run(given: Given, batch: int, packing: PackingWishes) -> RunWishes:
    steps = _steps(given, "steps", "train_samples", batch)
    decay = _steps(given, "decay_steps", "decay_samples", batch)
    cooldown = _steps(given, "cooldown_steps", "cooldown_samples", batch)
    shape = given.get("shape", "linear")
    if shape == "wsd" and cooldown is None:
        raise given.fail("shape", "WSD needs the length of its decay", "--lr-wsd-decay-iters beside it")
    if given.get("warmup_from", 0.0) != 0.0:
        raise given.fail("warmup_from", "the warm-up begins near zero here", "--lr-warmup-init 0")
    if given.get("validation_batches") == 0:
        given.remarks.append("--eval-iters 0: validation happens all the same, once at the end")
    for key in ("beta1", "beta2"):
        if given.get(key, 0.0) >= 1.0:
            raise given.fail(key, "a beta is a share", "a number below 1")
    for flag in [] if "fp16" in given else [given.flags[key] for key in _OF_FP16 if key in given]:
        given.remarks.append(f"{flag} ignored: it is of fp16, and other precisions have no loss scale")
    tokenizer = given.get("tokenizer") if given.get("tokenizer_type") in (None, "HuggingFaceTokenizer") else None
    if "paths" not in given:
        given.remarks.append("no --data-path: trained on the text of Python's library, as bytes")
    given.exclusive("paths", "mock_data")
    off = given.get("validation_batches") == 0
    return RunWishes(
        steps=steps,
        learning_rate=given.get("learning_rate"),
        min_learning_rate=given.get("min_learning_rate", 0.0),
        shape=shape,
        warmup_steps=_warmup(given, batch, decay or steps or 0),
        decay_steps=decay,
        cooldown=given.get("cooldown", "exponential"),
        cooldown_steps=cooldown if shape == "wsd" else None,
        weight_decay=given.get("weight_decay", 0.01),
        clip_norm=given.get("clip_norm", 1.0) or None,
        betas=(given.get("beta1", 0.9), given.get("beta2", 0.999)),
        epsilon=given.get("epsilon", 1e-8),
        loss_scale=given.get("loss_scale") or None,
        initial_loss_scale=given.get("initial_loss_scale", 2.0**32),
        min_loss_scale=given.get("min_loss_scale", 1.0),
        loss_scale_window=int(given.get("loss_scale_window", 1000)),
        hysteresis=given.get("hysteresis", 2),
        seed=given.get("seed", 1234),
        balance_loss=given.get("balance_loss", 0.0) if given.get("balancing") != "none" else 0.0,
        bias_rate=given.get("bias_rate", 1e-3),
        paths=given.get("paths", ()),
        split=given.get("split") if "paths" in given else None,
        tokenizer=tokenizer if "paths" in given else None,
        cache=given.get("cache") if "paths" in given else None,
        save=given.get("save"),
        load=_load(given),
        checkpoint_every=given.get("checkpoint_every", 0),
        async_checkpoint="async_checkpoint" in given,
        time_limit_seconds=60.0 * given.get("exit_minutes") if "exit_minutes" in given else None,
        validation_every=0 if off else given.get("validation_every", 1000),
        validation_batches=1 if off else given.get("validation_batches", 100),
        log_every=max(1, given.get("log_every", 100)),
        timeout_seconds=60.0 * given.get("timeout_minutes", 10),
        wandb=given.get("wandb") or None,
        profile_steps=_profile(given),
        packing=packing,
    )


def _steps(given: Given, steps: str, samples: str, batch: int) -> int | None:
    """Steps, given as such or in samples."""
    given.exclusive(steps, samples)
    if samples in given:
        return max(1, given.get(samples) // batch)
    return given.get(steps)


def _warmup(given: Given, batch: int, decay: int) -> int:
    """Steps, given as such, in samples, or as a share of the steps of the decay."""
    given.exclusive("warmup_steps", "warmup_samples", "warmup_share")
    if "warmup_share" in given:
        if given.get("warmup_share") > 1.0:
            raise given.fail("warmup_share", "a share of the steps is at most 1", "a number from 0 to 1")
        return round(given.get("warmup_share") * decay)
    return _steps(given, "warmup_steps", "warmup_samples", batch) or 0


def _load(given: Given) -> str | None:
    if "load" in given and given.get("load") != given.get("save"):
        raise given.fail(
            "load", "a run goes on in its own folder", "the folder of --save", hint="--save the same folder"
        )
    return given.get("load")


def _profile(given: Given) -> tuple[int, int] | None:
    """Megatron-LM profiles from after step --profile-step-start up to step --profile-step-end."""
    if "profile" not in given:
        return None
    first, end = given.get("profile_first", 10) + 1, given.get("profile_end", 12)
    if first > end:
        raise given.fail("profile_end", "the window ends before it begins", f"at least {first}")
    return first, end
