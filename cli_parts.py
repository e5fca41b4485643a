"""What the verbs of the command line share: options, and how an answer is printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from profiles.model import ModelSpec

_MOST = 10**9  # of a whole number: sequences, tokens of one, devices
A_YEAR = 365 * 86_400.0  # seconds: what torch's timers surely hold


def count(flag: str) -> Callable[[str], int]:
    """A parser of whole numbers from 1 to a billion whose error says what it got."""

    def parse(text: str) -> int:
        from profiles.input_error import InputError

        if not re.fullmatch(r"0*\d{1,10}", text) or not 1 <= int(text) <= _MOST:
            expected, hint = f"a whole number from 1 to {_MOST:,}", f"for example {flag} 8"
            raise InputError(f"{flag} cannot be {text!r}", where=flag, expected=expected, got=text, hint=hint)
        return int(text)

    return parse


def amount(flag: str, least: float, most: float = sys.float_info.max) -> Callable[[str], float]:
    """A parser of finite numbers from `least` to `most`; typer's own bounds would let infinity pass."""

    def parse(text: str) -> float:
        from profiles.input_error import InputError

        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            expected = f"a finite number >= {least:g}" if most == sys.float_info.max else f"{least:g} to {most:,.0f}"
            hint = f"for example {flag} {least + 1.5:g}"
            raise InputError(f"{flag} cannot be {text!r}", where=flag, expected=expected, got=text, hint=hint)
        return value

    return parse


def folder(flag: str) -> Callable[[str], Path]:
    """A parser of paths that refuses nothing at all, which Path takes for the folder one is in."""

    def parse(text: str) -> Path:
        from profiles.input_error import InputError

        if not text.strip():
            hint = "is a variable of the shell empty? The folder you are in is ."
            raise InputError(f"{flag} names nothing", where=flag, expected="a folder", got=repr(text), hint=hint)
        return Path(text)

    return parse


Model = Annotated[
    str,
    typer.Option(
        "--model", help="Catalogue name, Hugging Face folder or config.json, YAML, or package.module:factory."
    ),
]
Cluster = Annotated[str, typer.Option("--cluster", help="Catalogue name with nodes (dgx-h100:64), YAML, or local.")]
Devices = Annotated[
    int | None,
    typer.Option("--devices", parser=count("--devices"), metavar="N", help="Use so many devices; default all."),
]
GlobalBatch = Annotated[
    int,
    typer.Option("--global-batch", parser=count("--global-batch"), metavar="N", help="Sequences per optimizer step."),
]
SequenceLength = Annotated[int, typer.Option("--seq", parser=count("--seq"), metavar="N", help="Tokens per sequence.")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="bf16, fp16, fp8 or fp32; default bf16 on GPUs, fp32 on CPUs.")
]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory-limit", help="Bytes per device to stay under, as 76GiB; default its memory.")
]
Target = Annotated[str, typer.Option("--target", help="Executor to plan for: meshwright, megatron or torchtitan.")]
Price = Annotated[
    float | None,
    typer.Option(
        "--price", parser=amount("--price", 0), metavar="X", help="Dollars per GPU-hour: says what tokens cost."
    ),
]
Imbalance = Annotated[
    float,
    typer.Option(
        "--expert-imbalance",
        parser=amount("--expert-imbalance", 1),
        metavar="X",
        help="Tokens of the fullest expert rank over its even share.",
    ),
]
Offload = Annotated[str, typer.Option("--offload", help="optimizer: its state in the host's memory; GPUs only.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]


def described(model: str, sequence: int) -> str | ModelSpec:
    """The model that package.module:factory makes, traced for samples of so many tokens; any other name as it is."""
    from profiles.traced_model import names_a_factory

    if not names_a_factory(model):
        return model
    from runtime.foreign.trace_module import trace

    return trace(model, sequence)


def print_report(renderable: Any, *, error: bool = False) -> None:
    from rich.console import Console

    console = Console(stderr=error, highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console.width = 120
    console.print(renderable)


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def command_line() -> str:
    return " ".join(["cli.py", *sys.argv[1:]])
