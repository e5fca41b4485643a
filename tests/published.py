"""Rows of published runs for tests: one that states everything, with columns replaced."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

from profiles.published_runs import PublishedRun

COLUMNS = [f.name for f in fields(PublishedRun)]
SMALL = Path(__file__).parent / "data" / "published_runs" / "small.csv"

# A made-up row of 8 A100, in the form of the published ones.
FULL: dict[str, str] = {
    "id": "full",
    "source": "a paper",
    "gpu": "A100-SXM-80GB",
    "num_gpus": "8",
    "gpus_per_node": "8",
    "intra_bw_GBps": "300",
    "inter_bw_GBps_per_gpu": "25",
    "model_name": "GPT-1.3B",
    "layers": "24",
    "hidden": "2048",
    "ffn": "8192",
    "heads": "16",
    "kv_heads": "16",
    "vocab": "51200",
    "seq": "1024",
    "software": "megatron-2021",
    "precision": "fp16",
    "tp": "2",
    "pp": "2",
    "vpp": "1",
    "dp": "2",
    "ep": "1",
    "cp": "1",
    "sp": "false",
    "zero_stage": "0",
    "dist_opt": "false",
    "recompute": "full",
    "micro_batch": "2",
    "global_batch": "32",
    "measured_iter_s": "1.5",
}


def write_runs(path: Path, *rows: dict[str, str], columns: list[str] | None = None) -> Path:
    """A CSV of FULL with each row's cells replaced; ids are numbered where they are not given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns or COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        for index, row in enumerate(rows):
            writer.writerow(FULL | {"id": f"row{index}"} | row)
    return path
