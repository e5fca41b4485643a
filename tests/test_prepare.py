"""`data prepare`: files of documents to what megatron-core's builder writes of the same ids; what is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from profiles.input_error import InputError
from runtime.data import documents
from runtime.data.indexed_dataset import open_indexed
from runtime.data.prepare import Preparation, Prepared, prepare
from runtime.data.tokenizer import load_tokenizer
from tests import megatron_core
from tests.command_line import ctrl_c_in_each_that_it_starts, start

TEXTS = ["the cat sat on the mat", "", "Grüße aus Köln, 東京", "the end\nof it", "a" * 300, "mat " * 50]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a byte-level BPE tokenizer of 300 tokens that ends documents with END."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.enable_truncation(4)  # as some models' files ask for, and no corpus wants
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}}))
    return folder


def lines(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)), encoding="utf-8")
    return path


def prepared(tmp_path: Path, *inputs: Path, **options: object) -> Prepared:
    return prepare(Preparation(inputs=inputs, output=str(tmp_path / "out"), **options))  # pyright: ignore


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_what_megatrons_builder_writes(
    workers: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_CHUNK_BYTES", 100)  # less than some lines: many chunks, some empty
    found = prepared(
        tmp_path, lines(tmp_path / "a.jsonl", TEXTS), lines(tmp_path / "b.json", TEXTS[::-1]),
        tokenizer=str(model), append_eod=True, workers=workers,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    end = tokenizer.token_to_id(END)
    ids = [np.array([*tokenizer.encode(text).ids, end] if text else []) for text in [*TEXTS, *TEXTS[::-1]]]
    megatron_core.write(tmp_path / "theirs", ids, np.uint16)
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"out_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()
    assert (found.documents, found.empty, found.tokens) == (12, 2, sum(map(len, ids)))
    assert found.vocabulary == 300


def test_bytes_are_the_default_and_text_files_and_parquet_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[2], encoding="utf-8")
    table = pyarrow.table({"content": TEXTS, "n": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=4)
    found = prepared(tmp_path, tmp_path / "a.txt", tmp_path / "b.parquet", json_key="content", append_eod=True)
    dataset = open_indexed(found.prefix)
    assert found.prefix.endswith("out_content_document")
    texts = [TEXTS[2], *(text for text in TEXTS if text)]
    assert [bytes(dataset.tokens(n).astype(np.uint8)) for n in range(len(dataset))] == [
        text.encode() + b"\0" for text in texts
    ]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y \\ud83d\\ude00"}\n')
    found = prepared(tmp_path, tmp_path / "a.jsonl")
    assert bytes(open_indexed(found.prefix).tokens(0).astype(np.uint8)).decode() == "x\ufffdy 😀"


@pytest.mark.parametrize(
    ("name", "content", "options", "expected", "where"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": 3}\n', {}, "line 3, has no document", "a.jsonl:3"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', {}, "line 2, has no document", "a.jsonl:2"),
        ("a.jsonl", '{"text": "x"\n', {}, "line 1, has no document", "a.jsonl:1"),
        ("a.jsonl", "[1]\n", {}, "line 1, has no document", "a.jsonl:1"),
        ("a.jsonl", "", {}, "no text in the input", "--input"),
        ("a.jsonl", '{"text": ""}\n', {}, "no text in the input", "--input"),
        ("a.csv", "x", {}, "of no kind that is known", "--input"),
        ("a.parquet", "x", {}, "cannot be read", "--input"),
        ("a.txt", b"\xff\xfe", {}, "cannot be read", "--input"),
        ("a.txt", "x", {"tokenizer": "nowhere"}, "there is no tokenizer at nowhere", "--tokenizer"),
        ("a.txt", "x", {"tokenizer": "HERE/a.txt"}, "is no tokenizer that can be read", "--tokenizer"),
        ("a.txt", "x", {"tokenizer": "MODEL", "eod": "<none>"}, "has no such token", "--eod"),
        ("a.txt", "x", {"output": "HERE/a.txt/out"}, "cannot be written", "--output"),
    ],
)
def test_what_cannot_be_prepared_is_an_input_error(
    name: str, content: str | bytes, options: dict[str, str], expected: str, where: str, tmp_path: Path, model: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    named = {key: value.replace("HERE", str(tmp_path)).replace("MODEL", str(model)) for key, value in options.items()}
    wanted = Preparation(**({"inputs": (tmp_path / name,), "output": str(tmp_path / "out")} | named))  # pyright: ignore
    with pytest.raises(InputError, match=expected) as error:
        prepare(wanted)
    assert where in error.value.where
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_tokenizer_that_names_no_end_needs_it_named(tmp_path: Path, model: Path) -> None:
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes((model / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="not known which token ends a document"):
        prepared(tmp_path, lines(tmp_path / "a.jsonl", TEXTS), tokenizer=str(alone), append_eod=True)
    named = prepared(tmp_path, tmp_path / "a.jsonl", tokenizer=str(alone), append_eod=True, eod=END)
    assert open_indexed(named.prefix).tokens(0)[-1] == load_tokenizer(str(model)).end_of_document
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(str(alone)).end_of_document == 7


def test_a_package_that_is_missing_is_named(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError) as error:
        prepared(tmp_path, tmp_path / "a.parquet")
    assert error.value.hint == "pip install 'meshwright[data]'"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="is not installed"):
        load_tokenizer(str(model))


def test_ctrl_c_in_a_worker_that_starts_is_left_to_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = ctrl_c_in_each_that_it_starts(tmp_path / "sent", "runtime.data.prepare", monkeypatch)
    source = lines(tmp_path / "a.jsonl", ["word " * 10_000] * 300)
    run = start("data", "prepare", "--input", str(source), "--output", str(tmp_path / "out"), "--workers", "2")
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (0, "")
    assert list(sent.glob("*.sent"))


def test_the_command_writes_in_parallel_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["word " * 10_000] * 300)  # 15 MB
    command = ["data", "prepare", "--input", str(source), "--output", str(tmp_path / "out"), "--workers", "2"]
    run = start(*command)
    partial = tmp_path / "out_text_document.bin.partial"
    while run.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (130, "interrupted; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    done = start(*command, "--json")
    found = json.loads(done.communicate(timeout=60)[0])
    assert done.returncode == 0
    assert (found["documents"], found["tokens"]) == (300, 15_000_000)
