"""How a verb ends: its exit code, and the errors that a person can act on, told on one screen."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Any

import typer

from cli_parts import print_json, print_report
from cli_signals import INTERRUPTED, NO_READER, interruptible, nobody_reads, open_streams, write_nowhere

if TYPE_CHECKING:
    from planner.errors import NoPlanError
    from profiles.input_error import InputError


# What depends on the machine and its permissions alone; any other OSError is a bug of ours.
_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
}
_LONG_NAME = 200  # of a path, in an error


def exit_code_of(app: typer.Typer) -> int:
    """Run a verb; 0 done, 1 no plan or a failed run, 2 bad input, 75 a run that left when it was asked to, 128 + signal
    when a signal ended it, or would have: SIGPIPE, where nobody reads what it prints."""
    open_streams()
    try:
        return _ended(app)
    except (BrokenPipeError, SystemExit) as error:
        if not nobody_reads(error):
            raise
        write_nowhere()
        return NO_READER


def _ended(app: typer.Typer) -> int:
    try:
        with interruptible():
            code = app(standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
    except Exception as error:
        code = _explain(error)
    except KeyboardInterrupt as error:
        say_interrupted(error)
        code = INTERRUPTED
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
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        as_json = as_json and error.filename is not None  # else it is standard output itself
        error = _refused(error)
    if hasattr(error, "show") and hasattr(error, "format_message"):
        error = _usage_error(error)
    if isinstance(error, InputError):
        if not error.hint and error.where.startswith("--"):
            error.hint = _help_command()
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
    if type(error).__name__ == "Left":
        sys.stderr.write(f"{error}\n")
        return getattr(error, "exit_code", 1)
    raise error


def _refused(error: OSError) -> InputError:
    """What the operating system does not do with a path that a person named, or with what is printed."""
    from profiles.input_error import InputError

    name = str(error.filename or "standard output")
    name = name if len(name) <= _LONG_NAME else f"{name[:_LONG_NAME]}…"
    return InputError(
        "the operating system refuses",
        where=name,
        expected="a path that may be used as the command needs it, on a disk with room",
        got=error.strerror or str(error),
        hint="look at its length, at who may read and write it, and at what is free",
    )


def _usage_error(error: Any) -> InputError:
    """What click says of a command line, in the five parts that every error has here."""
    from profiles.input_error import InputError

    what: str = error.format_message()
    parameter = getattr(error, "param", None)
    help_command = _help_command()
    flag: str = getattr(error, "option_name", None) or (parameter.opts[0] if parameter is not None else "")
    typed = _typed_after(flag)
    expected, hint = f"a command line as {help_command} has it", help_command
    if type(error).__name__ == "NoSuchOption":
        typed = flag
    if what.startswith("No such command"):
        help_command = f"{' '.join(help_command.split()[:-2])} --help"  # of the level that lacks it
        what, _, meant = what.partition(". Did you mean ")
        expected = f"a command that {help_command} lists"
        hint = f"is {meant.removesuffix('?')} meant? All of them: {help_command}" if meant else help_command
    if near := getattr(error, "possibilities", None):
        what, hint = what.partition(" (")[0], f"is {' or '.join(near)} meant? All of them: {help_command}"
    if type(error).__name__ == "MissingParameter":
        flag = flag if flag.startswith("-") else getattr(parameter, "metavar", None) or flag
        expected, typed = f"{flag} on the command line", "none"
    elif parameter is not None:
        expected = what.partition(": ")[2].removeprefix("Input should be ").partition(", ")[0] or expected
    return InputError(what, where=flag or "the command line", expected=expected, got=typed, hint=hint)


def _help_command() -> str:
    """The help of the verb that was asked for."""
    verb = sys.argv[1:3] if sys.argv[1:2] == ["data"] else sys.argv[1:2]
    return " ".join(["cli.py", *(word for word in verb if not word.startswith("-")), "--help"])


def _typed_after(flag: str) -> str:
    """What stands on the command line for the flag, or all of it."""
    words = sys.argv[1:]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if flag and word == flag:
            return following if following and not following.startswith("--") else flag
        if flag and word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return " ".join(words)


def _no_plan(error: NoPlanError) -> dict[str, Any]:
    said: dict[str, Any] = {"error": error.what, "reasons": list(error.lines)}
    return {"error": said | ({"remedies": list(error.remedies)} if error.remedies else {})}


def say_interrupted(error: BaseException | None) -> None:
    sys.stderr.write(f"{str(error or '') or 'interrupted'}\n")
