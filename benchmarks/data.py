"""python benchmarks/data.py [--tokens 1e9] [--megabytes 64]: preparing, indices and loading, beside what a step takes.

Prepares Python's standard library, repeated, as JSON lines, with bytes and with a byte-level BPE tokenizer that is
trained on it first; builds the indices of a dataset of so many tokens (its lengths are all that takes), cold and kept;
and reads batches from the prepared tokens, which lie in the page cache. Prints a row each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a `runtime` too

from runtime.data.blend import Blend, blending_index, normalized
from runtime.data.byte_text import load_corpus
from runtime.data.index_cache import cached_arrays
from runtime.data.indexed_tokens import IndexedTokens, open_indexed_tokens
from runtime.data.prepare import Preparation, prepare
from runtime.data.sample_order import Epochs, build_order

ROOT = Path(__file__).parent.parent
SEQUENCE = 2048
DOCUMENT_TOKENS = 1000  # on average, of the dataset whose indices are built
VOCABULARY = 16_384


def timed(body: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds that passed, seconds of this process's CPU time, and what `body` returns."""
    start, cpu = time.perf_counter(), time.process_time()
    found = body()
    return time.perf_counter() - start, time.process_time() - cpu, found


def row(what: str, seconds: float, cpu_seconds: float | None, tokens: float, note: str = "") -> None:
    """CPU seconds are what a busy machine does not stretch; None where workers spent them."""
    cpu = "" if cpu_seconds is None else f"{cpu_seconds:.3f}"
    print(f"{what:44} {seconds:9.3f} {cpu:>9} {tokens / seconds:21,.0f}  {note}", flush=True)


def write_documents(path: Path, megabytes: float) -> list[str]:
    """JSON lines of so many MB: the standard library's files, over and over; returns the files."""
    corpus = load_corpus(None, SEQUENCE)
    text = bytes(np.concatenate([corpus.train, corpus.held_out])).decode("utf-8", "replace")
    documents = [document for document in text.split("\0") if document]
    with path.open("w", encoding="utf-8") as file:
        for document in cycle(documents):
            file.write(json.dumps({"text": document}) + "\n")
            if file.tell() >= megabytes * 1e6:
                return documents
    raise AssertionError("the standard library has files")


def train_tokenizer(folder: Path, documents: list[str]) -> None:
    """A byte-level BPE tokenizer.json, as GPT-2's and Llama 3's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(documents, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def measure_preparing(folder: Path, megabytes: float) -> str:
    """Rows of both tokenizers, with one worker and with all; returns the prefix of the last."""
    source = folder / "documents.jsonl"
    train_tokenizer(folder / "model", write_documents(source, megabytes)[::8])
    prefix = ""
    for name, tokenizer in (("bytes", "bytes"), (f"BPE, {VOCABULARY:,} tokens", str(folder / "model"))):
        for workers in sorted({1, os.cpu_count() or 1}):
            wanted = Preparation(inputs=(source,), output=str(folder / "out"), tokenizer=tokenizer, workers=workers)
            seconds, cpu, found = timed(partial(prepare, wanted))
            note = f"{found.tokens:,} tokens, {found.bytes_read / seconds / 1e6:.1f} MB/s of JSON"
            row(f"prepare, {name}, {workers} workers", seconds, cpu if workers == 1 else None, found.tokens, note)
            prefix = found.prefix
    return prefix


def _order(lengths: np.ndarray, epochs: int) -> dict[str, np.ndarray]:
    order = build_order(lengths, 0, len(lengths), Epochs(epochs, False), sequence=SEQUENCE, seed=1234)
    return {"documents": order.documents, "samples": order.samples, "shuffle": order.shuffle}


def _megatrons_order(lengths: np.ndarray, epochs: int) -> np.ndarray:
    """The same by megatron-core's own functions, the sample index by its C++; returns the shuffle index."""
    from megatron.core.datasets import gpt_dataset, helpers

    random, documents = np.random.RandomState(1234), np.arange(len(lengths), dtype=np.int32)
    order = gpt_dataset._build_document_index(documents, epochs, random, False)
    tokens = int(lengths.sum(dtype=np.int64))
    samples = helpers.build_sample_idx(lengths, order, SEQUENCE, epochs, tokens, True, True)
    return gpt_dataset._build_shuffle_index(len(samples) - 1, len(samples) - 1, random)


