"""What `cli.py profile` is asked for, and the answer: measure, read nccl-tests, calibrate, show, compare, list."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.catalogue import (
    list_catalogue,
    resolve_cluster,
    resolve_hardware_path,
    resolve_model,
)
from profiles.hardware import HardwareProfile, load_hardware
from profiles.input_error import InputError
from profiles.points import DTYPES

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class ProfileOrder:
    """The options of the verb, and the command line as it was typed."""

    command: str
    nproc: int | None = None
    output: Path | None = None
    quick: bool = False
    full: bool = False
    resume: bool = False
    precisions: tuple[str, ...] = ()
    nccl_tests: tuple[Path, ...] = ()
    calibrate: tuple[Path, ...] = ()
    show: str | None = None
    against: str | None = None
    list_all: bool = False


@dataclass(frozen=True)
class ProfileAnswer:
    """For a person, and for `--json`."""

    report: RenderableType
    document: dict[str, Any]


def carry_out(order: ProfileOrder) -> ProfileAnswer | None:
    """Do what the order says; None on a rank that only took part in measuring.

    Raises:
        InputError: options that exclude each other, files that cannot be read, a profiler that failed.
    """
    _refuse_contradictions(order)
    if order.list_all:
        return _list()
    if order.show is not None:
        return _show(order.show, order.against)
    if order.nccl_tests:
        return _take_nccl_tests(order)
    if order.calibrate:
        return _calibrate(order)
    return _measure(order)


def _refuse_contradictions(order: ProfileOrder) -> None:
    asked = {
        "--list": order.list_all,
        "--show": order.show is not None,
        "--nccl-tests": bool(order.nccl_tests),
        "--calibrate": bool(order.calibrate),
        "--quick": order.quick,
        "--full": order.full,
    }
    chosen = [flag for flag, given in asked.items() if given]
    if len(chosen) > 1:
        raise InputError(
            f"{' and '.join(chosen)} do not go together",
            where="profile",
            expected="one of " + ", ".join(asked) + ", or none of them to measure",
            got=", ".join(chosen),
            hint="call it once for each",
        )
    for dtype in order.precisions:
        if dtype not in DTYPES:
            raise InputError(
                f"{dtype!r} is not known", where="--precision", expected="one of " + ", ".join(DTYPES), got=dtype
            )
    if order.against is not None and order.show is None:
        raise InputError(
            "--against needs a profile to compare with",
            where="--against",
            expected="--show FIRST --against SECOND",
            got="no --show",
        )


def _measure(order: ProfileOrder) -> ProfileAnswer | None:
    from profiles.probes.session import measure

    from .profile_report import profile_report

    thoroughness = "quick" if order.quick else "full" if order.full else "default"
    found = measure(
        order.nproc, thoroughness, order.output, order.command, resume=order.resume, dtypes=order.precisions
    )
    return ProfileAnswer(profile_report(found[0]), found[0].to_dict()) if found is not None else None


def _show(name: str, against: str | None) -> ProfileAnswer:
    from .profile_report import difference_report, show_report

    hardware = load_hardware(resolve_hardware_path(name, where="--show"))
    if against is None:
        return ProfileAnswer(show_report(hardware), hardware.to_dict())
    other = load_hardware(resolve_hardware_path(against, where="--against"))
    return ProfileAnswer(difference_report(hardware, other), {"show": hardware.to_dict(), "against": other.to_dict()})


def _list() -> ProfileAnswer:
    from .profile_report import catalogue_report

    models = [resolve_model(name) for name in list_catalogue("models")]
    clusters = [resolve_cluster(name) for name in list_catalogue("clusters")]
    hardware = [load_hardware(resolve_hardware_path(name)) for name in list_catalogue("hardware")]
    document = {
        "models": [{"name": model.name, "parameters": model.parameters} for model in models],
        "clusters": [{"name": cluster.name, "hardware": cluster.hardware} for cluster in clusters],
        "hardware": [{"name": profile.name, "device": profile.device} for profile in hardware],
    }
    return ProfileAnswer(catalogue_report(models, clusters, hardware), document)


def _existing(order: ProfileOrder) -> tuple[HardwareProfile, Any]:
    """The profile that -o names, or that of this machine, and where it and its cluster are."""
    from profiles.local_files import ProfileFiles

    files = ProfileFiles.at(order.output)
    if not files.hardware.is_file():
        raise InputError(
            "there is no profile yet to go on from",
            where=str(files.hardware),
            expected="a profile that `cli.py profile` has written",
            got="no such file",
            hint="measure one device first: cli.py profile --nproc 1" + (f" -o {order.output}" if order.output else ""),
        )
    return load_hardware(files.hardware), files


def _take_nccl_tests(order: ProfileOrder) -> ProfileAnswer:
    from profiles.cluster import load_cluster_file
    from profiles.link_fit import with_collectives
    from profiles.nccl_points import with_nccl_tests
    from profiles.nccl_tests import read_nccl_tests

    from .profile_report import profile_report

    hardware, files = _existing(order)
    runs = [run for path in order.nccl_tests for run in read_nccl_tests(path)]
    merged = with_nccl_tests(hardware, runs)
    files.write(merged, with_collectives(load_cluster_file(files.cluster), merged.collectives))
    return ProfileAnswer(profile_report(merged), merged.to_dict())


def _calibrate(order: ProfileOrder) -> ProfileAnswer:
    from profiles.hardware import save_hardware

    from .calibrate import calibrate
    from .calibration_report import calibration_report
    from .record import load_record

    hardware, files = _existing(order)
    corrected, rows = calibrate(hardware, [load_record(folder) for folder in order.calibrate])
    save_hardware(corrected, files.hardware)
    document = {
        "corrections": corrected.corrections,
        "before": hardware.corrections,
        "parts": [asdict(row) for row in rows],
    }
    return ProfileAnswer(calibration_report(rows, files.hardware), document)
