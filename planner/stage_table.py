"""The stage table: what each pipeline rank holds, its bytes by cause against the limit, and how long it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from .answer import Answer
from .layout import RECOMPUTE_MODES
from .plan import Stage
from .quantity_text import seconds_text
from .report import plain_table

_MEMORY_NAMES = {
    "gradients": "grads",
    "optimizer": "optim",
    "gathered_weights": "gather",
    "activations": "activ",
    "transient": "passing",
    "pipeline_buffers": "pipe",
    "communicators": "comm",
    "context": "context",
    "allocator_slack": "slack",
}
# Bytes below this share of the limit everywhere get no column of their own.
_SMALLEST_SHARE = 0.001
# So many causes have a column; the rest of them are summed.
_MOST_ITEMS = 7
# After which passes a stage frees its weights ([Note: Resharding] in `layout_costs`).
_RESHARD = {True: "always", None: "forward", False: "never"}
# Above so many rows only the ends and the fullest are shown.
_MOST_ROWS, _ROWS_AT_END = 12, 4


@dataclass(frozen=True)
class _Row:
    """Ranks `first` to `last` that hold the same."""

    first: int
    last: int
    layers: str
    recompute: str
    reshard: str
    items: dict[str, float]
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.items.values())

    @property
    def ranks(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


def stage_table(found: Answer, limit_bytes: float) -> Table:
    """A row a pipeline rank with its chunks; equal neighbours share a row, of very many the middle is left out."""
    memory = found.prediction.memory_bytes
    sizes = {name: max(items[name] for items in memory) for name in memory[0]}
    told = [name for name, size in sizes.items() if size > _SMALLEST_SHARE * limit_bytes]
    largest = sorted(told, key=lambda name: -sizes[name])[
        : _MOST_ITEMS - found.layout.stages_choose
    ]  # that column takes the place of one
    names = [name for name in told if name in largest]
    unit, scale = ("GiB", 2**30) if found.prediction.peak_memory_bytes >= 2**31 else ("MiB", 2**20)
    chunks = f", {found.layout.virtual_stages} chunks a rank" if found.layout.virtual_stages > 1 else ""
    table = plain_table(
        f"stages (E embedding, H head{chunks}), memory in {unit} of {limit_bytes / scale:,.1f}, works in a step",
        "stage" if found.layout.virtual_stages == 1 else "rank",
        "layers",
        "recompute",
        *(["reshard"] if found.layout.stages_choose else []),
        *(_MEMORY_NAMES.get(name, name) for name in names),
        *(["other"] if len(told) > len(names) else []),
        "total",
        "works",
    )
    rows = _rows(found)
    fullest = max(rows, key=lambda row: row.total)
    skipped = 0
    for index, row in enumerate(rows):
        inner = _ROWS_AT_END <= index < len(rows) - _ROWS_AT_END
        if len(rows) > _MOST_ROWS and inner and row is not fullest:
            skipped += row.last - row.first + 1
            if index + 1 == len(rows) - _ROWS_AT_END or rows[index + 1] is fullest:
                table.add_row("…", f"{skipped} more")
                skipped = 0
            continue
        table.add_row(
            row.ranks,
            row.layers,
            row.recompute,
            *([row.reshard] if found.layout.stages_choose else []),
            *(f"{row.items[name] / scale:,.2f}" for name in names),
            *([f"{sum(row.items[n] for n in told if n not in names) / scale:,.2f}"] if len(told) > len(names) else []),
            Text(f"{row.total / scale:,.2f}", style="red" if row.total > limit_bytes * (1 + 1e-9) else ""),
            seconds_text(row.seconds),
        )
    return table


def _rows(found: Answer) -> list[_Row]:
    rows: list[_Row] = []
    for rank, items in enumerate(found.prediction.memory_bytes):
        own = sorted(i for i, stage in enumerate(found.stages) if stage.rank == rank)
        stages = [found.stages[i] for i in own]
        works = sum(found.stage_seconds[i] for i in own)
        row = _Row(rank, rank, layers_text(stages), _recompute(stages), _RESHARD[stages[0].reshard], items, works)
        if rows and _shown(rows[-1]) == _shown(row):
            row = _Row(rows[-1].first, *list(vars(row).values())[1:])
            rows.pop()
        rows.append(row)
    return rows


def _shown(row: _Row) -> tuple[object, ...]:
    items = tuple(round(value / 2**20) for value in row.items.values())
    return (row.layers, row.recompute, row.reshard, items, f"{row.seconds:.3g}")


def layers_text(stages: Sequence[Stage]) -> str:
    """`6 E` of a stage, `2 E + 2 + 2` of a rank with chunks, `4 × 2` where they are alike."""
    words = [f"{stage.end - stage.first}" + " E" * stage.embedding + " H" * stage.head for stage in stages]
    if len(words) > 1 and len(set(words)) == 1:
        return f"{len(words)} × {words[0]}"
    return " + ".join(words)


def _recompute(stages: Sequence[Stage]) -> str:
    counts = {mode: sum(getattr(stage, f"recompute_{mode}") for stage in stages) for mode in RECOMPUTE_MODES[1:]}
    return " + ".join(f"{number} {mode}" for mode, number in counts.items() if number) or "none"
