"""Megatron's indexed dataset, PREFIX.bin and PREFIX.idx, read memory-mapped and written byte for byte.

[Note: Indexed datasets]
Little-endian, packed. The index: the magic, uint64 version 1, uint8 code of the token type, uint64 number n of
sequences, uint64 number d of document entries; then int32 lengths[n] in tokens, int64 offsets[n] in bytes, int64
documents[d], the sequence each document begins with and n. The .bin file is the tokens and nothing else. Modes of
multimodal data, which may follow in the index, are not read. Source: megatron/core/datasets/indexed_dataset.py of
Megatron-LM core 0.16.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from profiles.input_error import InputError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FLOAT_TYPES = {6: "float64", 7: "float32"}
_CODES = {np.dtype(kind): code for code, kind in TOKEN_TYPES.items()}
SMALL_VOCABULARY = 65_500  # below it tokens take 2 bytes, else 4


def index_path(prefix: str) -> Path:
    return Path(f"{prefix}.idx")


def tokens_path(prefix: str) -> Path:
    return Path(f"{prefix}.bin")


def token_type(vocabulary: int) -> np.dtype:
    """The type that Megatron's tools write for a vocabulary of this size."""
    return np.dtype(np.uint16 if vocabulary < SMALL_VOCABULARY else np.int32)


@dataclass(frozen=True)
class IndexedDataset:
    """Sequences of tokens on disk; one of Megatron's documents is one sequence unless it was split into sentences.

    `lengths` [n] int32 in tokens, `offsets` [n] int64 in bytes, `documents` [d] int64 with 0 first and n last.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray
    _bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, sequence: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start to stop of a sequence, read only, in the file's type."""
        stop = int(self.lengths[sequence]) if stop is None else stop
        first = int(self.offsets[sequence]) + start * self.dtype.itemsize
        return np.frombuffer(self._bytes, self.dtype, stop - start, first)

    @property
    def total_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def open_indexed(prefix: str) -> IndexedDataset:
    """The dataset at PREFIX.bin and PREFIX.idx.

    Raises InputError where a file is missing, is none of this format, or holds less than the index says.
    """
    index = _map(index_path(prefix), "the index of an indexed dataset", prefix)
    path = index_path(prefix)
    if len(index) < _HEADER.size:
        raise _broken(path, "is cut short", f"a header of {_HEADER.size} bytes", f"{len(index)} bytes")
    magic, version, code, sequences, entries = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if magic != MAGIC:
        raise _broken(path, "is not the index of an indexed dataset", f"{MAGIC!r} at its start", repr(magic))
    if version != VERSION:
        raise _broken(path, "has a version that is not known", f"version {VERSION}", f"version {version}")
    if code not in TOKEN_TYPES:
        raise _broken(
            path,
            "holds no token ids",
            "whole numbers: type code " + ", ".join(map(str, TOKEN_TYPES)),
            f"type code {code}" + (f", {_FLOAT_TYPES[code]}" if code in _FLOAT_TYPES else ""),
        )
    needed = _HEADER.size + 12 * sequences + 8 * entries
    if len(index) < needed:
        said = f"{needed:,} bytes, for {sequences:,} sequences and {entries:,} document entries"
        raise _broken(path, "is cut short", said, f"{len(index):,} bytes")
    at = _HEADER.size
    lengths = np.frombuffer(index, "<i4", sequences, at)
    offsets = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
    documents = np.frombuffer(index, "<i8", entries, at + 12 * sequences)
    dtype = np.dtype(TOKEN_TYPES[code]).newbyteorder("<")
    tokens = _map(tokens_path(prefix), "the tokens of an indexed dataset", prefix)
    dataset = IndexedDataset(prefix, dtype, lengths, offsets, documents, tokens)
    _check(dataset, len(tokens))
    return dataset


def _check(dataset: IndexedDataset, size_bytes: int) -> None:
    """That lengths, offsets and document entries agree with each other and with the .bin file."""
    path, sequences, documents = index_path(dataset.prefix), len(dataset), dataset.documents
    if not sequences or not dataset.lengths.any():
        raise _broken(path, "holds no tokens", "at least one", f"{sequences} sequences, all empty")
    if dataset.lengths.min() < 0 or dataset.offsets.min() < 0:
        raise _broken(path, "is damaged", "lengths and offsets >= 0", "negative ones")
    if not len(documents) or documents[0] != 0 or documents[-1] != sequences:
        got = f"{documents[0]} to {documents[-1]}" if len(documents) else "none"
        raise _broken(path, "is damaged", f"document entries from 0 to {sequences}", got)
    end = int((dataset.offsets + dataset.lengths.astype(np.int64) * dataset.dtype.itemsize).max())
    if end > size_bytes:
        raise _broken(
            tokens_path(dataset.prefix), "is cut short", f"{end:,} bytes, as its index says", f"{size_bytes:,} bytes"
        )


def _map(path: Path, what: str, prefix: str) -> np.ndarray:
    """The file's bytes, mapped; an empty file cannot be mapped and is an empty array."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read",
            where=f"--data {prefix}",
            expected=f"{what}, made by `cli.py data prepare` or Megatron's preprocess_data.py",
            got=error.strerror or str(error),
            hint="a prefix is the path of both files without .bin and .idx, as corpus_text_document",
        ) from None


def _broken(path: Path, what: str, expected: str, got: str) -> InputError:
    return InputError(f"{path} {what}", where=str(path), expected=expected, got=got)


class IndexedWriter:
    """Writes PREFIX.bin as documents come, and PREFIX.idx at the end; what is unfinished never bears those names.

    Used as a context manager: leaving it by an exception removes what was written.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._partial = {path: Path(f"{path}.partial") for path in (tokens_path(prefix), index_path(prefix))}
        self._lengths: list[np.ndarray] = []
        self._file = self._partial[tokens_path(prefix)].open("wb")

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents, one after the other in `tokens`, of `lengths` tokens each; an id must fit the writer's type.

        As Megatron's tools have it, an empty document is an entry of the document indices and no sequence.
        """
        assert int(lengths.sum()) == len(tokens)
        self._file.write(np.asarray(tokens, self._dtype.newbyteorder("<")).tobytes())
        self._lengths.append(np.asarray(lengths, np.int32))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is not None:
            for partial in self._partial.values():
                partial.unlink(missing_ok=True)
            return
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths > 0)])
        self._partial[index_path(self._prefix)].write_bytes(index_bytes(lengths[lengths > 0], ends, self._dtype))
        for path, partial in self._partial.items():
            partial.replace(path)


def index_bytes(lengths: np.ndarray, documents: np.ndarray, dtype: np.dtype) -> bytes:
    """The index of sequences of these lengths that lie one after the other; `documents` as in IndexedDataset."""
    sequences = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    offsets = np.concatenate([np.zeros(1, np.int64), ends])[:sequences]
    header = _HEADER.pack(MAGIC, VERSION, _CODES[np.dtype(dtype)], sequences, len(documents))
    return (
        header + lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes() + documents.astype("<i8").tobytes()
    )
