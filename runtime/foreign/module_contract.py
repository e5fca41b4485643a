"""What training needs of a module besides its forward: samples to train on, and a loss.

[Note: What a module brings]
A causal language model of Hugging Face (its class named …ForCausalLM or …LMHeadModel, with a `config`) needs nothing:
it trains on token ids, and its loss is the mean cross-entropy of the next token. Any other module has two attributes,
usually methods:

    example_batch(batch_size, seed, step) -> (inputs, target)   tensors whose first dim is the samples
    loss(output, target) -> scalar                              mean over samples, each with the same weight

Its forward is called with `inputs` alone. `example_batch` must be a function of its arguments: the same samples
whichever rank asks. Since the mean over a step's samples is the mean of its microbatches' means, `loss` must not give
samples different weights. A module may say how tensor parallelism cuts it by `tp_plan`: {"name in the block": style}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from profiles.input_error import InputError

_CAUSAL_MODELS = ("ForCausalLM", "LMHeadModel")  # of Hugging Face, by the end of their class's name
Samples = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Contract:
    """How a module is fed and judged. `vocabulary` is what it reads tokens of, None for a module that reads none."""

    factory: str
    example_batch: Callable[[int, int, int], Samples] | None
    loss: Callable[[Any, torch.Tensor], torch.Tensor]
    vocabulary: int | None = None
    arguments: tuple[tuple[str, Any], ...] = ()  # of the forward, beside its inputs

    def run(self, module: nn.Module, inputs: torch.Tensor) -> Any:
        """The module's output for `inputs`."""
        return module(inputs, **dict(self.arguments))

    def draw(self, samples: int, seed: int, step: int) -> Samples:
        """(inputs, target) of so many samples that the module makes; InputError where it does not."""
        assert self.example_batch is not None
        called = f"example_batch({samples}, {seed}, {step})"
        try:
            made = self.example_batch(samples, seed, step)
        except Exception as error:
            raise self._refused(f"{called} raised", f"{type(error).__name__}: {first_line(error)}") from None
        if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(each, torch.Tensor) for each in made):
            raise self._refused(f"{called} gives no samples", type(made).__name__)
        if lengths := [tuple(each.shape) for each in made if each.ndim == 0 or len(each) != samples]:
            raise self._refused(f"{called} gives another number of samples", f"a tensor {list(lengths[0])}")
        return made

    def _refused(self, what: str, got: str) -> InputError:
        expected = "(inputs, target), two tensors whose first dim is the samples"
        return InputError(what, where=f"--model {self.factory}", expected=expected, got=got)


def contract_of(module: nn.Module, factory: str) -> Contract:
    """The contract of a module that `factory` made; InputError where it brings no loss or no samples."""
    brought = [name for name in ("example_batch", "loss") if callable(getattr(module, name, None))]
    if len(brought) == 2:
        return Contract(factory, module.example_batch, module.loss)  # type: ignore[arg-type]
    config = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not brought and type(module).__name__.endswith(_CAUSAL_MODELS) and isinstance(vocabulary, int):
        return Contract(factory, None, _next_token_loss, vocabulary, (("use_cache", False),))
    missing = " and ".join(name for name in ("example_batch", "loss") if name not in brought)
    raise InputError(
        f"{type(module).__name__} has no {missing}",
        where=f"--model {factory}",
        expected="a Hugging Face …ForCausalLM, or a module with example_batch(batch_size, seed, step) -> (inputs, "
        "target) and loss(output, target) -> scalar",
        got=f"a module without {missing}",
        hint="set them in the factory, as in examples/small_vit.py",
    )


def first_line(error: BaseException) -> str:
    """What an error says, as far as one line of a report holds it."""
    return (str(error).splitlines() or [""])[0][:200]


def check_deterministic(module: nn.Module, factory: str) -> None:
    """Refuse what makes the loss depend on the layout: random dropping, and statistics over a microbatch."""
    for name, part in module.named_modules():
        dropping = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        across = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if dropping or across:
            what = f"{type(part).__name__} with p={part.p}" if dropping else type(part).__name__
            why = "what is dropped" if dropping else "its statistics are those of a microbatch, and"
            raise InputError(
                f"{factory} makes a module with {what}",
                where=f"--model {factory}: {name}",
                expected="no dropout and no batch norm: " + why + " would depend on the layout",
                got=what,
                hint="set its probability to 0 in the factory" if dropping else "take layer or group norm",
            )


def _next_token_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    logits = output.logits.flatten(0, -2)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target.flatten())
