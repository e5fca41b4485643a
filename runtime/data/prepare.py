"""Documents to an indexed dataset: chunks of files tokenized by worker processes, written in the files' order."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path

import numpy as np

from profiles.input_error import InputError
from profiles.parent_process import ctrl_c_waits
from runtime.rank_watch import die_with_launcher

from .documents import Chunk, chunks_of, read_documents
from .indexed_dataset import IndexedWriter, token_type
from .tokenizer import BYTES, Tokenizer, load_tokenizer

_WAITING = 3  # chunks a worker that are under way or wait to be written


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to make of which files.

    `output` and `json_key` name the dataset: OUTPUT_KEY_document.bin and .idx. `append_eod` ends each document that is
    not empty with the tokenizer's end of document, or the token `eod`.
    """

    inputs: tuple[Path, ...]
    output: str
    tokenizer: str = BYTES
    json_key: str = "text"
    append_eod: bool = False
    eod: str | None = None
    workers: int = 1

    @property
    def prefix(self) -> str:
        return f"{self.output}_{self.json_key}_document"


@dataclass(frozen=True)
class Prepared:
    """What was written at `prefix`; `empty` documents of all have no token."""

    prefix: str
    documents: int
    empty: int
    tokens: int
    bytes_read: int
    token_bytes: int
    vocabulary: int


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk, one after the other, and the length of each."""

    tokens: np.ndarray
    lengths: np.ndarray


def prepare(wanted: Preparation, on_bytes: Callable[[int], None] = lambda _: None) -> Prepared:
    """Write the dataset; `on_bytes` is called with the input bytes of each chunk that is written.

    Raises InputError for files, keys or tokenizers that cannot be used, and an output that cannot be written; then,
    or when interrupted, nothing is left at the prefix that was not there before.
    """
    tokenizer = load_tokenizer(wanted.tokenizer, wanted.eod)
    if wanted.append_eod and tokenizer.end_of_document is None:
        raise InputError(
            "it is not known which token ends a document",
            where="--append-eod",
            expected=f"eos_token in tokenizer_config.json beside {wanted.tokenizer}'s tokenizer.json",
            got="none",
            hint="name it: --eod '<|endoftext|>'",
        )
    chunks = chunks_of(wanted.inputs)
    dtype = token_type(tokenizer.vocabulary)
    documents = empty = tokens = read = 0
    with _unwritable_is_input_error(wanted.output):
        Path(wanted.prefix).parent.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(wanted.prefix, dtype) as writer:
            for chunk, encoded in _encoded(wanted, tokenizer, chunks):
                writer.add(encoded.tokens, encoded.lengths)
                documents += len(encoded.lengths)
                empty += int((encoded.lengths == 0).sum())
                tokens += len(encoded.tokens)
                read += chunk.size_bytes
                on_bytes(chunk.size_bytes)
            if tokens == 0:
                raise InputError(
                    "there is no text in the input",
                    where="--input " + " ".join(map(str, wanted.inputs)),
                    expected="at least one document that is not empty",
                    got=f"{documents} documents, all empty",
                )
    return Prepared(wanted.prefix, documents, empty, tokens, read, tokens * dtype.itemsize, tokenizer.vocabulary)


def input_bytes(inputs: Sequence[Path]) -> int:
    """Of all files, for a bar; what is not there counts nothing, `prepare` will say so."""
    return sum(path.stat().st_size for path in inputs if path.is_file())


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, key: str, eod: int | None) -> Encoded:
    """Read a chunk and tokenize its documents; `eod` ends each that is not empty."""
    pieces = tokenizer.encode(read_documents(chunk, key))
    ids = [np.append(piece, eod) if eod is not None and len(piece) else piece for piece in pieces]
    dtype = token_type(tokenizer.vocabulary)
    lengths = np.array([len(each) for each in ids], np.int64)
    if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
        raise InputError(
            "a document is too long for the format",
            where=str(chunk.path),
            expected=f"at most {np.iinfo(np.int32).max:,} tokens",
            got=f"{lengths.max():,}",
        )
    return Encoded(np.concatenate([np.zeros(0, dtype), *ids], dtype=dtype, casting="unsafe"), lengths)


def _encoded(wanted: Preparation, tokenizer: Tokenizer, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its tokens, in order, never many more under way than there are workers."""
    eod = tokenizer.end_of_document if wanted.append_eod else None
    workers = min(wanted.workers, len(chunks))
    if workers < 2:
        for chunk in chunks:
            yield chunk, encode_chunk(chunk, tokenizer, wanted.json_key, eod)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("forkserver"),
        initializer=_start_worker,
        initargs=(wanted.tokenizer, wanted.eod, wanted.json_key, eod),
    )
    under_way: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        with ctrl_c_waits():
            forkserver.ensure_running()
        for chunk in chunks:
            under_way.append((chunk, pool.submit(_work, chunk)))
            if len(under_way) >= _WAITING * workers:
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker was killed",
            where="--workers",
            expected="memory for all workers, each with the tokenizer and a few documents",
            got=f"{workers} workers, one of which was ended from outside",
            hint="fewer --workers, or shorter documents",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What a worker process keeps between chunks; of a process that ends with the preparation."""

    job: tuple[Tokenizer, str, int | None]


def _start_worker(tokenizer: str, eod_token: str | None, key: str, eod: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # and one that waits: the parent ends the workers
    die_with_launcher()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _Worker.job = (load_tokenizer(tokenizer, eod_token), key, eod)


def _work(chunk: Chunk) -> Encoded:
    return encode_chunk(chunk, *_Worker.job)


@contextmanager
def _unwritable_is_input_error(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{output} cannot be written",
            where=f"--output {output}",
            expected="a path with room, that may be written to",
            got=error.strerror or str(error),
        ) from None
