"""python benchmarks/memory.py [NAME...]: predicted bytes of a rank beside what the runtime allocates, layout by layout.

Compared are the tensors of the training loop at the rank's peak; context, communicators and allocator slack are left
out of the prediction, since a dry run has none of them. A process a layout; nothing is timed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planner.rank_memory_report import PARTS
from tests.distributed.memory_cases import CASES, Compared, compare, in_child

MIB = 2**20


def show(name: str, compared: Compared) -> None:
    """A line of totals, and one of each part: predicted/measured MiB."""
    predicted, measured = compared.predicted_bytes / MIB, compared.measured_bytes / MIB
    print(f"{name:<42}{predicted:>9.2f}{measured:>10.2f}{compared.error:>+9.2%}", flush=True)
    parts = [(part, compared.predicted.get(part, 0.0) / MIB, compared.measured.get(part, 0) / MIB) for part in PARTS]
    print("    " + "  ".join(f"{part} {p:.2f}/{m:.2f}" for part, p, m in parts if p or m), flush=True)


def main(names: list[str]) -> None:
    print(f"{'layout':<42}{'predicted':>9}{'measured':>10}{'error':>9}   MiB")
    chosen = names or list(CASES)
    for name in chosen:
        show(name, in_child(compare, [CASES[name]])[0])


if __name__ == "__main__":
    main(sys.argv[1:])
