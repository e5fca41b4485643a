"""The order of a run's samples, kept in its folder, so that a resumed run goes on in the same order."""

from __future__ import annotations

from pathlib import Path

from profiles.input_error import InputError
from profiles.store import write_atomically

ORDER_FILE = "data_order.txt"


def keep_order(run_dir: Path, order: str) -> None:
    """Write the order of a run that begins. By one rank."""
    write_atomically(run_dir / ORDER_FILE, order + "\n")


def check_order(run_dir: Path, order: str) -> None:
    """Raise InputError where the run began with another order; one that kept none goes on."""
    try:
        kept = (run_dir / ORDER_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return
    if kept != order:
        raise InputError(
            "the resumed run would not go on with the samples that follow",
            where=str(run_dir / ORDER_FILE),
            expected=kept,
            got=order,
            hint="give the --data, --split, --seed and --steps that it began with: where the data is gone through more "
            "than once, the number of steps is part of the order, as it is in Megatron-LM",
        )
