"""NcclTestRun: one run of nccl-tests or rccl-tests, and the readers of the reports that the two write as CSV and JSON.

- JSON (nccl-tests `-J FILE`, src/util.cu): `config.devices`, `results[].out_of_place.time`. Only the first device of
  each process is listed; without MPI that is the only process.
- CSV and JSON (rccl-tests `-Z csv|json -x FILE`, Reporter in src/common.cu): one row per size, in place or not. Its
  `ranks` are processes, and its `ranksPerNode` is the processes of one group, whatever the nodes.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .input_error import InputError
from .store import Reader

# nccl-tests' name without its underscores -> ours; the empty ones are measured but not used by any layout.
_OPERATIONS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "send_recv",
    **dict.fromkeys(("reduce", "gather", "scatter", "hypercube", "alltoallv", "bisection"), ""),
}
CUT_HINT = "where the file was cut short here, delete the line; else run the test again"
WRONG_HINT = "the times of wrong results are not used: find the faulty link or library, and run the test again"
_ANNOTATION = "# meshwright: operation=all_reduce ranks=16 ranks_per_node=8"
PROGRAM = re.compile(r"\b([a-z_]+?)_perf(?:_mpi)?\b")
WHOLE = re.compile(r"[0-9]{1,18}")
NUMBER = re.compile(r"[0-9]{1,18}(?:\.[0-9]{0,18})?(?:[eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, kw_only=True)
class NcclTestRun:
    """One run of one collective over `ranks` ranks, `groups` such groups at once (NCCL_TESTS_SPLIT).

    `points` are (bytes, seconds), rising: bytes of the whole tensor (gathered, before the scatter, one rank's buffer
    of an all-to-all, the message), seconds out of place, the median where a size was measured more than once.
    `ranks_per_node` is None where the file does not name the hosts, or they carry different numbers of ranks.
    `notes` are for a person: what of the file was left out.
    """

    operation: str
    ranks: int
    ranks_per_node: int | None
    groups: int
    device: str | None
    version: str | None
    points: tuple[tuple[int, float], ...]
    source: Path
    notes: tuple[str, ...] = ()


# ---- what all formats share ------------------------------------------------------------------------------


class Device(NamedTuple):
    """A device line: which rank, in which of the groups that ran at once, on which host."""

    rank: int
    group: int
    host: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of one group, as far as the file tells."""

    ranks: int = 0
    ranks_per_node: int | None = None
    groups: int = 1
    device: str | None = None


def group_of(devices: list[Device], per_process: int, where: str, *, one_a_process: bool) -> Group:
    """The first rank's group; `one_a_process`: only the first of a process's `per_process` devices is listed."""
    if not devices:
        return Group()
    twice = [rank for rank, times in Counter(device.rank for device in devices).items() if times > 1]
    if twice or (not one_a_process and len(devices) % per_process):
        raise InputError(
            "the device lines do not name every rank once",
            where=where,
            expected=f"a multiple of {per_process} devices, each rank once",
            got=f"{len(devices)} devices" + (f", rank {twice[0]} more than once" if twice else ""),
            hint="build nccl-tests with MPI=1, else every process measures alone; a list cut short needs its lines",
        )
    mine = [device.host for device in devices if device.group == devices[0].group]
    names = {device.name for device in devices if device.name}
    a_node = set(Counter(mine).values())
    factor = per_process if one_a_process else 1
    return Group(
        ranks=len(mine) * factor,
        ranks_per_node=a_node.pop() * factor if len(a_node) == 1 else None,
        groups=len({device.group for device in devices}),
        device=names.pop() if len(names) == 1 else None,
    )


