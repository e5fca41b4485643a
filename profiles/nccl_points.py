"""Runs of nccl-tests and rccl-tests as measured points of a HardwareProfile, in place of those of the same groups.

[Note: Where the ranks of a run lie]
Points are known by (operation, ranks, stride). nccl-tests numbers ranks node by node, so with k ranks on each of
several nodes of d devices, and g groups at once (NCCL_TESTS_SPLIT; `DIV n` makes groups of n neighbours, `MOD n` and
`AND n-1` put the ranks of a group n apart):

    one node                          stride 1 (g > 1 as well: inside a node the placement is taken not to matter)
    several nodes, g = 1, k = d       stride 1
    several nodes, g = 1, k = 1       stride d
    several nodes, g > 1, k = 1       stride g, a whole number of nodes
    several nodes, g > 1, k = d       stride 1
    several nodes, g > 1, k = d / g   stride g

Anything else (half of each node, say) is no axis of a mesh and is refused. d is the profile's, or of the runs' own
where the profile has none and they fill nodes.
"""

from __future__ import annotations

import datetime
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .hardware import HardwareProfile
from .input_error import InputError
from .nccl_reports import NcclTestRun
from .points import CollectivePoint

_Key = tuple[str, int, int]
# In a device's name a word with a digit is its model, but for memory ("80GB", "HBM3") and form ("SXM5", "PCIe4").
_NOT_A_MODEL = re.compile(r"\d+[GT]I?B|HBM\w*|SXM\w*|PCIE\w*|GDDR\w*|NVL\d*|OAM\w*")


def with_nccl_tests(hardware: HardwareProfile, runs: Sequence[NcclTestRun]) -> HardwareProfile:
    """The profile with the runs' points, and in its provenance where they are from.

    Even points of just the same (operation, ranks, stride) make way, all others stay; where two runs measured one
    size of one group, their median counts. nccl-tests prints no spread, so that of its points is 0, not known.

    Raises:
        InputError: a run on another device than the profile's, or on ranks that are no axis of a mesh of such nodes.
    """
    for run in runs:
        _check_device(hardware, run)
    per_node = _devices_per_node(hardware, runs)
    found: dict[_Key, dict[int, list[float]]] = {}
    records: list[dict[str, Any]] = []
    for run in runs:
        stride, notes = _stride(run, per_node)
        sizes = found.setdefault((run.operation, run.ranks, stride), {})
        for size, seconds in run.points:
            sizes.setdefault(size, []).append(seconds)
        records.append(_record(run, stride, notes))
    kept = [p for p in hardware.collectives if p.uneven or (p.operation, p.ranks, p.stride) not in found]
    new = [
        CollectivePoint(operation=operation, ranks=ranks, stride=stride, bytes=size, seconds=statistics.median(seconds))
        for (operation, ranks, stride), sizes in found.items()
        for size, seconds in sorted(sizes.items())
    ]
    earlier = [
        record
        for record in hardware.provenance.get("nccl_tests", [])
        if (record["operation"], record["ranks"], record["stride"]) not in found
    ]
    return replace(
        hardware,
        devices_per_node=per_node,
        collectives=(*kept, *new),
        provenance=hardware.provenance | {"nccl_tests": [*earlier, *records]},
    )


def _record(run: NcclTestRun, stride: int, notes: list[str]) -> dict[str, Any]:
    """What provenance says of one run: only what is known."""
    record = {
        "file": run.source.name,
        "date": _date(run.source),
        "device": run.device,
        "version": run.version,
        "operation": run.operation,
        "ranks": run.ranks,
        "stride": stride,
        "groups": run.groups,
        "points": len(run.points),
        "notes": [*notes, *run.notes],
    }
    return {key: value for key, value in record.items() if value not in (None, [])}


def _date(path: Path) -> str | None:
    """When the file was last written; the tests' own output has no date."""
    try:
        return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date().isoformat()
    except OSError:
        return None


# ---- the device ------------------------------------------------------------------------------------------


