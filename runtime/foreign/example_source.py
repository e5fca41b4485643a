"""What a module that reads no tokens trains on: the samples that it makes itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from planner.plan import Plan
from profiles.input_error import InputError
from profiles.traced_model import TracedModel

from ..data.data_options import DataOptions
from .module_contract import Contract, Samples, contract_of
from .module_factory import make_on_meta


@dataclass(frozen=True)
class ExampleSource:
    """A step's samples by `example_batch(global batch, seed, step)`: every rank makes all and takes its rows."""

    name: str
    contract: Contract
    seed: int
    unit: str = "sample"
    vocabulary: int = 0
    has_validation: bool = False
    order: str = field(default="example_batch")
    packing: None = None

    def batch(self, step: int, samples: int, rows: np.ndarray | None = None) -> Samples:
        """(inputs, target) of a step (from 1 on) of so many samples; or only `rows` of them."""
        inputs, target = self.contract.draw(samples, self.seed, step)
        return (inputs, target) if rows is None else (inputs[rows], target[rows])

    def validation_batch(self, index: int, samples: int, rows: np.ndarray | None = None) -> Samples:
        """None are kept apart: nobody asks."""
        raise AssertionError("there are no samples that training never sees")

    def baseline_loss(self) -> float | None:
        return None


def open_examples(plan: Plan, options: DataOptions, seed: int) -> ExampleSource:
    """The samples of a plan whose model reads no tokens; InputError where data were named for it."""
    model = plan.model
    assert isinstance(model, TracedModel)
    if options.paths or options.tokenizer is not None:
        raise InputError(
            f"{model.factory} makes its own samples",
            where="--data" if options.paths else "--tokenizer",
            expected="no data: the module has example_batch",
            got=" ".join(options.paths) or str(options.tokenizer),
        )
    module = make_on_meta(model.factory)
    source = ExampleSource(f"example_batch of {model.factory}", contract_of(module, model.factory), seed)
    _check(source, plan)
    return source


def _check(source: ExampleSource, plan: Plan) -> None:
    """The samples have the shapes that were planned, and another call gives the same ones."""
    model, count = plan.model, plan.job.global_batch
    assert isinstance(model, TracedModel)
    (inputs, target), (again, _) = source.batch(1, count), source.batch(1, count)
    if tuple(inputs.shape) != (count, *model.input_shape) or len(target) != count:
        got = f"inputs {list(inputs.shape)} and {len(target)} targets"
        raise _refused(model, f"inputs {[count, *model.input_shape]} and {count} targets", got)
    if inputs.is_meta or not torch.equal(inputs, again):
        raise _refused(model, "the same samples for the same arguments, on the CPU", "others in a second call")


def _refused(model: TracedModel, expected: str, got: str) -> InputError:
    return InputError(
        "example_batch gives samples that cannot be used",
        where=f"plan: model.factory {model.factory}",
        expected=expected,
        got=got,
    )
