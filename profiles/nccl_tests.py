"""Measured collectives from the output files of NVIDIA nccl-tests and AMD rccl-tests, whose text is read here.

The text (nccl-tests src/common.cu and src/util.cu; rccl-tests the same) has `#` lines with version, devices and two
lines of column names, then one row a size: size, count, type, redop and root where the version prints them, then time
(us), algbw, busbw and `#wrong` (older versions: `error`, a rounding error and no count) out of place, and again in
place. Per-iteration, bitwise and algorithm columns may follow; the column names say which. Launchers put a rank
before each line, and NCCL its own messages between them. CSV and JSON are read in nccl_reports.py.

The size column is max(bytes sent, bytes received) of one rank (TimeTest in src/common.cu). all_gather receives
count·n and sends count, reduce_scatter the other way round (GetCollByteCount in src/all_gather.cu and
src/reduce_scatter.cu), so size is the gathered tensor of one and the input of the other; for alltoall it is one
rank's whole buffer, for sendrecv the message. That is our `bytes` for every operation.

What a file does not say a person can add to it as a line: `# meshwright: operation=all_reduce ranks=16
ranks_per_node=8`. It holds from that line on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from .input_error import InputError
from .nccl_reports import (
    CUT_HINT,
    NUMBER,
    PROGRAM,
    WHOLE,
    WRONG_HINT,
    Device,
    NcclTestRun,
    annotation,
    complete,
    group_of,
    operation_of,
    plain_name,
    read_csv,
    read_json,
    run_of,
    shown,
)
from .store import read_text

_PREFIX = re.compile(r"(?:\[[^\]]*\]<std(?:out|err)>:?\s*|\[\d+\]\s+|\d+:\s+|\d{4}-\d\d-\d\dT\S+\s+)+")
_NOISE = re.compile(r"\b[NR]CCL (?:INFO|WARN|TRACE|ERROR)\b|\bmore process", re.IGNORECASE)
_START = re.compile(r"#\s*(?:[nr]ccl-tests version|Collective test starting|nThread|Using devices)", re.IGNORECASE)
_VERSION = re.compile(r"#?\s*((?:[nr]ccl-tests:? version|[NR]CCL version)\s+\S.*)", re.IGNORECASE)
_DEVICE = re.compile(
    r"#?\s*Rank\s+(\d{1,9})\s+(?:Group\s+(\d{1,9})\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s*(.*)"
)
_PER_PROCESS = re.compile(r"nThreads?\s+(\d{1,6})\s+nGpus\s+(\d{1,6})")
_ROW = re.compile(r"\d+(?:\s|$)|.*(?:\s(?:N/A|[\d.]+(?:e[+-]?\d+)?)\s*){6}$")  # or the end of one
_TIMESTAMP = re.compile(r"\s+\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$")


@dataclass
class _Pending:
    """What the lines so far said of one run."""

    line: int
    operation: str = ""
    given: dict[str, str] = field(default_factory=dict)
    version: list[str] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    per_process: int = 1
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[int, float]] = field(default_factory=list)
    closed: bool = False


def read_nccl_tests(path: Path) -> tuple[NcclTestRun, ...]:
    """Every run of a collective that layouts use, in the file's order.

    Raises:
        InputError: a file or a line that cannot be read, a wrong result, or something missing that the times mean
            nothing without (operation, ranks); it names the line and what to add.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        text = read_text(path, "nccl-tests output")  # raises, with the near match
    if re.match(r"\s*(?:\{|\[\s*\{)", text):
        return read_json(path, text)
    return _Lines(path).read(text)