def _check_device(hardware: HardwareProfile, run: NcclTestRun) -> None:
    """Raise an InputError where the run is clearly of another device; names are spelt too freely to ask for more."""
    if hardware.backend != "nccl":
        raise InputError(
            f"{run.source} was measured with NCCL and the profile was not",
            where=f"{run.source}: {run.operation}",
            expected=f"collectives of {hardware.backend} on {hardware.device}",
            got=run.device or "a run of nccl-tests",
            hint="give a profile of the GPUs that the tests ran on",
        )
    profiled, ran = _models(hardware.device), _models(run.device or "")
    if profiled and ran and not profiled & ran:
        raise InputError(
            f"{run.source} was measured on another device than the profile",
            where=f"{run.source}: {run.operation}",
            expected=hardware.device,
            got=str(run.device),
            hint="give the profile of that device, or run the tests on this one",
        )


def _models(device: str) -> set[str]:
    """The model numbers in a device's name: H100 of "NVIDIA H100 80GB HBM3" and of "NVIDIA H100-SXM5-80GB"."""
    words = re.findall(r"[A-Z0-9]+", device.upper())
    return {word for word in words if re.search(r"\d", word) and not _NOT_A_MODEL.fullmatch(word)}


# ---- where the ranks lie -----------------------------------------------------------------------------------


def _devices_per_node(hardware: HardwareProfile, runs: Sequence[NcclTestRun]) -> int:
    """The profile's devices a node, else those of the runs over several nodes, else 0: not known."""
    if hardware.devices_per_node:
        return hardware.devices_per_node
    counts = {}
    for run in runs:
        per_node = run.ranks_per_node or 0
        if 1 < per_node < run.ranks and run.groups == 1:
            counts.setdefault(per_node, run)
    if len(counts) > 1:
        (first, _), (second, run) = list(counts.items())[:2]
        raise _no_axis(run, f"{first} ranks a node, as in the other runs over several nodes", f"{second} ranks a node")
    return next(iter(counts), 0)


def _stride(run: NcclTestRun, per_node: int) -> tuple[int, list[str]]:
    """How far apart the ranks of a group are, and what has to be said about it. See the note above."""
    notes = []
    if run.operation == "send_recv":
        notes.append("sendrecv_perf is a ring: every rank sends to the next and receives from the one before at once")
    k, groups = run.ranks_per_node, run.groups
    if k is None and groups == 1:
        return 1, [*notes, "the file does not name the hosts: the ranks are taken for neighbours"]
    if k is None:
        raise _no_axis(run, "as many ranks of the group on each node", "hosts not named, or uneven")
    if per_node and k > per_node:
        raise _no_axis(run, f"at most {per_node} ranks a node, as the profile's devices_per_node", f"{k} ranks a node")
    if k == run.ranks:
        return 1, notes
    if k == 1 and groups > 1:
        if per_node and groups % per_node:
            raise _no_axis(run, f"a multiple of {per_node} groups at once, or one", f"{groups} groups")
        return groups, notes
    if not per_node:
        # Groups at once of several ranks a node: neighbours or not, the node's width would tell.
        raise _no_axis(run, "a profile that says how many devices a node has", "devices_per_node: 0")
    if k == per_node:
        return 1, notes
    if k == 1:
        return per_node, [*notes, "one group alone, where a layout runs one for each device of a node at once"]
    if k * groups == per_node:
        return groups, notes
    raise _no_axis(
        run, f"{per_node} ranks on each node, all of its devices, or 1", f"{k} ranks a node, {groups} at once"
    )


def _no_axis(run: NcclTestRun, expected: str, got: str) -> InputError:
    return InputError(
        f"how far apart the ranks of {run.operation} over {run.ranks} ranks are cannot be told",
        where=str(run.source),
        expected=expected,
        got=got,
        hint="run the test on whole nodes or on one rank a node; a profile's devices_per_node and a line "
        "'# meshwright: ranks_per_node=8' in the file say what it leaves open",
    )
