"""Read a checkpoint without running anything that is in it: torch's index of it is a pickle, and pickles call."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from profiles.input_error import InputError

METADATA_FILE = ".metadata"
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
# What an index of tensors is made of. BytesStorageMetadata is not among it: it marks objects that torch would unpickle
# with all they call, and our checkpoints hold tensors alone.
_ADMITTED = {
    (_METADATA_MODULE, "Metadata"),
    (_METADATA_MODULE, "MetadataIndex"),
    (_METADATA_MODULE, "StorageMeta"),
    (_METADATA_MODULE, "TensorProperties"),
    (_METADATA_MODULE, "TensorStorageMetadata"),
    (_METADATA_MODULE, "ChunkStorageMetadata"),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a look-up of torch.strided and its like by name
    ("pathlib", "PosixPath"),
}


class _TensorIndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index of tensors, torch's dtypes, and no other name; see "Restricting Globals" in the
    documentation of pickle."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in _ADMITTED or isinstance(dtype, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint's folder, of an index that was read once and found harmless and whole.

    Tensors are read by torch.load with weights_only, as torch's reader does by itself.

    Raises:
        InputError: the index asks for more than it is made of, or files are missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata = self._read_index()
        self._check_files()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def _read_index(self) -> Metadata:
        path = self._folder / METADATA_FILE
        try:
            with path.open("rb") as file:
                found = _TensorIndexUnpickler(file).load()
        except OSError as error:
            raise self._refused(METADATA_FILE, "the index of a checkpoint", error.strerror or str(error)) from None
        # Bytes that are no pickle raise whatever they happen to mean.
        except Exception as error:
            raise self._refused(METADATA_FILE, "an index of tensors, and nothing to call", str(error)) from None
        parts = getattr(found, "storage_data", None)
        if not isinstance(found, Metadata) or not isinstance(parts, dict):
            raise self._refused(METADATA_FILE, "an index of tensors", type(found).__name__)
        if not all(isinstance(part, _StorageInfo) for part in parts.values()):
            raise self._refused(METADATA_FILE, "places of tensors in files", "something else")
        return found

    def _check_files(self) -> None:
        """Every part that the index names lies inside a file of this folder."""
        ends: dict[str, int] = {}
        for part in self._metadata.storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
        for name, end in sorted(ends.items()):
            path = self._folder / name
            if path.parent != self._folder:
                raise self._refused(METADATA_FILE, "names of files in the same folder", name)
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                raise self._refused(name, f"a file of {end} bytes", "no file" if size is None else f"{size} bytes")

    def _refused(self, name: str, expected: str, got: str) -> InputError:
        return InputError(
            f"{self._folder} cannot be loaded",
            where=str(self._folder / name),
            expected=expected,
            got=(got.splitlines() or ["nothing"])[0],
            hint=f"delete {self._folder} to resume from the checkpoint before it",
        )
