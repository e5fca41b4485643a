"""python benchmarks/plan_time.py [--time-limit 60] [--only TEXT]: what a plan costs, whole process, one thread.

CPU-seconds and peak memory of `cli.py plan` for questions from 64 to 16,384 devices, with the gap that was left when
it stopped. Prints a row each; run it on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

CLI = Path(__file__).parent.parent / "cli.py"
QUESTIONS = (
    ("gpt3-175b", "dgx-a100:8", 1536, 2048, "meshwright"),
    ("gpt3-175b", "dgx-a100:64", 1536, 2048, "meshwright"),
    ("gpt3-175b", "dgx-a100:256", 1536, 2048, "meshwright"),
    ("gpt3-175b", "dgx-a100:512", 1536, 2048, "meshwright"),
    ("gpt3-175b", "dgx-a100:1024", 1536, 2048, "meshwright"),
    ("gpt3-175b", "dgx-a100:2048", 2048, 2048, "meshwright"),
    ("llama3-405b", "dgx-h100:2048", 2048, 8192, "meshwright"),
    ("llama3-8b", "dgx-h100:4", 512, 8192, "megatron"),
    ("gpt3-175b", "dgx-a100:128", 1536, 2048, "megatron"),
    ("mixtral-8x7b", "dgx-h100:8", 512, 4096, "megatron"),
    ("deepseek-v3", "dgx-h100:256", 3840, 4096, "megatron"),
)
_WIDTHS = (14, 15, 12, 8, 8, 8, 10, 8, 6)


def measure(model: str, cluster: str, batch: int, sequence: int, target: str, limit: float) -> tuple[str, ...]:
    """One row: the question, CPU-seconds, MB, step, mfu, gap, legal layouts, ILPs and the layout."""
    words = ["plan", "--model", model, "--cluster", cluster, "--global-batch", str(batch), "--seq", str(sequence)]
    words += ["--target", target, "--time-limit", str(limit), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(CLI), *words], stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    cost = (f"{usage.ru_utime + usage.ru_stime:.1f}", f"{usage.ru_maxrss / 1000:.0f}")
    if "error" in answer:
        return model, cluster, target, *cost, answer["error"]["error"]
    certificate, prediction, layout = answer["certificate"], answer["prediction"], answer["layout"]
    degrees = " ".join(f"{axis}{layout[axis]}" for axis in ("tp", "cp", "pp", "dp", "ep") if layout[axis] > 1)
    rest = f"{degrees} zero{layout['zero']} mb{layout['micro_batch']} {layout['schedule']}·v{layout['virtual_stages']}"
    figures = (f"{prediction['step_seconds']:.2f} s", f"{prediction['mfu']:.1%}", f"{certificate['gap']:.2%}")
    return model, cluster, target, *cost, *figures, f"{certificate['layouts_legal']}", rest


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--time-limit", type=float, default=60.0, help="seconds, as plan's own")
    options.add_argument("--only", default="", help="questions whose words have the text")
    arguments = options.parse_args()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  {' '.join(sys.argv)}")
    header = ("model", "cluster", "target", "CPU-s", "MB", "step", "mfu", "gap", "layouts legal")
    print("  ".join(f"{cell:<{width}}" for cell, width in zip(header, (*_WIDTHS, 0), strict=False)))
    for question in QUESTIONS:
        if arguments.only in " ".join(map(str, question)):
            row = measure(*question, arguments.time_limit)
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*_WIDTHS, 0), strict=False)), flush=True)


if __name__ == "__main__":
    main()
