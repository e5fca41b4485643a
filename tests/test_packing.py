"""Where documents end within a row: megatron-core's own masks, what options ask for, and what a resume refuses."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import runtime.data.packing
from cli_data import packed_options
from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from profiles.input_error import InputError
from runtime.data.data_options import DataOptions
from runtime.data.indexed_dataset import IndexedWriter
from runtime.data.kept_order import check_order, keep_order
from runtime.data.open_tokens import document_lengths, open_tokens
from runtime.data.packing import Packing, document_starts
from runtime.data.token_source import NO_TARGET, TokenSource
from runtime.packed_rows import documents_of, own_tensors
from runtime.trainer import TrainOptions, open_data
from tests.command_line import run
from tests.megatron_core import masks_and_positions
from tests.plans import make_plan, tiny_gpt2, tiny_llama

BOTH = Packing(end=0)


@pytest.mark.parametrize("seed", range(20))
def test_positions_and_masks_are_megatrons(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(0, random.integers(1, 9), size=(3, 1 + random.integers(1, 30)))
    packing = Packing(end=0, mask_loss=True)
    with mock.patch("torch.distributed.all_reduce"):  # of one rank
        _, targets, documents = own_tensors(ids, packing, Layout(), 0, torch.device("cpu"))
    assert documents.starts is not None
    assert documents.positions is not None
    places = torch.arange(ids.shape[1] - 1)
    for row in range(3):
        hidden, counted, positions = masks_and_positions(ids[row, :-1], 0)
        seen = (places >= documents.starts[row, :, None]) & (places <= places[:, None])
        assert torch.equal(seen, ~hidden[0])
        assert torch.equal(documents.positions[row], positions)
        assert torch.equal(targets[row] != NO_TARGET, counted == 1)
    assert documents.tokens is not None
    assert documents.tokens.item() == (targets != NO_TARGET).sum()


def test_the_worked_example() -> None:
    assert doctest.testmod(runtime.data.packing) == doctest.TestResults(failed=0, attempted=1)


@pytest.mark.parametrize("style", ["ring", "all-to-all"])
def test_a_cp_rank_has_its_positions_and_all_starts(style: str) -> None:
    ids = np.random.default_rng(0).integers(0, 5, size=(2, 13))
    whole = documents_of(ids, BOTH, Layout(), 0)
    parts = [documents_of(ids, BOTH, Layout(cp=2, cp_style=style), rank) for rank in (0, 1)]
    order = [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8] if style == "ring" else list(range(12))
    assert whole.positions is not None
    assert torch.equal(torch.cat([part.positions for part in parts], 1), whole.positions[:, order])  # pyright: ignore
    assert all(torch.equal(part.starts, whole.starts) for part in parts)  # pyright: ignore
    assert documents_of(ids, None, Layout(), 0).named() == {}


# ---- what a person asks for --------------------------------------------------------------------------------


def plan_for(model: Any = None, sequence: int = 8) -> Plan:
    job = TrainingJob(global_batch=4, sequence=sequence, precision="fp32")
    return make_plan(model or tiny_llama(vocab_size=256), Layout(), job)


def opened(options: DataOptions, model: Any = None) -> TokenSource:
    return open_tokens(options, plan_for(model), steps=1, validation_batches=1, seed=1)


def dataset(prefix: Path, end: int | None) -> str:
    """40 documents of 3 to 12 tokens."""
    random = np.random.default_rng(0)
    pieces = [np.append(random.integers(1, 99, n), [] if end is None else [end]) for n in random.integers(3, 12, 40)]
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.add(np.concatenate(pieces), np.array([len(piece) for piece in pieces]))
    return str(prefix)


def said(options: DataOptions, model: Any = None) -> str:
    with pytest.raises(InputError) as error:
        opened(options, model)
    return str(error.value)


def test_text_and_datasets_know_what_ends_documents(tmp_path: Path) -> None:
    assert opened(DataOptions()).packing is None
    assert opened(DataOptions(reset_attention=True, reset_positions=True)).packing == BOTH
    data = dataset(tmp_path / "a", 200)
    found = opened(DataOptions(paths=(data,), split="90,10", mask_loss=True, eod="200")).packing
    assert found == Packing(end=200, reset_positions=False, reset_attention=False, mask_loss=True)
    bytes_end = DataOptions(paths=(dataset(tmp_path / "b", 0),), tokenizer="bytes", reset_attention=True)
    assert opened(bytes_end).packing == Packing(end=0, reset_positions=False)


def test_a_plan_with_a_document_length_is_trained_so_unless_told_otherwise() -> None:
    plain = plan_for()
    priced = replace(plain, job=replace(plain.job, document_length=9.0))
    assert not packed_options(DataOptions(), plain, None, None, False, None).packs
    both = packed_options(DataOptions(), priced, None, None, False, None)
    assert both == DataOptions(reset_positions=True, reset_attention=True)
    assert not packed_options(DataOptions(), priced, False, False, False, None).packs
    some = packed_options(DataOptions(), plain, None, True, True, "7")
    assert some == DataOptions(reset_attention=True, mask_loss=True, eod="7")


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    without, others = dataset(tmp_path / "a", None), dataset(tmp_path / "b", 100)
    asked = {"reset_attention": True, "reset_positions": True}
    assert said(DataOptions(paths=(others,), **asked)) == (
        "error: it is not known which token ends a document; where: --eod; expected: --eod ID, or --tokenizer FOLDER, "
        "whose end of sequence it is, or a token of it named by --eod; got: neither"
    )
    assert said(DataOptions(paths=(others,), **asked, eod="</s>")).endswith("got: --eod </s> and no tokenizer")
    assert said(DataOptions(paths=(without,), **asked, eod="100")) == (
        f"error: the data does not say where documents end; where: {without}.bin; expected: id 100, the end of a "
        "document, among the tokens; got: none among the first 275; try: prepare it with --append-eod; or name the "
        "token that ends its documents with --eod"
    )
    assert said(DataOptions(paths=(others,), eod="100")).startswith("error: nothing asks where documents end")
    assert said(DataOptions(**asked, eod="100")).startswith("error: --eod goes with indexed datasets")
    alone = said(DataOptions(reset_positions=True))
    assert alone.startswith("error: positions that are reset alone would change nothing that is meant")
    assert "positions by rope" in alone
    assert opened(DataOptions(reset_positions=True), tiny_gpt2(vocab_size=256)).packing is not None


def test_a_resume_keeps_what_ends_of_documents_change(tmp_path: Path) -> None:
    plan, packed = plan_for(), DataOptions(reset_attention=True, reset_positions=True)
    tokens = opened(packed)
    keep_order(tmp_path, tokens.order, tokens.packing)
    resumed = TrainOptions(run_dir=tmp_path, steps=1, seed=1, resume=True, data=packed)
    assert open_data(plan, resumed).packing == BOTH
    for other in (DataOptions(), DataOptions(reset_attention=True, reset_positions=True, mask_loss=True)):
        with pytest.raises(InputError, match="would not go on with documents as they were") as error:
            open_data(plan, TrainOptions(run_dir=tmp_path, steps=1, seed=1, resume=True, data=other))
        assert error.value.expected == "documents end with 0: positions reset, attention within documents"
    keep_order(tmp_path, tokens.order)  # as before there was packing
    check_order(tmp_path, tokens.order)
    with pytest.raises(InputError, match="as they were") as error:
        check_order(tmp_path, tokens.order, BOTH)
    assert error.value.expected == "ends of documents change nothing"


def test_lengths_of_documents_are_those_of_the_data(tmp_path: Path) -> None:
    first, second = dataset(tmp_path / "a", 0), dataset(tmp_path / "b", None)
    ((share, lengths),) = document_lengths((first,), 8)
    assert (share, lengths.sum(), len(lengths), lengths.max()) == (315.0, 315, 40, 12)
    weighted = document_lengths(("0.3", first, "0.7", second), 8)
    assert [share for share, _ in weighted] == [0.3, 0.7]
    (tmp_path / "text").mkdir()
    for name, size in (("a", 5), ("b", 70), ("c", 30)):
        (tmp_path / "text" / name).write_bytes(b"x" * size)
    ((_, lengths),) = document_lengths((str(tmp_path / "text"),), 2)
    assert lengths.tolist()[:2] == [6, 71]


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = "estimate --model demo --cluster dgx-h100:1 --global-batch 64 --seq 256 --layout zero=3 --document-length"

    def answer(*length: str) -> tuple[int, str, str]:
        return run(capsys, monkeypatch, *words.split(), *length)

    for wrong in ("0.5", "nan"):
        code, _, text = answer(wrong)
        assert code == 2
        assert f"documents cannot have {wrong} tokens" in text
    assert answer("/no/such/file")[0] == 2
    code, text, _ = answer("64")
    assert code == 0
    assert "assumed: attention stays within documents, all of 64 tokens; mfu counts it in full" in text
    code, _, text = answer("64", "--target", "megatron")
    assert code == 2
    assert "--target meshwright" in text


def test_starts_of_an_empty_row() -> None:
    assert document_starts(np.zeros((2, 1), np.int64), 0).tolist() == [[0], [0]]
