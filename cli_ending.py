"""How a verb ends: its exit code, and the errors that a person can act on, told on one screen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from cli_parts import print_json, print_report

if TYPE_CHECKING:
    from planner.errors import NoPlanError


def exit_code_of(app: typer.Typer) -> int:
    """Run a verb; 0 done, 1 no plan or a failed run, 2 bad input, 128 + signal when a signal ended it."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        code = _explain(error)
    except KeyboardInterrupt as error:
        say_interrupted(error)
        code = 130
    return code or 0


def _explain(error: Exception) -> int:
    """Show what a person can act on, and its exit code; anything else is our bug and goes on as it is."""
    from planner.errors import NoPlanError
    from planner.report import input_error_report, no_plan_report
    from profiles.input_error import InputError

    as_json = "--json" in sys.argv
    # Usage errors come from click or from the copy of it inside newer typers, so they are known by what they can.
    if type(error).__name__ == "Abort":  # what click makes of Ctrl-C
        say_interrupted(error.__cause__ or error.__context__)
        return 130
    show, format_message = getattr(error, "show", None), getattr(error, "format_message", None)
    if show is not None and format_message is not None:
        show()
        if as_json:
            print_json({"error": {"error": format_message()}})
        return 2
    if isinstance(error, InputError):
        print_report(input_error_report(error), error=True)
        if as_json:
            print_json({"error": dict(error.lines())})
        return 2
    if isinstance(error, NoPlanError):
        print_report(no_plan_report(error), error=True)
        if as_json:
            print_json(_no_plan(error))
        return 1
    if type(error).__name__ == "RunFailed":
        sys.stderr.write(f"{error}\n")
        if as_json:
            print_json({"error": {"error": str(error)}})
        return 1
    raise error


def _no_plan(error: NoPlanError) -> dict[str, Any]:
    said: dict[str, Any] = {"error": error.what, "reasons": list(error.lines)}
    return {"error": said | ({"remedies": list(error.remedies)} if error.remedies else {})}


def say_interrupted(error: BaseException | None) -> None:
    sys.stderr.write(f"{str(error or '') or 'interrupted'}\n")
