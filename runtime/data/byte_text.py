"""Text as byte tokens: the corpus, its samples at random places, and a bigram model to beat."""

from __future__ import annotations

import errno
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profiles.input_error import InputError

from .packing import Packing

VOCABULARY = 256  # every byte is a token
HELD_OUT_FRACTION = 0.05
DOCUMENT_END = 0  # does not occur in text
_DOCUMENT_END = bytes([DOCUMENT_END])
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "__pycache__"}
_TRAIN, _VALIDATION = 0, 1  # streams of random numbers that never meet
_BIGRAM_SMOOTHING = 0.1  # added to each count; of 1, 0.1 and 0.01 the best on the default corpus


@dataclass(frozen=True, kw_only=True)
class ByteText:
    """The TokenSource of a corpus: windows at random places, drawn anew in every step."""

    corpus: Corpus
    sequence: int
    seed: int
    packing: Packing | None = None

    unit = "byte"
    vocabulary = VOCABULARY
    has_validation = True

    @property
    def name(self) -> str:
        return self.corpus.source

    @property
    def order(self) -> str:
        return f"windows of {self.sequence} + 1 bytes of {self.name}, seed {self.seed}"

    def batch(self, step: int, samples: int, rows: np.ndarray | None = None) -> np.ndarray:
        return self._batch(self.corpus.train, _TRAIN, step, samples, rows)

    def validation_batch(self, index: int, samples: int, rows: np.ndarray | None = None) -> np.ndarray:
        return self._batch(self.corpus.held_out, _VALIDATION, index, samples, rows)

    def baseline_loss(self) -> float:
        return bigram_loss(self.corpus)

    def _batch(self, tokens: np.ndarray, stream: int, step: int, samples: int, rows: np.ndarray | None) -> np.ndarray:
        starts = sample_starts(
            len(tokens), seed=self.seed, stream=stream, step=step, samples=samples, sequence=self.sequence
        )
        return windows(tokens, starts if rows is None else starts[rows], self.sequence)


@dataclass(frozen=True)
class Corpus:
    """Tokens of the train part and of the held-out part, one uint8 each."""

    source: str
    train: np.ndarray
    held_out: np.ndarray


def load_corpus(path: Path | None, sequence: int) -> Corpus:
    """The text of a file, of all text files in a folder, or (None) of Python's standard library.

    The standard library's source is text that every machine with this program has: about 13 MB. The last
    documents, about 5 %, are held out. Raises InputError when there is nothing to read or a part is shorter
    than one sample of `sequence` + 1 tokens.
    """
    source = "Python's standard library" if path is None else str(path)
    text = b"".join(document + _DOCUMENT_END for document in _documents(path))
    cut = int(len(text) * (1.0 - HELD_OUT_FRACTION))
    boundary = text.find(_DOCUMENT_END, cut) + 1
    if 0 < boundary < len(text) - sequence:
        cut = boundary
    tokens = np.frombuffer(text, dtype=np.uint8)
    corpus = Corpus(source, tokens[:cut], tokens[cut:])
    if len(corpus.held_out) < sequence + 1:
        raise InputError(
            f"{source} is too short to train on",
            where=f"--data {path}",
            expected=f"at least {int((sequence + 1) / HELD_OUT_FRACTION) + 1} bytes, so that 5 % are one sample "
            f"of {sequence} + 1 tokens",
            got=f"{len(text)} bytes",
            hint="give more text, or a shorter sequence",
        )
    return corpus


def text_files(path: Path) -> list[Path]:
    """The file at `path`, or all files of the folder there and of those in it, in order of their names.

    Raises InputError where there is neither, or any of them may not be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    try:
        if not path.is_dir():
            found = [path]
            path.stat()
        else:
            inside = (Path(folder, name) for folder, _, names in os.walk(path, onerror=refuse) for name in names)
            found = sorted(file for file in inside if file.is_file())
    except OSError as error:
        raise _unreadable(path, error.filename, error.strerror or str(error)) from None
    for file in found:
        if not file.is_file():
            raise _unreadable(path, file, "neither a file nor a folder")
        if not os.access(file, os.R_OK):
            raise _unreadable(path, file, os.strerror(errno.EACCES))
    return found


def _unreadable(path: Path, which: object, reason: str) -> InputError:
    return InputError(
        f"{path} cannot be read",
        where=f"--data {path}",
        expected="a text file or a folder of them, all of which may be read",
        got=reason if str(which) == str(path) else f"{which}: {reason}",
        hint="look at the path, and at who may read it",
    )


def sample_starts(tokens: int, *, seed: int, stream: int, step: int, samples: int, sequence: int) -> np.ndarray:
    """Where the samples of a step begin: random places, a pure function of the arguments."""
    generator = np.random.default_rng([seed, stream, step])
    return generator.integers(0, tokens - sequence, size=samples)


def windows(tokens: np.ndarray, starts: np.ndarray, sequence: int) -> np.ndarray:
    """[samples, sequence + 1] token ids, int64, from each start on."""
    return tokens[starts[:, None] + np.arange(sequence + 1)].astype(np.int64)


def bigram_loss(corpus: Corpus) -> float:
    """Cross-entropy in nats per token, on the held-out part, of next-byte frequencies counted on the train part.

    p(b | a) = (count(a, b) + s) / (count(a) + 256 s), s the smoothing. What a model must beat to have
    learned more than letter pairs.
    """
    counts = _pair_counts(corpus.train).astype(np.float64) + _BIGRAM_SMOOTHING
    log_probability = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))
    held_out = _pair_counts(corpus.held_out)
    return float(-(held_out * log_probability).sum() / held_out.sum())


def _pair_counts(tokens: np.ndarray) -> np.ndarray:
    """[256, 256] how often byte b follows byte a; in pieces, so that memory stays small."""
    counts = np.zeros(VOCABULARY * VOCABULARY, dtype=np.int64)
    piece = 1 << 20
    for start in range(0, len(tokens) - 1, piece):
        window = tokens[start : start + piece + 1].astype(np.int64)
        counts += np.bincount(window[:-1] * VOCABULARY + window[1:], minlength=len(counts))
    return counts.reshape(VOCABULARY, VOCABULARY)


def _documents(path: Path | None) -> Iterable[bytes]:
    if path is None:
        return _standard_library()
    try:
        documents = [file.read_bytes() for file in text_files(path)]
    except OSError as error:
        raise _unreadable(path, error.filename, error.strerror or str(error)) from None
    text = [document for document in documents if document and _DOCUMENT_END not in document]
    if not text:
        raise InputError(
            f"{path} holds no text",
            where=f"--data {path}",
            expected="a text file or a folder of them",
            got=f"{len(documents)} files, all empty or binary" if path.is_dir() else "an empty or binary file",
        )
    return text


def _standard_library() -> list[bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, inside, names in os.walk(root):
        inside[:] = set(inside) - _SKIPPED_FOLDERS  # not walked: all that is installed may be among them
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise InputError(
            "Python's standard library is not there as text",
            where=str(root),
            expected="its .py files, the default corpus",
            got="none",
            hint="give a text file or folder with --data",
        )
    return [file.read_bytes() for file in files]
