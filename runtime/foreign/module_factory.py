"""package.module:factory -> the nn.Module that it makes, on the meta device or with its first values."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from profiles.input_error import InputError
from profiles.traced_model import names_a_factory

from .module_contract import first_line

_WHERE = "--model"


def make_on_meta(factory: str) -> nn.Module:
    """The module without memory: shapes and names. In training mode."""
    with torch.device("meta"):
        return _call(factory)


def make_with_values(factory: str, seed: int) -> nn.Module:
    """The whole module on the CPU, its first values drawn as the factory does after `torch.manual_seed(seed)`.

    The same on every rank, whatever the layout; the generator that others draw from is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _call(factory)


def _call(factory: str) -> nn.Module:
    function = _find(factory)
    try:
        module = function()
    except (Exception, SystemExit) as error:
        raise _failed(
            f"{factory} raised while it made the module", "a factory that takes no arguments", error
        ) from None
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{factory} makes no module", where=_WHERE, expected="a torch.nn.Module", got=type(module).__name__
        )
    return module.train()


def _find(factory: str) -> Callable[[], object]:
    if not names_a_factory(factory):
        raise InputError(f"{factory!r} names no factory", where=_WHERE, expected="package.module:factory", got=factory)
    name, _, path = factory.partition(":")
    if (here := os.getcwd()) not in sys.path:  # as `python -m` has it; a script's folder alone is there otherwise
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        package = name.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        hint = f"is the folder that holds {package} the current one, or on PYTHONPATH?" if missing else ""
        raise _failed(f"{name} cannot be imported", "a module that Python can import", error, hint) from None
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            offered = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise InputError(
                f"{name} has no {path}",
                where=_WHERE,
                expected=f"the name of a factory in {name}",
                got=f"{path}; it offers {', '.join(offered[:12]) or 'nothing that can be called'}",
            )
        found = getattr(found, attribute)
    if not callable(found):
        raise InputError(
            f"{factory} cannot be called", where=_WHERE, expected="a function without arguments", got=repr(found)[:80]
        )
    return found


def _failed(what: str, expected: str, error: BaseException, hint: str = "") -> InputError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if Path(frame.filename) != Path(__file__) and "importlib" not in frame.filename]
    place = f", {Path(own[-1].filename).name} line {own[-1].lineno}" if own else ""
    got = f"{type(error).__name__}: {first_line(error)}{place}"
    return InputError(what, where=_WHERE, expected=expected, got=got, hint=hint)