def run_of(
    path: Path,
    operation: str,
    rows: list[tuple[int, float]],
    where: str,
    given: dict[str, str],
    group: Group,
    version: str | None,
) -> NcclTestRun:
    """The run, with what a person added to the file in place of what the file says."""
    ranks = int(given.get("ranks", group.ranks))
    if ranks < 2:
        raise InputError(
            "one rank alone sends nothing" if ranks else "the number of ranks is missing",
            where=where,
            expected="device lines '#  Rank  0 … on host device  0 …' of two ranks or more above the table",
            got=f"{ranks} ranks",
            hint="run with -g 8, or under mpirun with a build of MPI=1" if ranks else f"add the line '{_ANNOTATION}'",
        )
    per_node = given.get("ranks_per_node", group.ranks_per_node)
    if per_node and ranks % int(per_node):
        raise InputError(
            "the ranks do not fill whole nodes",
            where=where,
            expected=f"ranks_per_node that divides {ranks} ranks",
            got=str(per_node),
        )
    sizes: dict[int, list[float]] = {}
    for size, seconds in rows:
        if size:  # a size below one element a rank is printed as 0 bytes: nothing was sent
            sizes.setdefault(size, []).append(seconds)
    if not sizes:
        raise InputError("a run without times", where=where, expected="rows of sizes above 0 bytes", got="none")
    return NcclTestRun(
        operation=operation,
        ranks=ranks,
        ranks_per_node=int(per_node) if per_node else None,
        groups=group.groups,
        device=group.device,
        version=version,
        points=tuple((size, statistics.median(seconds)) for size, seconds in sorted(sizes.items())),
        source=path,
    )


def plain_name(name: str) -> str:
    """`name` as a key of _OPERATIONS ("AllReduce", "all_reduce_perf" -> "allreduce"), "" where it is none."""
    plain = name.lower().replace("_", "").removesuffix("mpi").removesuffix("perf")
    return plain if plain in _OPERATIONS else ""


def annotation(line: str, where: str) -> dict[str, str]:
    """What a person added in a line `# meshwright: key=value …`; an InputError for keys and values not known."""
    given = dict(re.findall(r"(\w+)=(\S+)", line.partition("meshwright:")[2]))
    numbers = all(WHOLE.fullmatch(v) and int(v) > 0 for k, v in given.items() if k != "operation")
    known = bool(given) and set(given) <= {"operation", "ranks", "ranks_per_node"}
    if not (known and numbers and plain_name(given.get("operation", "all_reduce"))):
        raise InputError(
            "this line adds nothing that is known", where=where, expected=f"'{_ANNOTATION}'", got=shown(line)
        )
    return given


def operation_of(path: Path, name: str, where: str) -> str:
    """Our name for nccl-tests' operation, "" for one that no layout uses; where `name` is "" the file's name tells."""
    found = {plain_name(name)} - {""}
    if not name:
        file = re.sub(r"[^a-z]", "", path.name.lower())
        found = {plain for plain, ours in _OPERATIONS.items() if ours and plain in file}
    if len(found) != 1:
        raise InputError(
            f"which collective was measured is {'unknown' if name else 'missing'}",
            where=where,
            expected="a line with all_reduce_perf or the like, or a file name like all_reduce.txt",
            got=shown(name) if name else path.name,
            hint=f"add the line '{_ANNOTATION}' above the table",
        )
    return _OPERATIONS[found.pop()]


def complete(path: Path, runs: list[NcclTestRun], notes: list[str]) -> tuple[NcclTestRun, ...]:
    """The runs, what was left out noted at the first; an InputError where there is none."""
    if not runs:
        raise InputError(
            f"{path} has no run that can be used",
            where=str(path),
            expected="a table '# size count type … time algbw busbw #wrong' of "
            + ", ".join(filter(None, _OPERATIONS.values())),
            got="; ".join(notes) or "no table",
            hint="give the output of nccl-tests (text, or the file of -J) or rccl-tests (text, or the file of -x)",
        )
    return (replace(runs[0], notes=tuple(notes)), *runs[1:])


def shown(text: str) -> str:
    """The text as an error quotes it, not longer than a screen line or two."""
    return repr(text if len(text) <= 160 else text[:157] + "...")


# ---- reports ------------------------------------------------------------------------------------------


def read_csv(path: Path, lines: list[str]) -> tuple[NcclTestRun, ...]:
    """The runs in rccl-tests' CSV, column names first; files may follow each other."""
    rows: list[tuple[str, dict[str, str]]] = []
    given: dict[str, str] = {}
    names: list[str] = []
    for number, raw in enumerate(lines, start=1):
        where, line = f"{path}:{number}", raw.strip()
        values = [value.strip() for value in line.split(",")]
        if "meshwright:" in line:
            given |= annotation(line, where)
        elif values[0].lower() == "numcycle":
            names = [name.lstrip("#").lower() for name in values]
        elif line and not line.startswith("#") and len(values) != len(names):
            expected = "columns " + ",".join(names or ["numCycle", "collective", "…"])
            raise InputError(
                "a row that cannot be read", where=where, expected=expected, got=shown(line), hint=CUT_HINT
            )
        elif line and not line.startswith("#"):
            rows.append((where, dict(zip(names, values, strict=True))))
    return _read_report(path, rows, given)


