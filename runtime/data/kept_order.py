"""The order of a run's samples, and what ends of documents change in them, kept so that a resumed run does the same."""

from __future__ import annotations

from pathlib import Path

from profiles.input_error import InputError
from profiles.store import write_atomically

from .packing import Packing

ORDER_FILE = "data_order.txt"


_NO_ENDS = "ends of documents change nothing"


def keep_order(run_dir: Path, order: str, packing: Packing | None = None) -> None:
    """Write the order of a run that begins, and where documents are packed how. By one rank."""
    write_atomically(run_dir / ORDER_FILE, "".join(f"{line}\n" for line in (order, packing) if line is not None))


def check_order(run_dir: Path, order: str, packing: Packing | None = None) -> None:
    """Raise InputError where the run began with another order or packing; one that kept none goes on."""
    try:
        kept, *ends = (run_dir / ORDER_FILE).read_text(encoding="utf-8").strip().splitlines()
    except (OSError, ValueError):
        return
    before, now = (ends[0] if ends else _NO_ENDS), (_NO_ENDS if packing is None else str(packing))
    if before != now:
        raise InputError(
            "the resumed run would not go on with documents as they were",
            where=str(run_dir / ORDER_FILE),
            expected=before,
            got=now,
            hint="--reset-attention-mask, --reset-position-ids, --eod-mask-loss and --eod as the run began",
        )
    if kept != order:
        raise InputError(
            "the resumed run would not go on with the samples that follow",
            where=str(run_dir / ORDER_FILE),
            expected=kept,
            got=order,
            hint="give the --data, --split, --seed and --steps that it began with: where the data is gone through more "
            "than once, the number of steps is part of the order, as it is in Megatron-LM",
        )
