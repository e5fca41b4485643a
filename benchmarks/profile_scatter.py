"""python benchmarks/profile_scatter.py [--nproc 2] [--times 4] [--budget 30] [PROFILE...]: one machine, profiled again.

How far apart profiles of one machine are: for each kind of what they measure the standard deviation over the mean, of
the median point and of the one that scatters most. Given profiles are read, none is measured then. Run it on
a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.profile_medians import same_points
from profiles.hardware import POINT_LISTS, HardwareProfile, load_hardware

CLI = Path(__file__).resolve().parents[1] / "cli.py"
MEASURED = ("seconds", "wait_seconds", "slowdown", "compute_slowdown")  # of a point, the first that it has
OF_OPERATIONS = ("memory", "collectives")  # shown operation by operation


def measure(times: int, ranks: int, budget: float) -> list[HardwareProfile]:
    """So many profiles, one after the other."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(times):
            path = Path(folder) / f"{number}.yaml"
            words = ["profile", "--nproc", str(ranks), "--quick", "--budget", str(budget), "--output", str(path)]
            subprocess.run([sys.executable, str(CLI), *words], check=True, stdout=subprocess.DEVNULL)
            found.append(load_hardware(path))
    return found


def values(profiles: Sequence[HardwareProfile]) -> Iterator[tuple[str, str, list[float]]]:
    """(kind, name, value in each profile) of every figure and point that all profiles have."""
    for field in fields(HardwareProfile):
        found = [getattr(profile, field.name) for profile in profiles]
        if field.name.endswith(("overhead_seconds", "launch_seconds", "straggler_slowdown")) and max(found) > 0:
            yield field.name, "", found
    for name in POINT_LISTS:
        for same in same_points(getattr(profile, name) for profile in profiles):
            measured = next((field for field in MEASURED if hasattr(same[0], field)), None)
            if measured is None or len(same) < len(profiles):
                continue
            kind = f"{name}, {same[0].operation}" if name in OF_OPERATIONS else name
            words = [str(getattr(same[0], f.name)) for f in fields(same[0]) if f.type in ("int", "str")]
            yield kind, " ".join(words), [getattr(point, measured) for point in same]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nproc", type=int, default=2, help="ranks")
    options.add_argument("--times", type=int, default=4, help="profiles")
    options.add_argument("--budget", type=float, default=30.0, help="seconds for each")
    options.add_argument("profile", nargs="*", type=Path, help="profiles to read, in place of measuring")
    arguments = options.parse_args()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  {' '.join(sys.argv)}")
    profiles = [load_hardware(path) for path in arguments.profile]
    profiles = profiles or measure(arguments.times, arguments.nproc, arguments.budget)
    scatter: dict[str, list[tuple[float, str]]] = {}
    for kind, name, found in values(profiles):
        mean = statistics.fmean(found)
        scatter.setdefault(kind, []).append((statistics.stdev(found) / mean if mean else 0.0, name))
    print(f"{'':36}{'number':>8}{'median':>9}{'most':>8}")
    for kind, found in scatter.items():
        most, name = max(found)
        middle = statistics.median(share for share, _ in found)
        print(f"{kind:36}{len(found):8}{middle:9.1%}{most:8.1%}  {name}")


if __name__ == "__main__":
    main()
