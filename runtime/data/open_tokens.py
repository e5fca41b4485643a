"""The TokenSource that a person asked for: text as bytes, or indexed datasets, found by what lies at the paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from planner.plan import Plan
from profiles.input_error import InputError
from profiles.traced_model import TracedModel, keeps_documents_apart

from ..foreign.example_source import open_examples
from .blend import parse_blend
from .byte_text import DOCUMENT_END, VOCABULARY, ByteText, load_corpus, text_files
from .data_options import DEFAULT_SPLIT, DataOptions
from .indexed_dataset import index_path, open_indexed, tokens_path
from .indexed_tokens import open_indexed_tokens
from .masked_tokens import masked
from .packing import packing_of
from .token_source import TokenSource
from .tokenizer import BYTES, load_tokenizer


def open_tokens(options: DataOptions, plan: Plan, *, steps: int, validation_batches: int, seed: int) -> TokenSource:
    """What the run reads, for so many steps of the plan's global batch: masked, if the plan's model is bidirectional.

    A module of another package makes it itself.

    Raises InputError for whatever of the data or of its options cannot be used with the plan's model.
    """
    if isinstance(plan.model, TracedModel) and not plan.model.reads_tokens:
        return open_examples(plan, options, seed)
    if options.packs and not keeps_documents_apart(plan.model):
        raise InputError(
            "documents are kept apart in causal attention of our own alone",
            where="--reset-attention-mask, --reset-position-ids, --eod-mask-loss",
            expected="none of them with a masked language model, or a module of another package",
            got=plan.model.name,
        )
    source = _open_plain(options, plan, steps=steps, validation_batches=validation_batches, seed=seed)
    return masked(source, options.tokenizer, plan, seed=seed) if plan.model.bidirectional else source


def _open_plain(options: DataOptions, plan: Plan, *, steps: int, validation_batches: int, seed: int) -> TokenSource:
    entries = _entries(options.paths)
    vocabulary, job = plan.model.vocab_size, plan.job
    if options.tokenizer is not None:
        _check_tokenizer(options.tokenizer, plan)
    if _are_text(entries):
        _check_text_options(options)
        if vocabulary < VOCABULARY:
            raise InputError(
                f"{plan.model.name} cannot read bytes",
                where="plan: model.vocab_size",
                expected=f"at least {VOCABULARY}, since every byte of the text is a token",
                got=str(vocabulary),
            )
        corpus = load_corpus(Path(entries[0]) if entries else None, job.sequence)
        packing = packing_of(options, plan.model.positions, DOCUMENT_END)
        return ByteText(corpus=corpus, sequence=job.sequence, seed=seed, packing=packing)
    return open_indexed_tokens(
        parse_blend([_prefix(entry) for entry in entries]),
        options.split or DEFAULT_SPLIT,
        cache=options.cache,
        vocabulary=vocabulary,
        training_samples=steps * job.global_batch,
        validation_samples=validation_batches * job.global_batch,
        sequence=job.sequence,
        seed=seed,
        packing=packing_of(options, plan.model.positions, None),
    )


def document_lengths(paths: tuple[str, ...], sequence: int) -> list[tuple[float, np.ndarray]]:
    """(share of all tokens in any unit, tokens of each document) of each dataset at `paths`, as DataOptions has them.

    Raises InputError where they cannot be read, or are text shorter than a sequence.
    """
    entries = _entries(paths)
    if _are_text(entries):
        text = load_corpus(Path(entries[0]) if entries else None, sequence).train
        return [(1.0, np.diff(np.flatnonzero(text == DOCUMENT_END), prepend=-1))]
    blend = parse_blend([_prefix(entry) for entry in entries])
    found: list[tuple[float, np.ndarray]] = []
    for place, prefix in enumerate(blend.prefixes):
        dataset = open_indexed(prefix)
        ends = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])
        share = float(dataset.total_tokens) if blend.weights is None else blend.weights[place]
        found.append((share, np.diff(ends[dataset.documents])))
    return found


def require_readable(paths: tuple[str, ...]) -> None:
    """Raise InputError where nothing that can be read lies at `paths`, as far as can be told without reading it all."""
    entries = _entries(paths)
    if _are_text(entries):
        if entries:
            text_files(Path(entries[0]))
        return
    for prefix in parse_blend([_prefix(entry) for entry in entries]).prefixes:
        open_indexed(prefix)


def _are_text(entries: list[str]) -> bool:
    return len(entries) < 2 and not (entries and _is_indexed(entries[0]))


def _entries(paths: tuple[str, ...]) -> list[str]:
    """Weights and paths one by one; blanks part them but in the name of something that exists."""
    if not all(path.strip() for path in paths):
        raise InputError(
            "--data names nothing",
            where="--data",
            expected="a file, a folder or the prefix of a dataset",
            got="''",
            hint="is a variable of the shell empty?",
        )
    return [entry for path in paths for entry in ([path] if Path(path).exists() or _is_indexed(path) else path.split())]


def _prefix(entry: str) -> str:
    return entry.removesuffix(".bin").removesuffix(".idx")


def _is_indexed(entry: str) -> bool:
    prefix = _prefix(entry)
    return prefix != entry or index_path(prefix).exists() or tokens_path(prefix).exists()


def _check_tokenizer(name: str, plan: Plan) -> None:
    size = load_tokenizer(name).vocabulary
    if size > plan.model.vocab_size:
        raise InputError(
            f"{plan.model.name} does not know every token of the tokenizer",
            where=f"--tokenizer {name}",
            expected=f"ids below {plan.model.vocab_size}, the model's vocabulary",
            got=f"ids up to {size - 1}",
            hint="take the tokenizer of this model, or plan for a model of its vocabulary",
        )


def _check_text_options(options: DataOptions) -> None:
    tokenizer = None if options.tokenizer == BYTES else options.tokenizer
    flags = {"--split": options.split, "--tokenizer": tokenizer, "--eod": options.eod}
    where = next((flag for flag, value in flags.items() if value is not None), None)
    if where is None:
        return
    raise InputError(
        f"{where} goes with indexed datasets, and text is read as bytes",
        where=where,
        expected="--data PREFIX, with PREFIX.bin and PREFIX.idx",
        got="--data " + " ".join(options.paths) if options.paths else "no --data",
        hint="cli.py data prepare --input FILE --tokenizer FOLDER --output X, then train --data X_text_document",
    )
