"""Indexed datasets: byte for byte what megatron-core writes and reads, and what is wrong with a damaged one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from profiles.input_error import InputError
from runtime.data.indexed_dataset import TOKEN_TYPES, IndexedWriter, open_indexed, token_type
from tests import megatron_core

DOCUMENTS = [np.arange(5), np.arange(0), np.array([9]), np.arange(100, 120)]


def written(prefix: Path, dtype: type[np.number] = np.uint16) -> str:
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for part in (DOCUMENTS[:2], DOCUMENTS[2:]):
            writer.add(np.concatenate(part), np.array([len(document) for document in part]))
    return str(prefix)


@pytest.mark.parametrize("dtype", [*TOKEN_TYPES.values()])
def test_files_are_megatrons_byte_for_byte(dtype: type[np.number], tmp_path: Path) -> None:
    written(tmp_path / "ours", dtype)
    megatron_core.write(tmp_path / "theirs", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        ours, theirs = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("ours", "theirs"))
        assert ours == theirs
    ours, theirs = open_indexed(str(tmp_path / "theirs")), megatron_core.IndexedDataset(str(tmp_path / "ours"))
    assert len(ours) == len(theirs) == 3
    assert np.array_equal(ours.documents, theirs.document_indices)
    for sequence in range(3):
        assert np.array_equal(ours.tokens(sequence), theirs[sequence])
    assert np.array_equal(ours.tokens(2, 3, 7), theirs.get(2, 3, 4))
    assert ours.tokens(0).dtype == dtype


def test_small_vocabularies_take_two_bytes_a_token() -> None:
    for size in (256, 65_499, 65_500, 200_000):
        assert token_type(size) == megatron_core.DType.optimal_dtype(size)


@pytest.mark.parametrize(
    ("suffix", "change", "expected", "got"),
    [
        (".idx", lambda index: b"TNTIDX\0\0\0" + index[9:], "is not the index", "TNTIDX"),
        (".idx", lambda index: index[:9] + struct.pack("<Q", 2) + index[17:], "version that is not known", "version 2"),
        (".idx", lambda index: index[:17] + b"\x06" + index[18:], "holds no token ids", "float64"),
        (".idx", lambda index: index[:17] + b"\x63" + index[18:], "holds no token ids", "type code 99"),
        (".idx", lambda index: index[:20], "cut short", "20 bytes"),
        (".idx", lambda index: index[:-1], "cut short", "109 bytes"),
        (".idx", lambda _: b"", "cut short", "0 bytes"),
        (".idx", lambda index: index[:-8] + struct.pack("<q", 9), "is damaged", "0 to 9"),
        (".idx", lambda index: index[:34] + struct.pack("<i", -5) + index[38:], "is damaged", "negative"),
        (".bin", lambda tokens: tokens[:-1], "cut short", "51 bytes"),
        (".bin", lambda _: b"", "cut short", "0 bytes"),
        (".bin", None, "cannot be read", "No such file"),
        (".idx", None, "cannot be read", "No such file"),
    ],
)
def test_a_damaged_file_is_named(suffix: str, change, expected: str, got: str, tmp_path: Path) -> None:
    prefix = written(tmp_path / "a")
    path = tmp_path / f"a{suffix}"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=expected) as error:
        open_indexed(prefix)
    assert got in error.value.got
    assert str(path) in error.value.what


def test_a_dataset_without_tokens_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "a"), np.dtype(np.uint16)) as writer:
        writer.add(np.zeros(0), np.zeros(3, np.int64))
    with pytest.raises(InputError, match="holds no tokens"):
        open_indexed(str(tmp_path / "a"))


def test_what_is_not_finished_leaves_what_was_there(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a")
    before = (tmp_path / "a.bin").read_bytes()

    def interrupted() -> None:
        with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
            writer.add(np.arange(3), np.array([3]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
