"""Options of `train` about the loss scale of fp16, by Megatron-LM's names and with its defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtime.loss_scale import LossScaling

LossScale = Annotated[
    float | None, typer.Option("--loss-scale", help="fp16: scale the loss by this for good; default found as it goes.")
]
InitialLossScale = Annotated[
    float, typer.Option("--initial-loss-scale", help="fp16: what it begins at; the first steps find what it can be.")
]
MinLossScale = Annotated[float, typer.Option("--min-loss-scale", help="fp16: what it never falls below.")]
LossScaleWindow = Annotated[
    int, typer.Option("--loss-scale-window", help="fp16: steps in a row without overflow after which it doubles.")
]
Hysteresis = Annotated[int, typer.Option("--hysteresis", help="fp16: overflows until it is halved.")]

_OF_FP16 = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")


def refuse_without_fp16(context: typer.Context, precision: str) -> None:
    """Raise InputError where a loss scale was typed and the plan has another precision, which has none."""
    from profiles.input_error import InputError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in _OF_FP16 and source is not None and source.name == "COMMANDLINE" and precision != "fp16":
            flag = parameter.opts[0]
            raise InputError(
                f"{flag} is of fp16, and the plan is in {precision}, which has no loss scale",
                where=flag,
                expected="a plan that was made with --precision fp16",
                got=f"one in {precision}",
            )


def loss_scaling(constant: float | None, initial: float, minimum: float, window: int, hysteresis: int) -> LossScaling:
    """The options as the trainer takes them; raises InputError for what cannot be."""
    from runtime.loss_scale import LossScaling

    scaling = LossScaling(constant=constant, initial=initial, minimum=minimum, window=window, hysteresis=hysteresis)
    scaling.check()
    return scaling