def _read_report(path: Path, rows: list[tuple[str, dict[str, str]]], given: dict[str, str]) -> tuple[NcclTestRun, ...]:
    """The runs in rccl-tests' report: rows, each with its place, whose keys are in lower case."""
    groups: dict[tuple[str, int], list[tuple[int, float]]] = {}
    notes: dict[str, None] = {}
    for where, row in rows:
        size, in_place, microseconds = (row.get(key, "") for key in ("size", "inplace", "time"))
        seconds = float(microseconds) * 1e-6 if NUMBER.fullmatch(microseconds) else 0.0
        if not (WHOLE.fullmatch(size) and in_place in ("0", "1") and 0 < seconds < float("inf")):
            raise InputError(
                "a row that cannot be read",
                where=where,
                expected="whole numbers as size and inplace, time > 0 us",
                got=shown(str(row)),
                hint=CUT_HINT,
            )
        if in_place == "1":
            continue
        if row.get("wrong", "0") not in ("0", "N/A"):
            raise InputError("a wrong result", where=where, expected="#wrong 0", got=row["wrong"], hint=WRONG_HINT)
        name = row.get("collective", row.get("name", ""))
        operation = operation_of(path, given.get("operation") or name, where)
        if operation:
            ranks = int(given["ranks"]) if "ranks" in given else _reported_ranks(row, where)
            groups.setdefault((operation, ranks), []).append((int(size), seconds))
        else:
            notes[f"{name} was left out, no layout uses it"] = None
    runs = []
    for (operation, ranks), points in groups.items():
        # Built without MPI it is one process, so one host; with MPI no column tells the hosts.
        group = Group(ranks=ranks, ranks_per_node=None if "ranks" in rows[0][1] else ranks)
        runs.append(run_of(path, operation, points, str(path), given, group, None))
    return complete(path, runs, list(notes))


def _reported_ranks(row: dict[str, str], where: str) -> int:
    """Ranks of one group: its processes times the devices of each."""
    keys = ("ranks", "rankspernode", "gpusperrank") if "ranks" in row else ("gpus", "gpus")
    values = [row.get(key, "") for key in keys]
    if not all(WHOLE.fullmatch(value) for value in values) or values[0] != values[1]:
        raise InputError(
            "how many ranks made a group cannot be told",
            where=where,
            expected="ranks equal to ranksPerNode (which rccl-tests fills with a group's processes), and gpusPerRank",
            got=", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True)),
            hint=f"add the line '{_ANNOTATION}' below the column names",
        )
    return int(values[0]) * (int(values[2]) if "ranks" in row else 1)


def read_json(path: Path, text: str) -> tuple[NcclTestRun, ...]:
    """The one run in nccl-tests' JSON, or the runs in rccl-tests' report."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid JSON", where=str(path), expected="the file of -J, whole", got=shown(str(error))
        ) from None
    if isinstance(document, list):
        objects = [(f"{path}: [{i}]", row) for i, row in enumerate(document) if isinstance(row, dict)]
        rows = [(where, {key.lower(): str(value) for key, value in row.items()}) for where, row in objects]
        return _read_report(path, rows, {})
    reader = Reader(document, source=str(path))
    words = str(reader.anything("args", default=""))
    operation = operation_of(path, next(iter(PROGRAM.findall(words)), ""), f"{path}: args")
    config = reader.child("config")
    devices = [
        Device(d.integer("rank"), d.integer("group", default=0), d.text("hostname"), d.text("device_info", default=""))
        for d in config.children("devices")
    ]
    per_process = config.integer("nthreads", minimum=1) * config.integer("ngpus", minimum=1)
    group = group_of(devices, per_process, f"{path}: config.devices", one_a_process=True)
    points = []
    for row in reader.children("results"):
        out = row.child("out_of_place")
        if out.anything("nwrong", default=None) not in (None, 0):
            raise out.fail("nwrong", "0", out.anything("nwrong"), WRONG_HINT)
        points.append((row.integer("size"), out.number("time", above=1e-9) * 1e-6))
    if not operation:
        return complete(path, [], ["no layout uses this operation"])
    version = f"NCCL {reader.anything('nccl_version', default='of unknown version')}"[:120]
    return complete(path, [run_of(path, operation, points, f"{path}: results", {}, group, version)], [])
