"""Published rows that were composed, not measured: their seconds are exactly linear in the number of microbatches.

python benchmarks/composed_rows.py --runs runs.csv
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from profiles.published_runs import PublishedRun, load_published_runs

CLOCK_NOISE = 1e-3  # two runs of one step on the same GPUs differ by more than that


@dataclass(frozen=True)
class Linearity:
    """Rows of a source that differ in nothing but their microbatches, three numbers of them and more.

    `deviation` is the largest distance of a row from the line through the first and the last of its group, as a
    fraction of its seconds.
    """

    source: str
    groups: int
    rows: int
    deviation: float

    @property
    def composed(self) -> bool:
        """Whether the seconds were put together of parts rather than measured."""
        return self.deviation < CLOCK_NOISE


def linearity(runs: Iterable[PublishedRun]) -> tuple[Linearity, ...]:
    """One entry for each source that has such groups, in the order of the rows."""
    groups: dict[PublishedRun, dict[float, float]] = defaultdict(dict)
    for run in runs:
        if run.measured_seconds and run.global_batch and run.micro_batch and run.dp:
            alike = replace(run, id="", global_batch=None, measured_iter_s=None, measured_tok_s_gpu=None)
            alike = replace(alike, measured_tflops_per_gpu=None, measured_mfu=None, measured_peak_mem_GB=None)
            groups[alike][run.global_batch / (run.micro_batch * run.dp)] = run.measured_seconds
    of_source: dict[str, list[dict[float, float]]] = defaultdict(list)
    for alike, seconds in groups.items():
        if len(seconds) > 2:
            of_source[alike.source].append(seconds)
    return tuple(
        Linearity(source, len(found), sum(map(len, found)), max(map(_deviation, found)))
        for source, found in of_source.items()
    )


def _deviation(seconds: dict[float, float]) -> float:
    """The largest distance from the line through the ends, of seconds by microbatches."""
    (first, start), *between, (last, end) = sorted(seconds.items())
    slope = (end - start) / (last - first)
    return max(abs(start + slope * (number - first) - measured) / measured for number, measured in between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="the CSV of published runs")
    for found in linearity(load_published_runs(parser.parse_args().runs)):
        word = "composed" if found.composed else "measured"
        print(
            f"{word}: {found.rows} rows in {found.groups} groups, off the line by {found.deviation:.1e} at most: "
            f"{found.source}"
        )


if __name__ == "__main__":
    main()
