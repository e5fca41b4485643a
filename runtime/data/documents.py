"""Files of documents (JSON lines, plain text, parquet) cut into chunks that workers read by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.input_error import InputError

_JSON_LINES = (".jsonl", ".json")
_TEXT, _PARQUET = ".txt", ".parquet"
_CHUNK_BYTES = 1 << 20  # of JSON lines: well under a second of a worker's time


@dataclass(frozen=True)
class Chunk:
    """A part of a file: the lines that begin in bytes [begin, end), a whole text file, or row group `begin`."""

    path: Path
    begin: int
    end: int
    size_bytes: int


def chunks_of(paths: Iterable[Path]) -> list[Chunk]:
    """All chunks of the files, in order. Raises InputError where one cannot be read or is of no kind that is known."""
    return [chunk for path in paths for chunk in _chunks(path)]


def read_documents(chunk: Chunk, key: str) -> list[str]:
    """The text of each document in the chunk; of JSON lines and parquet what stands under `key`.

    Raises InputError with file and line where there is no text.
    """
    if chunk.path.suffix in _JSON_LINES:
        return [_text_of(line, at, chunk.path, key) for at, line in _lines(chunk) if not line.isspace()]
    if chunk.path.suffix == _PARQUET:
        return _row_group(chunk, key)
    try:
        return [chunk.path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise _unreadable(chunk.path, f"text in UTF-8; byte {error.start} is none", error.reason) from None


def _chunks(path: Path) -> list[Chunk]:
    if path.suffix not in (*_JSON_LINES, _TEXT, _PARQUET):
        raise InputError(
            f"{path.name} is of no kind that is known",
            where=f"--input {path}",
            expected="a .jsonl, .txt or .parquet file",
            got=path.suffix or "no suffix",
        )
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, "a .jsonl, .txt or .parquet file", error.strerror or str(error)) from None
    if path.suffix == _TEXT:
        return [Chunk(path, 0, size, size)]
    if path.suffix == _PARQUET:
        groups = _parquet(path).num_row_groups
        return [Chunk(path, group, group + 1, size // groups) for group in range(groups)]
    begins = range(0, size, _CHUNK_BYTES)
    return [Chunk(path, begin, min(begin + _CHUNK_BYTES, size), min(_CHUNK_BYTES, size - begin)) for begin in begins]


def _lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the chunk, each with where: the one that reaches into it belongs to the chunk before."""
    with chunk.path.open("rb") as file:
        if chunk.begin:
            file.seek(chunk.begin - 1)
            file.readline()
        while (at := file.tell()) < chunk.end:
            yield at, file.readline()


def _text_of(line: bytes, at: int, path: Path, key: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSON's and UTF-8's errors are among them
        raise _at_line(
            path, at, "one JSON object a line", str(error), "mend or remove that line; is the file cut short?"
        ) from None
    if not isinstance(record, dict) or key not in record:
        got = "keys " + ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise _at_line(path, at, f"an object with the key {key!r}", got, "--json-key NAME names another key")
    text = record[key]
    if not isinstance(text, str):
        raise _at_line(path, at, f"text under {key!r}", type(text).__name__, "--json-key NAME names another key")
    return _encodable(text)


def _encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can escape and UTF-8 cannot say."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _row_group(chunk: Chunk, key: str) -> list[str]:
    file = _parquet(chunk.path)
    if key not in file.schema_arrow.names:
        raise _unreadable(
            chunk.path, f"a column {key!r}", "columns " + ", ".join(file.schema_arrow.names), "--json-key NAME"
        )
    texts = file.read_row_group(chunk.begin, columns=[key]).column(key).to_pylist()
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            where = f"text in every row of {key!r}; row {row} of row group {chunk.begin} has none"
            raise _unreadable(chunk.path, where, type(text).__name__)
    return texts


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _unreadable(
            path, "the package `pyarrow`, which reads parquet", "no such package", "pip install 'meshwright[data]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, "a parquet file", str(error)) from None


def _at_line(path: Path, at: int, expected: str, got: str, hint: str = "") -> InputError:
    """Counts the lines before byte `at`, which only an error needs."""
    with path.open("rb") as file:
        line = 1
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            line, at = line + block.count(b"\n"), at - len(block)
    return InputError(
        f"{path}, line {line}, has no document", where=f"{path}:{line}", expected=expected, got=got, hint=hint
    )


def _unreadable(path: Path, expected: str, got: str, hint: str = "") -> InputError:
    return InputError(f"{path} cannot be read", where=f"--input {path}", expected=expected, got=got, hint=hint)
