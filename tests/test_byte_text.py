"""The corpus of bytes, its samples, and the bigram baseline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from profiles.input_error import InputError
from runtime.data.byte_text import ByteText, Corpus, bigram_loss, load_corpus, sample_starts, windows


def corpus_of(train: bytes, held_out: bytes = b"") -> Corpus:
    return Corpus("test", np.frombuffer(train, dtype=np.uint8), np.frombuffer(held_out, dtype=np.uint8))


def test_the_default_corpus_is_the_standard_library() -> None:
    corpus = load_corpus(None, sequence=64)
    total = len(corpus.train) + len(corpus.held_out)
    assert 5e6 < total < 50e6
    assert 0.03 < len(corpus.held_out) / total < 0.06
    assert corpus.train[-1] == 0  # cut between two documents


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("world" * 50)
    (tmp_path / "a.txt").write_text("hello" * 50)
    (tmp_path / "image.bin").write_bytes(b"\0\1\2")
    corpus = load_corpus(tmp_path, sequence=8)
    text = bytes(np.concatenate([corpus.train, corpus.held_out]))
    assert text == b"hello" * 50 + b"\0" + b"world" * 50 + b"\0"


@pytest.mark.parametrize("case", ["missing", "empty file", "empty folder", "too short", "binary"])
def test_a_corpus_that_cannot_be_used_is_an_input_error(case: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    expected = {
        "missing": "cannot be read",
        "empty file": "holds no text",
        "empty folder": "holds no text",
        "too short": "too short",
        "binary": "holds no text",
    }[case]
    if case == "empty folder":
        path.mkdir()
    elif case != "missing":
        path.write_bytes({"empty file": b"", "too short": b"a" * 1000, "binary": b"a\0" * 5000}[case])
    with pytest.raises(InputError, match=expected) as error:
        load_corpus(path, sequence=64)
    assert error.value.where == f"--data {path}"


def test_a_batch_depends_on_seed_and_step_only() -> None:
    corpus = corpus_of(bytes(range(256)) * 4, bytes(range(256)))
    text = ByteText(corpus=corpus, sequence=10, seed=1)
    batch = text.batch(5, 6)
    assert batch.shape == (6, 11)
    assert batch.dtype == np.int64
    assert np.array_equal(batch, text.batch(5, 6))
    assert np.array_equal(batch[[4, 1]], text.batch(5, 6, np.array([4, 1])))
    assert not np.array_equal(batch, text.batch(6, 6))
    assert not np.array_equal(batch, ByteText(corpus=corpus, sequence=10, seed=2).batch(5, 6))
    assert np.array_equal(np.diff(batch) % 256, np.ones((6, 10)))  # each sample is a run of the text
    assert not np.array_equal(batch[:, 0], text.validation_batch(5, 6)[:, 0])


def test_samples_reach_the_last_token() -> None:
    tokens = np.arange(12, dtype=np.uint8)
    starts = sample_starts(12, seed=0, stream=0, step=0, samples=200, sequence=10)
    batch = windows(tokens, starts, 10)
    assert batch.min() == 0
    assert batch.max() == 11


def test_bigram_loss_by_hand() -> None:
    # After a comes b twice and a once; after b comes a twice. Smoothing adds 0.1 to each of 256.
    corpus = corpus_of(b"aababa", b"ab")
    assert bigram_loss(corpus) == pytest.approx(-math.log((2 + 0.1) / (3 + 25.6)))
    assert bigram_loss(corpus_of(b"aababa", b"bb")) == pytest.approx(-math.log(0.1 / (2 + 25.6)))


def test_bigrams_across_pieces_are_counted_once() -> None:
    # More than one piece of 2^20 tokens: pure alternation is predicted all but surely.
    assert bigram_loss(corpus_of(b"ab" * (1 << 20), b"abab")) == pytest.approx(0.0, abs=1e-4)
