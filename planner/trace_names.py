"""Chrome-trace events of a pipeline's actions: one process a rank, and in it a track planned and one measured.

The format: "Trace Event Format", Google 2016, with times in microseconds; Perfetto (ui.perfetto.dev) and
chrome://tracing read it.
"""

from __future__ import annotations

from typing import Any

from .layout import Layout

PLANNED, MEASURED = "planned", "measured"
_TRACKS = (PLANNED, MEASURED)
_KINDS = {"F": "forward", "B": "backward", "I": "backward of the input", "W": "backward of the weights", "R": "reduce"}
UPDATE = "update"  # norm, clipping and the optimizer, once a step


def track_names(layout: Layout) -> list[dict[str, Any]]:
    """Events that name the tracks: a process `rank 3, pipeline rank 1`, its threads `planned` and `measured`."""
    names: list[dict[str, Any]] = []
    for rank in range(layout.world_size):
        place = rank // (layout.world_size // layout.pp)
        title = {"name": f"rank {rank}, pipeline rank {place}"}
        names.append({"name": "process_name", "ph": "M", "pid": rank, "args": title})
        names.append({"name": "process_sort_index", "ph": "M", "pid": rank, "args": {"sort_index": rank}})
        names += [
            {"name": "thread_name", "ph": "M", "pid": rank, "tid": tid, "args": {"name": track}}
            for tid, track in enumerate(_TRACKS)
        ]
    return names


def action_event(rank: int, track: str, action: str, start_seconds: float, end_seconds: float) -> dict[str, Any]:
    """One action, as `1F0`, `1R` or UPDATE, on a rank's track."""
    kind = action.lstrip("0123456789")[:1]
    return {
        "name": action,
        "cat": _KINDS.get(kind, action),
        "ph": "X",
        "pid": rank,
        "tid": _TRACKS.index(track),
        "ts": 1e6 * start_seconds,
        "dur": 1e6 * (end_seconds - start_seconds),
    }
