"""Arrays that take seconds to build, kept in a folder that appears whole or not at all, and mapped from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from profiles.input_error import InputError

_DESCRIPTION = "description.json"
_PARTIAL = ".partial-"
_LEFT_SECONDS = 3600.0  # after so long without a change nobody writes a partial folder any more


def cached_arrays(
    folder: Path, description: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """What `build` returns, from FOLDER/HASH where `description` was built before.

    `description` must name all that the arrays depend on. Several processes may build the same at once: the first to
    be ready is kept; what a build that was killed has left goes. A folder that cannot be written keeps nothing and
    is no error. Raises InputError where what was kept cannot be read.
    """
    text = json.dumps(description, indent=1, sort_keys=True)
    kept = folder / hashlib.sha256(text.encode()).hexdigest()[:24]
    if kept.is_dir():
        return _read(kept)
    arrays = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_left(folder)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    except OSError:
        return arrays
    try:
        (partial / _DESCRIPTION).write_text(text, encoding="utf-8")
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        partial.chmod(0o755)  # mkdtemp's folder is its owner's alone
        partial.rename(kept)
    except OSError:  # no room, or another process was first
        shutil.rmtree(partial, ignore_errors=True)
        return arrays
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return _read(kept)


def _clear_left(folder: Path) -> None:
    """Remove partial folders that nobody has written to for long."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        with suppress(OSError):  # its writer has just given it its name
            newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - newest > _LEFT_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _read(kept: Path) -> dict[str, np.ndarray]:
    try:
        return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(kept.glob("*.npy"))}
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            "an index kept from an earlier run cannot be read",
            where=str(kept),
            expected="the arrays that its description.json names",
            got=str(error),
            hint="remove the folder: it is built anew",
        ) from None