def measure_indices(folder: Path, tokens: int) -> None:
    """Rows of one epoch and of three, cold and kept, beside megatron-core's, and of a blend of as many samples."""
    _megatrons_order(lengths=np.ones(SEQUENCE * 3, np.int32), epochs=1)  # imported outside of what is timed
    lengths = np.random.default_rng(0).integers(1, 2 * DOCUMENT_TOKENS, tokens // DOCUMENT_TOKENS).astype(np.int32)
    total = int(lengths.sum(dtype=np.int64))
    for number in (1, 3):
        for said in ("built and kept", "found kept"):
            build = partial(_order, lengths, number)
            seconds, cpu, arrays = timed(partial(cached_arrays, folder / "indices", {"epochs": number}, build))
            note = f"{len(lengths):,} documents, {len(arrays['shuffle']):,} samples"
            row(f"indices, {number} epochs, {said}", seconds, cpu, number * total, note)
        seconds, cpu, shuffle = timed(partial(_megatrons_order, lengths, number))
        assert np.array_equal(shuffle, arrays["shuffle"])
        row(f"indices, {number} epochs, built by megatron-core", seconds, cpu, number * total)
    for datasets in (2, 8, 32):
        shares, samples = normalized(range(1, datasets + 1)), total // SEQUENCE
        seconds, cpu, _ = timed(partial(blending_index, shares, samples))
        row(f"blend of {datasets} datasets", seconds, cpu, samples * SEQUENCE, f"{samples:,} samples")


def measure_loading(prefix: str, folder: Path) -> None:
    """Rows of batches of 1 and of 64 samples, read in the order of training."""
    for samples in (1, 64):
        steps = 2000 // samples
        tokens = open_indexed_tokens(
            Blend((prefix,)),
            "98,2",
            cache=folder / "indices",
            vocabulary=VOCABULARY,
            training_samples=steps * samples,
            validation_samples=1,
            sequence=SEQUENCE,
            seed=1234,
        )
        read = partial(_read, tokens, steps, samples)
        read()  # so that the pages are there
        seconds, cpu, _ = timed(read)
        row(f"load, {samples} samples of {SEQUENCE} a step", seconds, cpu, steps * samples * SEQUENCE)


def _read(tokens: IndexedTokens, steps: int, samples: int) -> None:
    for step in range(1, steps + 1):
        tokens.batch(step, samples)


def consumption() -> None:
    """What the ranks that share a sample take, by the planner's own prediction of a large and fast plan."""
    words = [
        "plan",
        "--model",
        "llama3-8b",
        "--cluster",
        "dgx-h100:4",
        "--global-batch",
        "512",
        "--seq",
        "8192",
        "--json",
    ]
    answer = json.loads(subprocess.check_output([sys.executable, str(ROOT / "cli.py"), *words]))
    seconds, dp = answer["prediction"]["step_seconds"], answer["layout"]["dp"]
    note = f"llama3-8b on 32 H100, dp{dp}, predicted: what one of its ranks reads"
    row("a step takes", seconds, None, 512 * 8192 / dp, note)


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # one core a worker, also where there is one worker, which is this process
    )
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=float, default=1e9, help="of the dataset whose indices are built")
    options.add_argument("--megabytes", type=float, default=64, help="of JSON lines to prepare")
    options.add_argument("--only", choices=("data", "indices", "step"), help="one part of it")
    arguments = options.parse_args()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  {' '.join(sys.argv)}")
    print(f"{'':44} {'seconds':>9} {'CPU-s':>9} {'tokens/s':>21}")
    with tempfile.TemporaryDirectory(prefix="meshwright-") as name:
        folder = Path(name)
        if arguments.only in (None, "data"):
            measure_loading(measure_preparing(folder, arguments.megabytes), folder)
        if arguments.only in (None, "indices"):
            measure_indices(folder, int(arguments.tokens))
    if arguments.only in (None, "step"):
        consumption()


if __name__ == "__main__":
    main()
