"""A small plan on ranks of its own beside a plain loop in one process: losses, gradient norms, parameters."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.plan import Plan
from profiles.traced_model import TracedModel

from . import loss
from .data.masked_tokens import masking_of
from .data.packing import Packing
from .data.token_source import own_rows
from .experts import Balance
from .foreign.foreign_loop import computes_in_double, module_batches, run_module_plain
from .foreign.module_contract import Samples
from .launch import start_ranks
from .local_parameters import local_part
from .packed_rows import own_tensors
from .parameters import WEIGHT_STD, cut, named_buffers, named_parameters
from .plain_loop import PlainRun, run_plain
from .process_group import process_group
from .run_folder import LOGS_FOLDER
from .step import StepResult, TrainState, build_state, training_step
from .trainer import TrainOptions

PRECISIONS = {"fp32": torch.float32, "float64": torch.float64}
# Relative. Sums are taken in another order under every layout, and rounding differs with it.
TOLERANCES = {"fp32": 1e-5, "float64": 1e-9}
# Of modules that compute in fp32 inside, whatever their parameters are: its rounding, step after step.
_NARROW_INSIDE = {"float64": 1e-6}
_FINEST = "float64"  # whose parameters are compared
_LEARNING_RATE = 1e-3
_BALANCE = Balance(loss_weight=0.1, bias_rate=0.01)  # large enough to be seen beside the loss
# The balance loss is that of each row, and the plain loop has none where it runs documents alone.
_OF_DOCUMENTS = Balance(bias_rate=_BALANCE.bias_rate)
_DOCUMENTS_A_ROW = 3  # in the mean, where documents are packed
_NAMES = 5  # of parameters that differ, in the verdict
_PLAIN_FILE = "plain.pt"

Found = dict[
    str, Any
]  # what a rank writes: {precision: {quantity: [a figure a step]}, "parameters": {name: difference}}


@dataclass(frozen=True, kw_only=True)
class Check:
    """A quantity in a precision: the largest relative difference of any rank and step, and where it was.

    `first_step` is the first that is beyond the tolerance, None where all hold. Parameters are compared after the last
    step; `names` are those with the largest differences, largest first.
    """

    quantity: str
    precision: str
    difference: float
    tolerance: float
    step: int
    rank: int
    first_step: int | None = None
    names: Mapping[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Verdict:
    """Whether the plan's ranks did what one process does, check by check."""

    steps: int
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; a difference that is no number is null."""
        checks: list[dict[str, Any]] = [asdict(check) | {"holds": check.holds} for check in self.checks]
        for check in checks:
            check["difference"] = _finite(check["difference"])
            check["names"] = {name: _finite(difference) for name, difference in check["names"].items()}
        return {"holds": self.holds, "steps": self.steps, "checks": checks}


def verify(plan: Plan, loss_tokens: int, *, steps: int, timeout_seconds: float) -> Verdict:
    """Train `steps` steps in fp32 and in float64, on the plan's ranks (gloo, on this machine) and in this process.

    The loss is computed `loss_tokens` at a time. Raises RunFailed when a rank dies or waits longer than the timeout,
    KeyboardInterrupt on Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="meshwright-") as name:
        folder = Path(name)
        (folder / LOGS_FOLDER).mkdir()
        options = TrainOptions(
            run_dir=folder,
            steps=steps,
            learning_rate=_LEARNING_RATE,
            timeout_seconds=timeout_seconds,
            balance=_BALANCE if plan.job.document_length is None else _OF_DOCUMENTS,
        )
        plain = {precision: _run_plain(plan, options, dtype) for precision, dtype in PRECISIONS.items()}
        torch.save(plain[_FINEST].parameters, folder / _PLAIN_FILE)
        start_ranks(plan, options, partial(run_rank, loss_tokens=loss_tokens))
        ranks = [json.loads(_found_path(folder, rank).read_text()) for rank in range(plan.layout.world_size)]
    narrow = isinstance(plan.model, TracedModel) and not computes_in_double(plan.model)
    return judge(plain, ranks, TOLERANCES | (_NARROW_INSIDE if narrow else {}))


def _run_plain(plan: Plan, options: TrainOptions, dtype: torch.dtype) -> PlainRun:
    how: dict[str, Any] = {
        "dtype": dtype,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "seed": options.seed,
    }
    if isinstance(plan.model, TracedModel):
        return run_module_plain(plan.model, module_batches(plan, options.steps), **how)
    return run_plain(plan.model, _batches(plan, options.steps), balance=options.balance, packing=_packing(plan), **how)