class _Lines:
    """The text, line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[NcclTestRun] = []
        self.notes: list[str] = []
        self.pending = _Pending(line=1)

    def read(self, text: str) -> tuple[NcclTestRun, ...]:
        for number, raw in enumerate(text.split("\n"), start=1):
            line = _PREFIX.sub("", raw.strip(), count=1) if _PREFIX.match(raw.strip()) else raw.strip()
            if line.lower().startswith("numcycle,"):
                return read_csv(self.path, text.split("\n"))
            if line:
                self._line(number, line)
        self._finish()
        return complete(self.path, self.runs, self.notes)

    def fail(self, number: int, what: str, *, expected: str, line: str, hint: str = "") -> NoReturn:
        raise InputError(what, where=f"{self.path}:{number}", expected=expected, got=shown(line), hint=hint)

    # ---- text ------------------------------------------------------------------------------------------

    def _line(self, number: int, line: str) -> None:
        if "meshwright:" in line:
            self._new_run(number, self.pending.closed)
            self.pending.given |= annotation(line, f"{self.path}:{number}")
        elif line.startswith("#"):
            self._comment(number, line)
        elif _NOISE.search(line) and not re.match(r"\d+\s+\d", line):
            pass
        elif _ROW.match(line) if self.pending.columns else re.match(r"\d+\s+\d+\s+[a-z]\w+\s", line):
            self._row(number, line)
        elif not self._closing(number, line):
            self._say(number, line)

    def _closing(self, number: int, line: str) -> bool:
        """Whether this is one of the summary lines below a table; old versions print them without '#'."""
        words = line.lstrip("# ").split()
        wrong = words[:4] == ["Out", "of", "bounds", "values"]
        if wrong and "FAILED" in words:
            self.fail(number, "the collective gave wrong results", expected="0 OK", line=line, hint=WRONG_HINT)
        closing = wrong or words[:3] == ["Avg", "bus", "bandwidth"]
        self.pending.closed |= closing and bool(self.pending.columns)
        return closing

    def _comment(self, number: int, line: str) -> None:
        words = line.lstrip("# ").split()
        self._new_run(number, bool(self.pending.columns and _START.match(line)))
        if words[:1] == ["Rank"]:
            self._device(number, line)
        elif words[:1] == ["size"]:
            self._header(number, line, words)
        elif words[:2] == ["bytes", "N"]:
            self.fail(
                number, "the tests of NCCL 1 are not read", expected="nccl-tests 2", line=line, hint="run nccl-tests"
            )
        elif words[:2] == ["(B)", "(elements)"] and "(us)" not in words:
            self.fail(number, "the time column has another unit", expected="(us) below time", line=line)
        elif words[:1] == ["in-place"]:
            self.fail(number, "only in-place times", expected="out-of-place times", line=line, hint="run without -O 0")
        elif not self._closing(number, line) and "concluded" not in words:
            self._say(number, line)

    def _say(self, number: int, line: str) -> None:
        """A line that may name the program, the version or how many devices a process drives."""
        version, per_process = _VERSION.match(line), _PER_PROCESS.search(line)
        starting = re.match(r"#\s*Collective test starting:\s*(\S+)", line)
        programs = [starting[1]] if starting else [name for name in PROGRAM.findall(line) if plain_name(name)]
        if not (version or per_process or programs) or (self.pending.columns and not self.pending.closed):
            return
        self._new_run(number, self.pending.closed)
        if version:
            self.pending.version.append(version[1].strip()[:120])
        if per_process:
            self.pending.per_process = max(1, int(per_process[1]) * int(per_process[2]))
        if programs:
            self.pending.operation = programs[-1]

    def _device(self, number: int, line: str) -> None:
        match = _DEVICE.fullmatch(line)
        if not match:
            expected = "#  Rank  0 Group  0 Pid 123 on host device  0 [0000:07:00] name"
            self.fail(number, "a device line that cannot be read", expected=expected, line=line, hint=CUT_HINT)
        self.pending.devices.append(Device(int(match[1]), int(match[2] or 0), match[3], match[4].strip()))

    def _header(self, number: int, line: str, words: list[str]) -> None:
        expected = "size count type redop root time algbw busbw #wrong"
        if "cputime" in words:
            self.fail(number, "these are times of the CPU", expected=expected, line=line, hint="run without -C 1")
        first = words.index("time") if "time" in words else 0
        if not 3 <= first <= 5 or words[first + 1 : first + 3] != ["algbw", "busbw"] or len(words) < first + 4:
            self.fail(number, "column names that cannot be read", expected=expected, line=line, hint=CUT_HINT)
        self._new_run(number, bool(self.pending.rows))
        self.pending.columns = [word for word in words if word != "timestamp"]

    def _row(self, number: int, line: str) -> None:
        columns = self.pending.columns
        if not columns:
            self.fail(number, "a row before any column names", expected="a line '# size count type …' above", line=line)
        first = columns.index("time")
        words = _TIMESTAMP.sub("", line).split()
        labels = len(words) - len(columns[first:])  # redop and root are blank in some versions
        readable = 3 <= labels <= first and all(WHOLE.fullmatch(word) for word in words[:2])
        microseconds, wrong = (words[labels], words[labels + 3]) if readable else ("", "")
        if not (readable and NUMBER.fullmatch(microseconds) and re.fullmatch(rf"N/A|{NUMBER.pattern}\*?", wrong)):
            expected = "columns " + " ".join(columns)
            self.fail(number, "a row that cannot be read", expected=expected, line=line, hint=CUT_HINT)
        if wrong.endswith("*") or (columns[first + 3] == "#wrong" and wrong != "N/A" and float(wrong) > 0):
            self.fail(number, "a wrong result", expected=f"{columns[first + 3]} 0", line=line, hint=WRONG_HINT)
        seconds = float(microseconds) * 1e-6
        if not 0 < seconds < float("inf"):
            self.fail(number, "a time that cannot be", expected="time > 0 us", line=line)
        self.pending.rows.append((int(words[0]), seconds))

    def _new_run(self, number: int, begins: bool) -> None:
        if begins:
            self._finish()
            self.pending = _Pending(line=number, given=dict(self.pending.given))

    def _finish(self) -> None:
        pending, where = self.pending, f"{self.path}:{self.pending.line}"
        if not pending.columns:
            if pending.devices:
                self.notes.append(f"line {pending.line}: a run without a table was left out")
            return
        operation = operation_of(self.path, pending.given.get("operation") or pending.operation, where)
        if not operation:
            self.notes.append(f"line {pending.line}: {pending.operation} was left out, no layout uses it")
            return
        if not pending.closed:
            self.notes.append(f"line {pending.line}: the run has no closing lines, it may have been cut short")
        group = group_of(pending.devices, pending.per_process, where, one_a_process=False)
        version = ", ".join(dict.fromkeys(pending.version)) or None
        rows, given = pending.rows, pending.given
        self.runs.append(run_of(self.path, operation, rows, where, given, group, version))
