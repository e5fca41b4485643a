"""python benchmarks/truth.py --runs runs.csv --worst 30"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from planner.report import plain_table
from planner.validate import Validation, validate
from planner.validate_report import (
    constants_text,
    groups_table,
    number,
    percent,
    score_cells,
    signed,
    sources_table,
    sweeps_table,
)
from planner.validate_scores import MANY_LAYOUTS, Outcome, held_out

PARTS = ("compute", "recompute", "tp", "cp", "ep", "pp", "bubble", "dp_exposed", "optimizer")


@dataclass(frozen=True)
class Reach:
    """What the errors of some rows are to come down to: mean error of seconds, and of memory where it is asked."""

    name: str
    counts: Callable[[Outcome], bool]
    seconds: float
    memory: float | None = None


def _from(source: str, software: str = "", precision: str = "") -> Callable[[Outcome], bool]:
    def counts(o: Outcome) -> bool:
        run = o.case.run if o.case else None
        return (
            run is not None
            and source in o.source
            and run.software.startswith(software)
            and run.precision.startswith(precision)
        )

    return counts


def _busy(counts: Callable[[Outcome], bool]) -> Callable[[Outcome], bool]:
    return lambda o: counts(o) and o.mfu is not None and o.mfu > 0.1


REACHES = (
    Reach("SC21 Table 1", _from("2104.04473 Table 1"), 0.05),
    Reach("SC21 Table 2, tensor + pipeline", _from("2104.04473 Table 2", "megatron"), 0.06),
    Reach("MegaScale, Megatron-LM rows", _from("2402.15627 Table 2", "megatron"), 0.06),
    Reach("NeMo launcher", _from("NeMo-Megatron-Launcher"), 0.08),
    Reach("Zero Bubble", _from("2401.10241"), 0.06, 0.03),
    Reach("vTrain multi-node", _from("ground_truth_multi"), 0.08),
    Reach("vTrain single-node, utilisation above 10 %", _busy(_from("ground_truth_single")), 0.10),
    Reach("MosaicML", _from("llm-foundry"), 0.10),
    Reach("torchtitan bf16", _from("torchtitan", precision="bf16"), 0.10),
    Reach("nanotron", _from("nanotron"), 0.10),
)


def reach_table(validation: Validation) -> Table:
    """The errors that are asked for beside those that are."""
    table = plain_table(
        "\nreach",
        "rows",
        "asked",
        "rows",
        "mean",
        "median",
        "bias",
        "null",
        "memory",
        "mean",
        "bias",
        "asked",
    )
    for reach in REACHES:
        scores = validation.score([o for o in validation.outcomes if reach.counts(o)])
        cells = score_cells(scores)
        met = scores.mape is not None and scores.mape <= reach.seconds
        table.add_row(reach.name, percent(reach.seconds), *cells, percent(reach.memory), style="green" if met else "")
    return table


def sweep_line(validation: Validation) -> str:
    many = [s for s in validation.sweeps if s.n >= MANY_LAYOUTS]
    wide = [s.spearman for s in many if s.spread >= 0.2 and s.spearman is not None]
    if not many or not wide:
        return "no sweeps"
    regrets = [s.regret for s in many]
    return (
        f"{len(many)} sweeps of {MANY_LAYOUTS} rows and more: regret {percent(statistics.median(regrets))} in the "
        f"median (asked 1 %), {percent(max(regrets))} at worst (asked 5 %); of {len(wide)} whose spread is 20 % "
        f"and more Spearman {min(wide):.3f} at least (asked 0.9), {statistics.median(wide):.3f} in the median"
    )


def worst_table(outcomes: Sequence[Outcome], by_memory: bool = False) -> Table:
    """Rows with their layout and where the prediction says that the step goes, in per cent of it."""
    table = plain_table(
        "\nrows (parts in % of the predicted step)",
        *("id", "model", "software", "gpus", "tp", "pp", "vpp", "dp", "cp", "ep", "z", "sp", "rec", "mb", "gb", "seq"),
        *("measured", "predicted", "error", *(part[:5] for part in PARTS), "memory", "predicted", "error"),
    )
    for o in outcomes:
        case, prediction = o.case, o.prediction
        assert case is not None
        assert prediction is not None
        layout, run = case.layout, case.run
        step = prediction.step_seconds
        parts = [f"{100 * prediction.breakdown_seconds.get(part, 0.0) / step:.1f}" for part in PARTS]
        table.add_row(
            o.id,
            run.model_name,
            case.software.name,
            str(layout.world_size),
            *map(str, (layout.tp, layout.pp, layout.virtual_stages, layout.dp, layout.cp, layout.ep, layout.zero)),
            "y" if layout.sequence_parallel else "n",
            prediction.recompute[:4] + ("" if run.recompute else "?"),
            str(layout.micro_batch) + ("" if run.micro_batch else "?"),
            str(case.job.global_batch),
            str(case.job.sequence),
            number(o.measured_seconds),
            number(o.predicted_seconds),
            signed(o.error),
            *(part if part != "0.0" else "" for part in parts),
            number(o.measured_memory),
            number(o.predicted_memory),
            signed(o.memory_error),
        )
    return table


def memory_table(outcomes: Sequence[Outcome], unit: float = 1e9) -> Table:
    """The fullest rank itemised, in GB, for rows whose memory was measured."""
    names = [
        name
        for name in (outcomes[0].prediction.memory_bytes if outcomes and outcomes[0].prediction else {})
        if any(o.prediction and o.prediction.memory_bytes.get(name, 0) > 1e7 for o in outcomes)
    ]
    table = plain_table("\nmemory of the fullest rank, GB", "id", "measured", "predicted", "error", *names)
    for o in outcomes:
        assert o.prediction is not None
        items = [f"{o.prediction.memory_bytes.get(name, 0) / unit:.2f}" for name in names]
        table.add_row(o.id, number(o.measured_memory), number(o.predicted_memory), signed(o.memory_error), *items)
    return table


def chosen(validation: Validation, arguments: argparse.Namespace) -> list[Outcome]:
    """The rows to list: of the sources asked for, held out ones only where asked, the worst first."""
    rows = [o for o in validation.outcomes if o.case is not None and o.prediction is not None and o.scored]
    if arguments.part != "all":
        rows = [o for o in rows if held_out(o.source) == (arguments.part == "held-out")]
    if arguments.match:
        rows = [o for o in rows if re.search(arguments.match, f"{o.source} {o.id}", re.IGNORECASE)]
    if arguments.min_mfu:
        rows = [o for o in rows if o.mfu is not None and o.mfu >= arguments.min_mfu]
    key = (lambda o: o.memory_error) if arguments.memory else (lambda o: o.error)
    rows = [o for o in rows if key(o) is not None]
    return sorted(rows, key=lambda o: -abs(key(o) or 0.0)) if not arguments.in_order else rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="the CSV of published runs")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="list the N worst rows with their parts")
    parser.add_argument("--match", default="", metavar="REGEX", help="only rows whose source or id has this")
    parser.add_argument("--part", choices=("seen", "held-out", "all"), default="seen", help="which sources to list")
    parser.add_argument("--min-mfu", type=float, default=0.0, help="only rows of at least this utilisation")
    parser.add_argument("--memory", action="store_true", help="the worst by memory, itemised")
    parser.add_argument("--in-order", action="store_true", help="in the file's order, not the worst first")
    parser.add_argument("--sweeps", action="store_true", help="every sweep")
    arguments = parser.parse_args()
    validation = validate(arguments.runs)
    console = Console(highlight=False, width=260)
    if arguments.sweeps:
        console.print(sweeps_table(validation.sweeps))
    console.print(sources_table(validation), groups_table(validation), reach_table(validation))
    console.print(sweep_line(validation), constants_text(validation))
    if arguments.worst:
        rows = chosen(validation, arguments)[: arguments.worst]
        console.print(worst_table(rows))
        if arguments.memory:
            console.print(memory_table(rows))


if __name__ == "__main__":
    main()