def run_rank(plan: Plan, options: TrainOptions, loss_tokens: int) -> None:
    """One rank's part of `verify`, in a process that the launcher has started; its findings go to the run folder."""
    found: Found = {}
    loss.LOSS_TOKENS = loss_tokens  # of this process, which ends with this function
    with process_group(plan.layout.world_size, options.timeout_seconds, on_cpu=True) as device:
        for precision, dtype in PRECISIONS.items():
            state = build_state(
                plan,
                device,
                dtype=dtype,
                seed=options.seed,
                weight_decay=options.weight_decay,
                balance=options.balance,
            )
            batches = (module_batches if isinstance(plan.model, TracedModel) else _batches)(plan, options.steps)
            results = [_step(plan, options, state, batch) for batch in batches]
            found[precision] = {
                "loss": [result.loss for result in results],
                "gradient norm": [result.grad_norm for result in results],
            }
            if precision == _FINEST:
                found["parameters"] = _differences(state, torch.load(options.run_dir / _PLAIN_FILE))
        _found_path(options.run_dir, dist.get_rank()).write_text(json.dumps(found))


def _step(plan: Plan, options: TrainOptions, state: TrainState, batch: torch.Tensor | Samples) -> StepResult:
    here = state.mesh.coordinate
    rows = own_rows(plan.job.global_batch, plan.layout, here.dp)
    own = (batch[0][rows], batch[1][rows]) if isinstance(batch, tuple) else batch[rows].numpy()
    samples = own_tensors(own, _packing(plan), plan.layout, here.cp, state.device)
    return training_step(state, *samples, learning_rate=options.learning_rate, clip_norm=None)


def judge(
    plain: Mapping[str, PlainRun], ranks: Sequence[Found], tolerances: Mapping[str, float] = TOLERANCES
) -> Verdict:
    """What every rank found, against the plain loop; `tolerances` by precision."""
    checks = [
        _check_steps(
            quantity, precision, tolerances[precision], [found[precision][quantity] for found in ranks], values
        )
        for precision, expected in plain.items()
        for quantity, values in (("loss", expected.losses), ("gradient norm", expected.norms))
    ]
    steps = len(plain[_FINEST].losses)
    of_ranks = [found["parameters"] for found in ranks]
    return Verdict(steps, (*checks, _check_parameters(of_ranks, tolerances[_FINEST], steps)))


def _check_steps(
    quantity: str,
    precision: str,
    tolerance: float,
    of_ranks: Sequence[Sequence[float]],
    expected: Sequence[float],
) -> Check:
    """A figure of each step, as every rank has it."""
    differences = [
        (_large(abs(value - wanted) / abs(wanted)), step, rank)
        for rank, values in enumerate(of_ranks)
        for step, (value, wanted) in enumerate(zip(values, expected, strict=True), start=1)
    ]
    largest, step, rank = max(differences)
    return Check(
        quantity=quantity,
        precision=precision,
        difference=largest,
        tolerance=tolerance,
        step=step,
        rank=rank,
        first_step=min((step for difference, step, _ in differences if difference > tolerance), default=None),
    )


def _check_parameters(of_ranks: Sequence[Mapping[str, float]], tolerance: float, steps: int) -> Check:
    worst: dict[str, tuple[float, int]] = {}
    for rank, differences in enumerate(of_ranks):
        for name, difference in differences.items():
            worst[name] = max(worst.get(name, (-1.0, 0)), (difference, rank))
    names = sorted(worst, key=lambda name: worst[name], reverse=True)[:_NAMES]
    largest, rank = worst[names[0]]
    return Check(
        quantity="parameters",
        precision=_FINEST,
        difference=largest,
        tolerance=tolerance,
        step=steps,
        rank=rank,
        first_step=steps if largest > tolerance else None,
        names={name: worst[name][0] for name in names},
    )


def _differences(state: TrainState, plain: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Of what this rank holds of each parameter, the largest difference from the plain loop's.

    Relative to the largest element of the whole tensor, but at least to the spread that weights start with: biases
    start at zero, and those of keys, which no loss depends on, move by rounding alone.
    """
    differences: dict[str, float] = {}
    for name, parameter in (*named_parameters(state.chunks), *named_buffers(state.chunks)):
        whole = plain[name]
        local = local_part(parameter.detach())
        if local.numel():
            off = (local - cut(whole, parameter)).abs().max() / whole.abs().max().clamp(min=WEIGHT_STD)
            differences[name] = max(differences.get(name, 0.0), _large(off.item()))
    return differences


def _batches(plan: Plan, steps: int) -> Iterator[torch.Tensor]:
    """A batch a step as a TokenSource has them, of random token ids; the same whatever the layout."""
    model, size = plan.model, (plan.job.global_batch, plan.job.sequence + 1)
    packing = _packing(plan)
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 + step)
        ids = torch.randint(0, model.vocab_size, size, generator=generator)
        if packing is not None:
            ids[torch.rand(size, generator=generator) < _DOCUMENTS_A_ROW / size[1]] = packing.end
        yield torch.from_numpy(masking_of(plan).batch(ids.numpy(), 0, step)) if model.bidirectional else ids


def _packing(plan: Plan) -> Packing | None:
    """A plan that is priced for documents is trained with them packed."""
    return Packing(end=0) if plan.job.document_length is not None else None


def _large(difference: float) -> float:
    """No number is the largest difference of all, which `max` would not see."""
    return math.inf if math.isnan(difference) else difference


def _finite(difference: float) -> float | None:
    return difference if math.isfinite(difference) else None


def _found_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"
