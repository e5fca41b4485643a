"""Which rows of a global batch are whose, and what a person's paths, split and tokenizer open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planner.job import TrainingJob
from planner.layout import Layout
from profiles.input_error import InputError
from runtime.data.data_options import DataOptions
from runtime.data.indexed_dataset import IndexedWriter
from runtime.data.kept_order import check_order, keep_order
from runtime.data.open_tokens import open_tokens
from runtime.data.token_source import TokenSource, own_rows
from tests.plans import make_plan, tiny_llama

SEQUENCE = 8


def opened(*paths: str, vocabulary: int = 100, steps: int = 3, seed: int = 1234, **options: str) -> TokenSource:
    """What a run of 4 samples a step on a model of this vocabulary reads."""
    job = TrainingJob(global_batch=4, sequence=SEQUENCE, precision="fp32")
    plan = make_plan(tiny_llama(vocab_size=vocabulary), Layout(), job)
    return open_tokens(DataOptions(paths=paths, **options), plan, steps=steps, validation_batches=2, seed=seed)


def dataset(prefix: Path, documents: int = 40, first: int = 0) -> str:
    """Documents of 12 tokens each, all the document's number from `first` on."""
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.add(np.repeat(np.arange(first, first + documents), 12), np.full(documents, 12))
    return str(prefix)


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 3), (2, 1), (2, 3), (4, 3), (3, 2)])
def test_the_ranks_of_each_microbatch_share_consecutive_samples(dp: int, micro_batch: int) -> None:
    layout = Layout(dp=dp, micro_batch=micro_batch)
    shares = [own_rows(12, layout, rank).reshape(-1, micro_batch) for rank in range(dp)]
    assert len(shares[0]) == layout.microbatches(12)
    for microbatch in range(len(shares[0])):
        first = microbatch * micro_batch * dp
        rows = np.concatenate([share[microbatch] for share in shares])
        assert rows.tolist() == list(range(first, first + micro_batch * dp))


def test_steps_take_the_samples_one_after_the_other_whatever_the_batch(tmp_path: Path) -> None:
    tokens = opened(dataset(tmp_path / "a"), split="1,1")
    one_by_one = [tokens.batch(step, 1) for step in range(1, 9)]
    assert np.array_equal(np.concatenate(one_by_one), np.concatenate([tokens.batch(1, 4), tokens.batch(2, 4)]))
    assert np.array_equal(tokens.batch(2, 4, np.array([3, 0])), tokens.batch(2, 4)[[3, 0]])
    assert tokens.unit == "token"
    assert tokens.baseline_loss() is None
    # Documents 0 to 19 are trained on, 20 to 39 are not.
    assert np.concatenate(one_by_one).max() < 20
    assert tokens.validation_batch(1, 4).min() >= 20


def test_a_path_is_text_or_a_prefix_by_what_lies_there(tmp_path: Path) -> None:
    prefix = dataset(tmp_path / "a")
    text = tmp_path / "some text.txt"
    text.write_text("hello " * 500)
    assert opened(str(text), vocabulary=256).unit == "byte"
    assert opened(prefix).name == prefix
    assert opened(f"{prefix}.bin").name == opened(f"{prefix}.idx").name == prefix
    dataset(tmp_path / "b", first=40)
    blend = f"0.25 {prefix} 0.75 {tmp_path / 'b'}"
    assert opened(blend).name == opened(*blend.split()).name == blend
    assert opened(prefix, str(tmp_path / "b")).name == f"{prefix} {tmp_path / 'b'}"


@pytest.mark.parametrize(
    ("paths", "options", "expected", "where"),
    [
        (("T", "0.5", "A"), {}, "do not take turns", "--data"),
        (("0.5", "A", "B", "0.5"), {}, "do not take turns", "--data"),
        (("0", "A", "1", "B"), {}, "weight of --data cannot be used", "--data"),
        (("A", "T"), {}, "T.idx cannot be read", "--data"),
        (("A",), {"split": "969;30;1"}, "the split cannot be used", "--split"),
        (("A",), {"split": "0,1"}, "the split cannot be used", "--split"),
        (("A",), {"split": "1,2,3,4"}, "the split cannot be used", "--split"),
        (("A",), {"split": "1000,1"}, "the validation split of .*A is empty", "--split"),
        (("A", "B"), {"steps": 1000}, "the data is over before the run", "--data"),
        (("A",), {"vocabulary": 39}, "a token that the model does not know", "A.bin: document 39"),
        (("T",), {"split": "9,1", "vocabulary": 256}, "--split goes with indexed datasets", "--split"),
        (("T",), {"vocabulary": 255}, "cannot read bytes", "plan: model.vocab_size"),
        (("A",), {"tokenizer": "bytes"}, "does not know every token", "--tokenizer bytes"),
        (("A",), {"tokenizer": "nowhere"}, "there is no tokenizer at nowhere", "--tokenizer nowhere"),
    ],
)
def test_what_cannot_be_used_is_an_input_error(
    paths: tuple[str, ...], options: dict[str, str], expected: str, where: str, tmp_path: Path
) -> None:
    dataset(tmp_path / "A")
    dataset(tmp_path / "B", first=40)
    (tmp_path / "T").write_text("hello " * 500)
    named = [str(tmp_path / path) if path.isalpha() else path for path in paths]
    with pytest.raises(InputError, match=expected) as error:
        opened(*named, **options)  # pyright: ignore
    assert where in error.value.where


def test_a_token_beyond_the_vocabulary_is_found_wherever_it_is(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "a"), np.dtype(np.int32)) as writer:
        writer.add(np.zeros(1 << 21, np.int32), np.array([1 << 21]))
        writer.add(np.array([7, 100, -1] * 10), np.array([30]))
    tokens = opened(str(tmp_path / "a"), split="1,1")  # whose first million tokens are sound
    with pytest.raises(InputError, match="a token that the model does not know") as error:
        tokens.validation_batch(0, 4)
    assert error.value.got in ("id 100", "id -1")
    assert error.value.where.endswith("a.bin")


def test_a_resumed_run_must_go_on_in_its_order(tmp_path: Path) -> None:
    prefix = dataset(tmp_path / "a")
    before = opened(prefix, steps=3)
    keep_order(tmp_path, before.order)
    check_order(tmp_path, opened(prefix, steps=4).order)  # one epoch has both
    for other in (opened(prefix, seed=1), opened(prefix, split="1,1"), opened(prefix, steps=40)):
        with pytest.raises(InputError, match="would not go on with the samples that follow"):
            check_order(tmp_path, other.order)
    assert not np.array_equal(before.batch(1, 4), opened(prefix, steps=40).batch(1, 4))
