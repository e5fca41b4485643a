"""What `validate` shows: each row's error, then scores by source and by group, sweeps, and what was left out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .report import plain_table
from .validate import Validation
from .validate_scores import MANY_LAYOUTS, Outcome, Scores, Sweep, held_out

_SCORE_COLUMNS = ("rows", "mean", "median", "bias", "null", "memory", "mean", "bias")
_LOW_UTILISATION = 0.1

# Groups that are reported apart, beside everything: name -> whether a row is in it.
GROUPS: dict[str, Callable[[Outcome], bool]] = {
    "all": lambda o: True,
    "sources seen": lambda o: not held_out(o.source),
    "sources held out": lambda o: held_out(o.source),
    "layout stated in full": lambda o: o.layout_stated,
    "layout filled in": lambda o: not o.layout_stated,
    "seconds derived": lambda o: o.derived,
    "seconds not derived": lambda o: not o.derived,
    "utilisation above 10 %": lambda o: o.mfu is not None and o.mfu > _LOW_UTILISATION,
}


def validation_report(validation: Validation) -> RenderableType:
    """Everything, the summary last, where a terminal shows it."""
    parts: list[RenderableType] = [rows_table(validation.outcomes)]
    if skipped := skipped_table(validation.outcomes):
        parts.append(skipped)
    if unscored := unscored_text(validation.outcomes):
        parts.append(unscored)
    if validation.warnings:
        parts.append(Text("\n" + "\n".join(f"warning: {warning}" for warning in validation.warnings)))
    if found := validation.sweeps:
        parts.append(sweeps_table(found))
    parts.append(sources_table(validation))
    if validation.published:
        parts += [groups_table(validation), constants_text(validation)]
    return Group(*parts)


# ---- rows ------------------------------------------------------------------------------------------------------


def rows_table(outcomes: Sequence[Outcome]) -> Table:
    """A line a row: measured, predicted, error; memory likewise where it is stated; why it is not scored."""
    memory = any(o.measured_memory is not None for o in outcomes)
    columns = ["measured", "predicted", "error"] + (["memory", "predicted", "error"] if memory else []) + [""]
    table = _wrapping(plain_table("rows, seconds a step" + (" and GB" if memory else ""), "id", *columns))
    table.columns[-1].justify = "left"
    table.columns[-1].no_wrap = False
    for o in outcomes:
        cells = [number(o.measured_seconds), number(o.predicted_seconds), signed(o.error)]
        if memory:
            cells += [number(o.measured_memory), number(o.predicted_memory), signed(o.memory_error)]
        table.add_row(o.id, *cells, o.skipped or o.unfit)
    return table


def skipped_table(outcomes: Iterable[Outcome]) -> Table | None:
    """How many rows were skipped, by reason."""
    reasons = Counter(o.skipped for o in outcomes if o.skipped)
    if not reasons:
        return None
    table = _wrapping(plain_table("\nskipped", "reason", "rows"))
    for reason, rows in reasons.most_common():
        table.add_row(reason, str(rows))
    return table


def unscored_text(outcomes: Iterable[Outcome]) -> Text | None:
    """Which rows were predicted and left out of the scores, by reason."""
    reasons = Counter(o.unfit for o in outcomes if o.unfit and not o.skipped)
    unmeasured = sum(not o.skipped and not o.unfit and o.error is None and o.memory_error is None for o in outcomes)
    if unmeasured:
        reasons["no seconds stated"] = unmeasured
    if not reasons:
        return None
    listed = ", ".join(f"{rows} {reason}" for reason, rows in reasons.most_common())
    return Text(f"\npredicted but not scored: {listed}")


# ---- scores ----------------------------------------------------------------------------------------------------


def sources_table(validation: Validation) -> Table:
    """Scores of each source, in the file's order; H marks those held out."""
    title = "\nerrors by source" + (" (H: held out)" if validation.published else "")
    table = _wrapping(plain_table(title, "source", *_SCORE_COLUMNS))
    for source in dict.fromkeys(o.source for o in validation.outcomes):
        rows = [o for o in validation.outcomes if o.source == source]
        mark = "H " if validation.published and held_out(source) else ""
        table.add_row(mark + source, *score_cells(validation.score(rows)))
    return table


def groups_table(validation: Validation) -> Table:
    """Scores of all rows and of each group of them."""
    table = _wrapping(plain_table("\nerrors in all", "rows that count", *_SCORE_COLUMNS))
    for name, has in GROUPS.items():
        table.add_row(name, *score_cells(validation.score([o for o in validation.outcomes if has(o)])))
    return table


def score_cells(scores: Scores) -> list[str]:
    """The cells of `_SCORE_COLUMNS`."""
    return [
        str(scores.n),
        percent(scores.mape),
        percent(scores.median_ape),
        signed(scores.bias),
        percent(scores.null_mape),
        str(scores.memory_n),
        percent(scores.memory_mape),
        signed(scores.memory_bias),
    ]


# ---- sweeps ----------------------------------------------------------------------------------------------------


def sweeps_table(sweeps: Sequence[Sweep]) -> RenderableType:
    """Sweeps of five layouts and more, each on a line; the smaller ones in one line."""
    many = [sweep for sweep in sweeps if sweep.n >= MANY_LAYOUTS]
    few = [sweep for sweep in sweeps if sweep.n < MANY_LAYOUTS]
    parts: list[RenderableType] = []
    if many:
        title = f"\nsweeps of {MANY_LAYOUTS} layouts and more"
        table = _wrapping(plain_table(title, "question", "layouts", "spread", "Spearman", "regret"))
        for sweep in many:
            rank = "" if sweep.spearman is None else f"{sweep.spearman:.3f}"
            table.add_row(sweep.name, str(sweep.n), percent(sweep.spread), rank, percent(sweep.regret))
        parts.append(table)
    for these, words in ((many, f"{MANY_LAYOUTS} layouts and more"), (few, "fewer layouts")):
        if these:
            regrets = [sweep.regret for sweep in these]
            ranks = [sweep.spearman for sweep in these if sweep.spearman is not None]
            text = f"{len(these)} sweep{'s' if len(these) > 1 else ''} of {words}: "
            text += f"regret {percent(statistics.median(regrets))} in the median, {percent(max(regrets))} at worst"
            if ranks:
                text += f"; Spearman {statistics.median(ranks):.3f} in the median, {min(ranks):.3f} at worst"
            parts.append(Text(("\n" if not parts else "") + text))
    return Group(*parts)


def constants_text(validation: Validation) -> Text:
    """How many numbers of the model somebody chose."""
    owners = Counter(constant.partition(":")[0] for constant in validation.constants)
    most = f", at most {max(owners.values())} of one device or network" if owners else ""
    return Text(
        f"\n{len(validation.constants)} free constants in the whole model: nominal figures of {len(owners)} devices "
        f"and networks of the catalogue{most}; none is fitted to a row, and what trainers do is yes/no or one of a "
        "list. "
        "The null model is the constant fraction of peak that fits these very rows best, one for each GPU."
    )


def _wrapping(table: Table) -> Table:
    """The table with long names on several lines, so that no figure is cut."""
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    return table


# ---- figures ---------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Four significant figures, "" for none."""
    return "" if value is None else f"{value:.4g}"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def signed(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:+.1%}"
